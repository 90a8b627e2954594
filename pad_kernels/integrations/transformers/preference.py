"""DPO and its family, SimPO, ORPO, CPO, KTO, and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import check_choice, check_number, fail_type, fail_value
from pad_kernels.integrations.transformers.collate import flat_hidden, model_inputs
from pad_kernels.integrations.transformers.config import PreferenceConfig
from pad_kernels.integrations.transformers.data import Format
from pad_kernels.integrations.transformers.head import ModelHead
from pad_kernels.integrations.transformers.hidden import run_with_head
from pad_kernels.integrations.transformers.metrics import pair
from pad_kernels.integrations.transformers.teachers import (
    Teacher,
    evaluating,
    head_logprob,
    limited,
)
from pad_kernels.integrations.transformers.terms import Result, Student, Term, by_response
from pad_kernels.integrations.transformers.trainer import DistillationTrainer
from pad_kernels.sequence.pairwise import KINDS as PAIRWISE
from pad_kernels.sequence.unpaired import KINDS as UNPAIRED

LOSSES = (*PAIRWISE, *UNPAIRED, "orpo", "cpo", "sft")
#: Kinds that take a mean over each response's tokens; the others take sums.
_MEANS = {"ipo", "simpo", "sigmoid_norm", "orpo"}
#: Options that only go to the loss if they are given: their defaults are the functions' own.
_OPTIONS = ("label_smoothing", "discopop_tau", "gamma", "reward_shift")


class PreferenceTrainer(DistillationTrainer):
    """Trains on preferences with one of the losses of :class:`PreferenceConfig`.

    The data set has ``prompt`` and

    - ``chosen`` and ``rejected`` for losses of pairs, orpo and cpo;
    - ``completion`` and ``label`` (bool: desirable) for kto and apo_zero_unpaired;
    - ``completion``, or else ``chosen``, for sft.

    Those that compare with a reference take it from ``reference``, or from the base model under a
    PEFT adapter, or (losses of pairs) from the columns ``ref_chosen_logps`` and
    ``ref_rejected_logps``, summed log-probs of the responses.

    Losses are means over rows; those that hold on to the chosen response (orpo, cpo) and sft have a
    mean over its tokens, of the prompt none. KTO's reference point is one for the whole effective
    batch. The aot kinds compare quantiles, within each micro-batch.

    Logs, of what a loss has: ``preference`` and ``nll``, its terms, ``rewards/chosen``,
    ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``kl``.

    Args:
        model: the student.
        args: a :class:`PreferenceConfig`.
        reference: a :class:`ModelTeacher`, or None.
        processing_class, train_dataset, eval_dataset, peft_config, callbacks, optimizers: as usual.
    """

    accepts: ClassVar = {"reference": ("head",)}

    def __init__(
        self,
        model: Any,
        args: PreferenceConfig,
        *,
        reference: Teacher | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(args, PreferenceConfig):
            fail_type("args", "a PreferenceConfig", args)
        self.method: PreferenceConfig = args
        self.kind = check_choice("loss", args.loss, LOSSES)
        self._options = self._checked_options()
        if reference is not None and not self._compares:
            fail_value("reference", f"None: {self.kind} has no reference model", "one")
        has_adapter = options.get("peft_config") is not None or hasattr(model, "disable_adapter")
        self._adapter_off = self._compares and reference is None and has_adapter
        if self.kind in UNPAIRED and reference is None and not has_adapter:
            fail_value("reference", f"a ModelTeacher or a PEFT adapter for {self.kind}", None)
        super().__init__(model, args, teachers={"reference": reference}, **options)

    @property
    def _compares(self) -> bool:
        """Whether the loss has a reference model."""
        return self.kind in UNPAIRED or (self.kind in PAIRWISE and self.kind != "simpo")

    @property
    def _from_columns(self) -> bool:
        """Whether the reference's log-probs are in the data set."""
        return self._compares and not self.teachers and not self._adapter_off

    @property
    def _normalize(self) -> str:
        cpo_means = self.kind == "cpo" and self.method.cpo_kind in ("ipo", "simpo")
        return "length" if self.kind in _MEANS or cpo_means else "none"

    def _checked_options(self) -> dict[str, Any]:
        """The loss function's options, tried on numbers now: it knows which ones fit."""
        args = self.method
        given = {n: getattr(args, n) for n in _OPTIONS if getattr(args, n) is not None}
        beta = args.beta if args.beta is not None else 2.0 if self.kind == "simpo" else 0.1
        allowed: dict[str, tuple[str, ...]] = {
            "cpo": ("label_smoothing", "gamma"),
            **dict.fromkeys(("orpo", "sft", *UNPAIRED), ()),
        }
        for name in given.keys() - set(allowed.get(self.kind, _OPTIONS)):
            fail_value(name, f"None for loss={self.kind!r}", given[name])
        options: dict[str, Any] = {"beta": beta, **given}
        if self.kind in UNPAIRED:
            options["desirable_weight"] = args.desirable_weight
            options["undesirable_weight"] = args.undesirable_weight
        if self.kind == "cpo":
            options["kind"] = args.cpo_kind
            check_number("nll_weight", args.nll_weight, at_least=0.0)
        zero = torch.zeros(1)
        if self.kind == "sft":
            return {}
        if self.kind in UNPAIRED:
            point = 0.0 if self.kind == "kto" else None
            pk.kto_loss(zero, zero, zero == 0, kl=point, kind=self.kind, **options)
        else:
            reference = (zero, zero) if self._compares else ()
            self._pairwise(zero - 1, zero - 1, *reference, options=options)
        return options

    def _pairwise(self, *logprobs: Tensor, options: Mapping[str, Any]) -> Any:
        """The preference term alone, summed over pairs."""
        if self.kind == "orpo":
            # The NLL is a term of its own, a mean over tokens: none here.
            chosen, rejected = logprobs
            nll = torch.zeros_like(chosen)
            return pk.orpo_loss(chosen, rejected, nll, reduction="sum", **options)
        if self.kind == "cpo":
            return pk.cpo_loss(*logprobs, nll_weight=0.0, reduction="sum", **options)
        return pk.pairwise_preference_loss(*logprobs, kind=self.kind, reduction="sum", **options)

    def format(self) -> Format:
        """The columns of the loss."""
        if self.kind == "sft":
            return Format(("completion",), instead={"completion": "chosen"})
        if self.kind in UNPAIRED:
            return Format(("completion",), flag="label", unrelated=self.kind == "kto")
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        if self._from_columns:
            advice = "the reference's summed log-probs; or give the trainer a reference"
            return Format(
                ("chosen", "rejected"), numbers=columns, advice=dict.fromkeys(columns, advice)
            )
        other = "a reference model" if self._compares else f"{self.kind}, which has no reference"
        return Format(("chosen", "rejected"), unwanted=dict.fromkeys(columns, other))

    def terms(self) -> dict[str, Term]:
        """A mean over rows, and of some over tokens."""
        if self.kind == "sft":
            return {"nll": Term("first")}
        if self.kind == "orpo":
            return {"preference": Term("rows"), "nll": Term("first")}
        if self.kind == "cpo":
            return {"preference": Term("rows"), "nll": Term("first", self.method.nll_weight)}
        return {"preference": Term("rows")}

    def taught(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's log-prob of each response [rows, n], and KTO's reference point."""
        if not self._compares:
            return {}
        if self._from_columns:
            columns = [batch["ref_chosen_logps"], batch["ref_rejected_logps"]]
            sums = torch.stack(columns, 1)
            if self._normalize == "length":
                sums = sums / batch["offsets"].diff().view(sums.shape)
            return {"reference": sums}
        given = {"reference": self._reference(batch, self._normalize)}
        if "unrelated" in batch:
            point = batch.get("reference_point")
            if point is None:  # of an evaluation, where it is the batch's own
                sums = self._log_ratio(batch["unrelated"])
                point = sums[0] / sums[1]
            given["kl"] = point.clamp(min=0.0).float()
        return given

    @torch.no_grad()
    def _reference(self, batch: Mapping[str, Any], normalize: str) -> Tensor:
        if not self._adapter_off:
            head = self._heard(self.teachers["reference"](batch), batch)
            return by_response(head_logprob(head, batch["targets"]), batch, normalize)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._own(batch, normalize)

    def _own(self, batch: Mapping[str, Any], normalize: str) -> Tensor:
        """The student's log-prob of each response, without gradient or dropout."""

        def compute(hidden: Tensor, head: ModelHead) -> Tensor:
            over = limited(head.head(flat_hidden(hidden, batch)), self._vocab_size)
            return by_response(head_logprob(over, batch["targets"]), batch, normalize)

        with evaluating(self.model_wrapped):
            logprob: Tensor = run_with_head(self.model_wrapped, compute, **model_inputs(batch))
        return logprob

    def result(
        self, student: Student, given: Mapping[str, Any], scales: Mapping[str, Tensor] | None
    ) -> Result:
        """The loss's terms, and the rewards of the responses."""
        batch = student.batch
        if self.kind == "sft":
            return Result({"nll": -student.logprob().sum()}, {})
        logprob = student.logprob()
        ours = student.by_response(logprob, self._normalize)
        if self.kind in UNPAIRED:
            return self._unpaired(ours[:, 0], given, batch)
        columns = [*ours.unbind(1)]
        if "reference" in given:
            columns += [*given["reference"].unbind(1)]
        out = self._pairwise(*columns, options=self._options)
        sums = {"preference": out.loss}
        if self.kind in ("orpo", "cpo"):
            sums["nll"] = -torch.where(batch["second"], 0.0, logprob).sum()
        margins = out.chosen_rewards - out.rejected_rewards
        metrics = {
            "rewards/chosen": pair(out.chosen_rewards),
            "rewards/rejected": pair(out.rejected_rewards),
            "rewards/margins": pair(margins),
            "rewards/accuracies": pair((margins > 0).double()),
        }
        return Result(sums, metrics)

    # KTO.

    def _unpaired(
        self, logprob: Tensor, given: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> Result:
        point = {"kl": given["kl"]} if self.kind == "kto" else {}
        label = batch["label"]
        reference = given["reference"][:, 0]
        out = pk.kto_loss(
            logprob, reference, label, kind=self.kind, reduction="sum", **point, **self._options
        )
        metrics = {
            "rewards/chosen": pair(out.rewards, label),
            "rewards/rejected": pair(out.rewards, ~label),
        }
        if point:
            metrics["kl"] = pair(out.kl)
        return Result({"preference": out.loss}, metrics)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the base; for KTO also the reference point, from all of the step's micro-batches."""
        batches, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.kind == "kto" and batches:
            parts = [self._log_ratio(self._prepare_inputs(b["unrelated"])) for b in batches]
            total, count = self._over_ranks(torch.stack(parts).sum(0))
            for batch in batches:
                batch["reference_point"] = total / count
        return batches, totals

    def _log_ratio(self, unrelated: Mapping[str, Any]) -> Tensor:
        """Sum and count [2] of log student - log reference over responses to other prompts."""
        return pair(self._own(unrelated, "none") - self._reference(unrelated, "none"))
