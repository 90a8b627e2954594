"""Liger's generalised Jensen–Shannon divergence between two LM heads, from the public API."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import check_number, fail_value
from pad_kernels.compat._arguments import check_head, detached


def divergence_kind(name: str, beta: float) -> tuple[str, float | None]:
    """Kind and alpha of :func:`pad_kernels.linear_divergence` for Liger's ``beta``.

    With m = β·teacher + (1 − β)·student the value is β·KL(teacher‖m) + (1 − β)·KL(student‖m), so
    that alpha = β; the end points are KL(teacher‖student) at 0 and KL(student‖teacher) at 1.
    """
    beta = check_number(name, beta, at_least=0.0, at_most=1.0)
    if beta == 0.0:
        return "forward_kl", None
    if beta == 1.0:
        return "reverse_kl", None
    return "jsd", beta


@dataclass(frozen=True)
class HeadPair:
    """Student and teacher heads over the same flat rows, hidden states [N, H] each.

    What a larger teacher vocabulary has beyond the student's is padding: probability 0.
    """

    student_input: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_input: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        fields = dict(vars(self))
        check_number("temperature", fields.pop("temperature"), above=0.0)
        names = list(fields)
        for head in (names[:3], names[3:]):
            check_head(ndim=2, **{name: fields[name] for name in head})
        rows, entries = self.student_input.shape[0], self.student_weight.shape[0]
        if self.teacher_input.shape[0] != rows:
            shape = tuple(self.teacher_input.shape)
            fail_value("teacher_input", f"{rows} rows like student_input", f"shape {shape}")
        if self.teacher_weight.shape[0] < entries:
            shape = tuple(self.teacher_weight.shape)
            fail_value("teacher_weight", f"at least the student's {entries} rows", f"shape {shape}")

    @property
    def student(self) -> pk.Head:
        """The student at the temperature."""
        return pk.Head(
            self.student_input,
            self.student_weight,
            self.student_bias,
            temperature=self.temperature,
        )

    @property
    def teacher(self) -> pk.Head:
        """The teacher at the temperature, without gradient."""
        return pk.Head(
            self.teacher_input.detach(),
            self.teacher_weight.detach(),
            detached(self.teacher_bias),
            temperature=self.temperature,
            vocab_size=self.student_weight.shape[0],
        )
