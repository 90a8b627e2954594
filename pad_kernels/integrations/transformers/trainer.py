"""What all trainers share: data, the loss inside the model's forward, denominators, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer

import pad_kernels as pk
from pad_kernels._checks import fail_type, fail_value
from pad_kernels.integrations.transformers.collate import (
    COUNTS,
    Collator,
    first_rows,
    flat_hidden,
    model_inputs,
)
from pad_kernels.integrations.transformers.config import DistillationConfig
from pad_kernels.integrations.transformers.data import Format, context, encode, fingerprint
from pad_kernels.integrations.transformers.head import ModelHead, head_of
from pad_kernels.integrations.transformers.hidden import run_with_head
from pad_kernels.integrations.transformers.metrics import Meter, peak_memory
from pad_kernels.integrations.transformers.packing import check_kept_apart
from pad_kernels.integrations.transformers.teachers import (
    OfflineTeacher,
    Teacher,
    effective_size,
    limited,
)
from pad_kernels.integrations.transformers.terms import Result, Student, Term

_KNOWS = {
    "head": "whole distributions (a ModelTeacher, or a cache of hidden states)",
    "teacher": "the likeliest tokens and their log-probs",
    "advantage": "log-ratios of two teachers",
}


class DistillationTrainer(Trainer):
    """The base of all trainers here; a method is `terms`, `format` and `result`.

    A loss is a sum of terms, each a mean with a denominator of its own (rows, or tokens of some
    responses). In training the denominators are counted over all micro-batches of a step and all
    ranks before the first of them runs, so that neither changes the gradient. An evaluation is a
    mean over the whole data set in the same way.
    """

    def __init__(
        self,
        model: Any,
        args: DistillationConfig,
        *,
        processing_class: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        teachers: Mapping[str, Teacher | None],
        peft_config: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
    ) -> None:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if processing_class is None:
            fail_type("processing_class", "the student's tokenizer", processing_class)
        self.method = args
        self.tokenizer = processing_class
        self._limit = _limit(args, model)
        self._meter = Meter()
        self._kept_apart = False
        self.teachers = self._checked(teachers)
        format = self.format()
        collator = Collator(
            _pad_id(processing_class),
            args.padding_free,
            taught_from=format.taught_from,
            grouped=not format.responses,
        )
        with args.main_process_first(desc="tokenising"):
            train_dataset = self._encoded("train_dataset", train_dataset)
            eval_dataset = self._encoded("eval_dataset", eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            expected = "one GPU a process: start with torchrun or accelerate launch"
            fail_value("args", expected, f"{args.n_gpu}")
        if max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size()) > 1:
            fail_value("args", "data parallelism alone", "tensor, context or sequence parallelism")
        self.model_accepts_loss_kwargs = True  # the loss has its denominators: no further division
        for name, teacher in self.teachers.items():
            teacher.attach(name, processing_class, args.device)
        self._vocab_size = self._common_vocabulary()

    # What a method says about itself.

    accepts: ClassVar[Mapping[str, tuple[str, ...]]]  # kinds of each teacher, see Teacher.kind

    def terms(self) -> dict[str, Term]:
        """The parts of the loss."""
        raise NotImplementedError

    def format(self) -> Format:
        """The columns to read."""
        raise NotImplementedError

    def result(
        self, student: Student, given: Mapping[str, Any], scales: Mapping[str, Tensor] | None
    ) -> Result:
        """Sums and metrics of a batch.

        Args:
            student: its head over the batch's tokens.
            given: what :meth:`taught` returned.
            scales: in training, each term's coefficient over its denominator.
        """
        raise NotImplementedError

    def taught(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the teachers say, before the student's forward and without gradients."""
        part = batch.get("taught", batch)
        return {name: self._heard(teacher(part), batch) for name, teacher in self.teachers.items()}

    # Data.

    def _encoded(self, where: str, dataset: Any) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {
                name: self._encoded(f"{where}[{name!r}]", each) for name, each in dataset.items()
            }
        rows = encode(
            dataset,
            self.format(),
            self.tokenizer,
            limit=self._limit,
            overlong=self.method.overlong,
            num_proc=self.method.dataset_num_proc,
            where=where,
        )
        offline = [each for each in self.teachers.values() if isinstance(each, OfflineTeacher)]
        if offline and "data_key" not in rows.column_names:
            key = fingerprint(rows)
            for each in offline:
                each.check_data(where, key)
            rows = rows.add_column("data_key", [key] * len(rows))
        return rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Also of a data set that is not tokenised yet."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._encoded("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    # Teachers.

    def _checked(self, teachers: Mapping[str, Teacher | None]) -> dict[str, Teacher]:
        """Those that there are, each of a kind that the method can use."""
        given = {name: each for name, each in teachers.items() if each is not None}
        for name, teacher in given.items():
            if not hasattr(teacher, "attach"):
                fail_type(name, "a ModelTeacher(model, tokenizer) or a CachedTeacher", teacher)
            if teacher.kind not in self.accepts[name]:
                expected = f"a teacher that knows {_KNOWS[self.accepts[name][-1]]}"
                fail_value(name, expected, f"a cache of {_KNOWS[teacher.kind]}")
        return given

    def _common_vocabulary(self) -> int | None:
        """The vocabulary all models have, where their (padded) sizes differ."""
        sizes = {name: teacher.vocab_size for name, teacher in self.teachers.items()}
        sizes["model"] = effective_size(head_of(self.model))
        if len(set(sizes.values())) == 1:
            return None
        needed = 1 + max(self.tokenizer.get_vocab().values())
        for name, size in sizes.items():
            if size < needed:
                fail_value(name, f"a head of at least the tokenizer's {needed} entries", size)
        return needed

    def _heard(self, output: Any, batch: Mapping[str, Any]) -> Any:
        """A teacher's answer over the batch's N tokens, where it was asked about some of them."""
        output = limited(output, self._vocab_size)
        if "taught" not in batch:
            return output
        return _spread(output, batch["second"])

    # The loss.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, and the denominators of its loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([batch["counts"] for batch in batches]).sum(0).to(device)
        return batches, self._over_ranks(counts)

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        return self.accelerator.gather(values.unsqueeze(0)).sum(0)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the step's.

        Args:
            num_items_in_batch: the step's denominators [3], see COUNTS; the batch's own if None.
        """
        totals = inputs["counts"] if num_items_in_batch is None else num_items_in_batch
        scales = {
            name: (term.coefficient / totals[COUNTS.index(term.per)].clamp(min=1)).float()
            for name, term in {**self.terms(), "rows": Term("rows")}.items()
        }
        outputs = self._run(model, inputs, scales)
        loss = outputs.pop("loss")
        self._meter.add(outputs)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, outputs) if return_outputs else loss

    def _run(
        self, model: Any, batch: Mapping[str, Any], scales: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Pairs [2] of terms and metrics by name and, with scales, the loss."""
        if self.method.padding_free and not self._kept_apart:
            check_kept_apart(model, batch["input_ids"], self._precision())
            self._kept_apart = True
        given = self.taught(batch)

        def compute(hidden: Tensor, head: ModelHead) -> dict[str, Tensor]:
            over = limited(head.head(flat_hidden(hidden, batch)), self._vocab_size)
            result = self.result(Student(over, batch), given, scales)
            outputs = dict(result.metrics)
            for name, total in result.sums.items():
                count = batch["counts"][COUNTS.index(self.terms()[name].per)]
                outputs[name] = torch.stack([total.detach().double(), count])
            if scales is not None:
                loss = result.loss
                if loss is None:
                    loss = torch.stack([s * scales[n] for n, s in result.sums.items()]).sum()
                outputs["loss"] = loss
            return outputs

        return run_with_head(model, compute, **model_inputs(batch))

    def _precision(self) -> torch.dtype | None:
        """What the model's products are rounded to under autocast."""
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else None

    # Evaluation and logs.

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch of an evaluation."""
        inputs = self._prepare_inputs(inputs)
        real = self._real_rows(len(inputs["valid"]))
        if 0 < real < len(inputs["valid"]):
            inputs = first_rows(inputs, real)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._run(model, inputs, None)
        self._meter.add(outputs if real else {n: 0.0 * each for n, each in outputs.items()})
        terms = self.terms().items()
        parts = [term.coefficient * outputs[n][0] / outputs[n][1].clamp(min=1) for n, term in terms]
        return torch.stack(parts).sum(), None, None

    def _real_rows(self, rows: int) -> int:
        """How many of this rank's rows are not repeated ones, which end an evaluation."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader:
            return rows
        if state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - rows * self.accelerator.process_index))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with means over the whole data set instead of means over batches."""
        training, self._meter = self._meter, Meter()
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            means = self._meter.read(self.accelerator.gather)
        finally:
            self._meter = training
        terms = self.terms().items()
        means["loss"] = sum(term.coefficient * means.get(name, 0.0) for name, term in terms)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, and the peak of memory, to training's logs."""
        if "loss" in logs:
            logs.update(self._meter.read(self.accelerator.gather))
            logs.update(peak_memory(self.args.device))
        super().log(logs, start_time)


def _limit(args: DistillationConfig, model: Any) -> int | None:
    """Most tokens of a sequence."""
    longest = context(model)
    if longest is not None and (args.max_length or 0) > longest:
        fail_value("max_length", f"at most the model's context, {longest}", args.max_length)
    return args.max_length or longest


def _pad_id(tokenizer: Any) -> int:
    """Padding is masked out: any token will do where the tokenizer names none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _spread(output: Any, where: Tensor) -> Any:
    """A teacher's rows at the tokens [N] it was asked about; zeros, of no weight, elsewhere."""
    index = where.nonzero().squeeze(1)

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(where), *rows.shape[1:]).index_copy(0, index, rows)

    if isinstance(output, pk.Head):
        return pk.Head(spread(output.hidden), *_rest(output))
    ids = torch.arange(output.ids.shape[1], device=output.ids.device).repeat(len(where), 1)
    return pk.TopKAdvantage(ids.index_copy(0, index, output.ids.long()), spread(output.values))


def _rest(head: pk.Head) -> tuple[Any, ...]:
    return (
        head.weight,
        head.bias,
        head.softcap,
        head.logit_scale,
        head.temperature,
        head.vocab_size,
    )
