"""Preference-Aligned Distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import fail_type
from pad_kernels.integrations.transformers.config import PADConfig
from pad_kernels.integrations.transformers.data import Format
from pad_kernels.integrations.transformers.metrics import kendall_tau, pair
from pad_kernels.integrations.transformers.teachers import Teacher, head_logprob
from pad_kernels.integrations.transformers.terms import Result, Student, Term, by_response
from pad_kernels.integrations.transformers.trainer import DistillationTrainer


def pad_format(*, scored: bool) -> Format:
    """Prompts with at least two responses, and their rewards if a teacher has scored them."""
    advice = {"rewards": "the teacher's rewards; or give the trainer a teacher"}
    if scored:
        return Format(many="responses", at_least=2, scores="rewards", advice=advice)
    return Format(many="responses", at_least=2, unwanted={"rewards": "a teacher"})


class PADTrainer(DistillationTrainer):
    """Trains a student to rank n responses as its teacher does (arXiv 2502.14272).

    The data set has ``prompt``, ``responses`` (a list of at least two) and, without a teacher,
    ``rewards`` (as many numbers): for instance the teacher's calibrated rewards
    (:func:`pad_kernels.calibrated_rewards`). With a teacher a response's reward is the mean of its
    tokens' log-probs. The loss is a mean over prompts.

    Logs ``preference`` (the loss), ``rewards`` (the student's mean log-prob), ``kendall_tau``,
    ``accuracy`` (how often the best response is the same) and ``peak_memory_mib``.

    Args:
        model: the student, a causal language model of transformers.
        args: a :class:`PADConfig`.
        processing_class: its tokenizer.
        train_dataset, eval_dataset: `datasets.Dataset`s or lists of dicts.
        teacher: None for rewards from the data set.
        peft_config, callbacks, optimizers: as usual.
    """

    accepts: ClassVar = {"teacher": ("head",)}

    def __init__(
        self, model: Any, args: PADConfig, *, teacher: Teacher | None = None, **options: Any
    ) -> None:
        if not isinstance(args, PADConfig):
            fail_type("args", "a PADConfig", args)
        self.method: PADConfig = args
        zeros = torch.zeros(1, 2)
        pk.listwise_preference_loss(zeros, zeros, **self._options())  # checks the options
        super().__init__(model, args, teachers={"teacher": teacher}, **options)

    def _options(self) -> dict[str, Any]:
        args = self.method
        return {"beta": args.beta, "kind": args.kind, "subset_size": args.subset_size}

    def format(self) -> Format:
        """Prompts with n responses, and rewards if there is no teacher."""
        return pad_format(scored=not self.teachers)

    def terms(self) -> dict[str, Term]:
        """A mean over prompts."""
        return {"preference": Term("rows")}

    def taught(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher's rewards [rows, n]."""
        if not self.teachers:
            return {"rewards": batch["rewards"]}
        head = super().taught(batch)["teacher"]
        with torch.no_grad():
            logprob = head_logprob(head, batch["targets"])
        return {"rewards": by_response(logprob, batch, "length")}

    def result(
        self, student: Student, given: Mapping[str, Any], scales: Mapping[str, Tensor] | None
    ) -> Result:
        """The listwise loss of each prompt's responses."""
        valid, theirs = student.batch["valid"], given["rewards"]
        ours = student.by_response(student.logprob(), "length")
        loss = pk.listwise_preference_loss(
            ours, theirs, valid=valid, reduction="sum", **self._options()
        )
        ours = ours.detach()
        lowest = torch.finfo(ours.dtype).min
        best = [each.where(valid, lowest).argmax(1) for each in (ours, theirs)]
        metrics = {
            "rewards": pair(ours, valid),
            "kendall_tau": pair(kendall_tau(ours, theirs, valid)),
            "accuracy": pair((best[0] == best[1]).double()),
        }
        return Result({"preference": loss}, metrics)
