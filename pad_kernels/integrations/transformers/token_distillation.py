"""Token-level distillation from aligned teachers: DCKD and ADPA (arXiv 2502.17927)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import fail_type, fail_value
from pad_kernels.integrations.transformers.config import ADPAConfig, DCKDConfig
from pad_kernels.integrations.transformers.data import Format
from pad_kernels.integrations.transformers.teachers import Teacher
from pad_kernels.integrations.transformers.terms import Result, Student, Term
from pad_kernels.integrations.transformers.trainer import DistillationTrainer


def dckd_format(args: DCKDConfig) -> Format:
    """Chosen and rejected responses; of plain distillation one."""
    advice = {"rejected": "use_rejected=False distils on the chosen responses alone"}
    if not args.use_rejected:
        return Format(("completion",), instead={"completion": "chosen"})
    return Format(("chosen", "rejected"), advice=advice)


def adpa_format() -> Format:
    """A chosen response, and the student's own ones, about which teachers are asked."""
    advice = {"responses": "what the student itself answers, a list for each prompt"}
    return Format(("chosen",), many="responses", taught_from=1, advice=advice)


class DCKDTrainer(DistillationTrainer):
    """Supervised on chosen responses, and close to a teacher on chosen and rejected ones.

    The data set has ``prompt``, ``chosen`` and ``rejected``; with ``use_rejected=False`` it is
    knowledge distillation and has ``prompt`` and ``completion``, or else ``chosen``. The teacher is
    a model aligned with the preferences. The loss is SFT(chosen) + alpha · (mean KL over chosen
    tokens + mean KL over rejected ones), each a mean over the tokens of the whole effective batch.

    Logs ``sft`` and ``kl``, the sum of the two means; an evaluation has ``kl_chosen`` and
    ``kl_rejected``.

    Args:
        model: the student.
        args: a :class:`DCKDConfig`.
        teacher: a :class:`ModelTeacher` or a :class:`CachedTeacher`.
        processing_class, train_dataset, eval_dataset, peft_config, callbacks, optimizers: as usual.
    """

    accepts: ClassVar = {"teacher": ("head", "teacher")}

    def __init__(self, model: Any, args: DCKDConfig, *, teacher: Teacher, **options: Any) -> None:
        if not isinstance(args, DCKDConfig):
            fail_type("args", "a DCKDConfig", args)
        self.method: DCKDConfig = args
        super().__init__(model, args, teachers={"teacher": teacher}, **options)

    def format(self) -> Format:
        """Chosen and, unless it is plain distillation, rejected responses."""
        return dckd_format(self.method)

    def terms(self) -> dict[str, Term]:
        """Two or three means over tokens."""
        alpha = self.method.alpha
        terms = {"sft": Term("first"), "kl_chosen": Term("first", alpha)}
        return terms | ({"kl_rejected": Term("second", alpha)} if self.method.use_rejected else {})

    def result(
        self, student: Student, given: Mapping[str, Any], scales: Mapping[str, Tensor] | None
    ) -> Result:
        """One pass over all tokens."""
        second = student.batch["second"]
        if scales is None:
            out = self._distill(student, given, reduction="none")
            chosen = {"sft": out.cross_entropy, "kl_chosen": out.divergence}
            sums = {name: _sum(values, ~second) for name, values in chosen.items()}
            if self.method.use_rejected:
                sums["kl_rejected"] = _sum(out.divergence, second)
            return Result(sums, {})
        divergence = torch.where(second, scales.get("kl_rejected", 0.0), scales["kl_chosen"])
        supervised = torch.where(second, 0.0, scales["sft"])
        out = self._distill(
            student, given, reduction="sum", ce_weight=supervised, divergence_weight=divergence
        )
        counts = student.batch["counts"]
        metrics = {"sft": _mean_of(out.cross_entropy, scales["sft"], counts[1])}
        if self.method.alpha:
            share = counts[0] * scales["rows"]  # adds up to 1 over a step
            metrics["kl"] = torch.stack([out.divergence.double() / self.method.alpha, share])
        return Result({}, metrics, out.loss)

    def _distill(self, student: Student, given: Mapping[str, Any], **options: Any) -> Any:
        return pk.linear_distill(
            student.head,
            student.labels,
            teacher=given["teacher"],
            kind=self.method.divergence,
            alpha=self.method.divergence_alpha,
            **options,
        )


class ADPATrainer(DistillationTrainer):
    """Supervised on chosen responses; its own responses are led by two teachers' log-ratio.

    The data set has ``prompt``, ``chosen`` and ``responses``, a list of the student's own responses
    (one is enough). The loss is SFT(chosen) - gamma · mean over the tokens of the own responses of
    sum_a student(a) beta log(aligned(a) / reference(a)). ADPA+ is the same with a student that
    :class:`DCKDTrainer` has trained.

    Logs ``sft`` and ``advantage``, the two means.

    Args:
        model: the student.
        args: an :class:`ADPAConfig`.
        aligned: the teacher after preference alignment, a :class:`ModelTeacher`; or the log-ratios
            of both, a :class:`CachedTeacher`.
        reference: the teacher before it; None with offline log-ratios.
        processing_class, train_dataset, eval_dataset, peft_config, callbacks, optimizers: as usual.
    """

    accepts: ClassVar = {"aligned": ("head", "advantage"), "reference": ("head",)}

    def __init__(
        self,
        model: Any,
        args: ADPAConfig,
        *,
        aligned: Teacher,
        reference: Teacher | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(args, ADPAConfig):
            fail_type("args", "an ADPAConfig", args)
        self.method: ADPAConfig = args
        if (reference is None) != (getattr(aligned, "kind", "head") == "advantage"):
            expected = "None with a cache of log-ratios, else the teacher before alignment"
            fail_value("reference", expected, "none" if reference is None else "one")
        teachers = {"aligned": aligned, "reference": reference}
        super().__init__(model, args, teachers=teachers, **options)

    def format(self) -> Format:
        """A chosen response, and the student's own ones."""
        return adpa_format()

    def terms(self) -> dict[str, Term]:
        """Two means over tokens."""
        return {"sft": Term("first"), "advantage": Term("second", -self.method.gamma)}

    def result(
        self, student: Student, given: Mapping[str, Any], scales: Mapping[str, Tensor] | None
    ) -> Result:
        """One pass over all tokens; teachers are computed for the own responses alone."""
        second, counts = student.batch["second"], student.batch["counts"]
        if scales is None:
            out = self._distill(student, given, reduction="none")
            own = _sum(out.advantage, second)
            return Result({"sft": _sum(out.cross_entropy, ~second), "advantage": own}, {})
        supervised = torch.where(second, 0.0, scales["sft"])
        led = torch.where(second, -scales["advantage"], 0.0)
        out = self._distill(
            student, given, reduction="sum", ce_weight=supervised, advantage_weight=led
        )
        metrics = {"sft": _mean_of(out.cross_entropy, scales["sft"], counts[1])}
        if self.method.gamma:
            metrics["advantage"] = _mean_of(out.advantage, -scales["advantage"], counts[2])
        return Result({}, metrics, out.loss)

    def _distill(self, student: Student, given: Mapping[str, Any], **options: Any) -> Any:
        heads = {"aligned": given["aligned"], "reference": given.get("reference")}
        return pk.linear_distill(
            student.head, student.labels, beta=self.method.beta, **heads, **options
        )


def _mean_of(part: Tensor, scale: Tensor, count: Tensor) -> Tensor:
    """Sum and count [2] behind a part of the loss that is ``scale`` times the sum."""
    return torch.stack([part.double() / scale, count])


def _sum(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum()
