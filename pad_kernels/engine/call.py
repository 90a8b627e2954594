"""From checked arguments to an op: flat rows, the gradients wanted, the backend and the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pad_kernels._checks import check_constant, check_tensor, fail_type, fail_value
from pad_kernels._dtypes import accumulate_dtype, gemm_dtype
from pad_kernels._transforms import reject_transforms
from pad_kernels.engine import ops
from pad_kernels.engine.plan import PlanLike, PlanRequest, Shape
from pad_kernels.engine.problem import plan_shape
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import Functional
from pad_kernels.heads import Head


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this device, None when it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Values * weights; a weight of 0 silences an infinite value, yet has its own gradient."""
    silent = (weights == 0) & ~values.isfinite()
    return values.masked_fill(silent, 0.0) * weights


@dataclass
class Call:
    """One use of the row engine.

    Args:
        student: the head that may want gradients.
        teachers: heads that may not.
        names: what the heads are called in messages, the student's first; "" for bare arguments.
        inputs: per-row inputs by name, each [N, k]; ``labels`` is [N, 1].
        ignore_index: label of rows to leave out.
        plan: the public ``plan=`` argument.
    """

    student: Head
    teachers: Sequence[Head] = ()
    inputs: dict[str, Tensor] = field(default_factory=dict)
    ignore_index: int | None = None
    plan: PlanLike = None
    names: Sequence[str] = ("",)

    def __post_init__(self) -> None:
        heads, names = [self.student, *self.teachers], list(self.names)
        device = check_tensor(names[0] + "hidden", self.student.hidden).device
        autocast = autocast_dtype(device)
        self._options = [
            h.checked(n, gemm=autocast, offloaded=j > 0)
            for j, (h, n) in enumerate(zip(heads, names, strict=True))
        ]
        for head, name in zip(self.teachers, names[1:], strict=True):
            self._check_teacher(head, name, device)
        for head, name in zip(heads, names, strict=True):
            self._check_alike(head, name)
        student = self.student.hidden.dtype
        self._mixed = student if autocast is None or student == torch.float64 else autocast
        self._request = PlanRequest.of(self.plan)

    @property
    def vocab(self) -> int:
        """Real entries, as many of every head."""
        return self.student.vocab

    def _check_alike(self, head: Head, name: str) -> None:
        """Raise unless a head is of the student's precision and vocabulary, and a plain one."""
        double = self.student.hidden.dtype == torch.float64
        for field_name, x in (("hidden", head.hidden), ("weight", head.weight)):
            if (x.dtype == torch.float64) != double:
                expected = "float64 like the other inputs, or none of them in it"
                fail_type(name + field_name, expected, x.dtype)
        for field_name in ("hidden", "weight", "bias"):
            # The ops would take a tensor with a tangent for a constant.
            reject_transforms(name + field_name, getattr(head, field_name))
        if head.vocab != self.vocab:
            expected = f"{self.vocab} like the student's (cut the longer with vocab_size)"
            fail_value(name + "vocab_size", expected, head.vocab)

    def _check_teacher(self, head: Head, name: str, device: torch.device) -> None:
        """Raise unless a teacher's rows match the student's and nobody wants its gradient."""
        leading, own = tuple(self.student.hidden.shape[:-1]), tuple(head.hidden.shape[:-1])
        if own != leading:
            fail_value(name + "hidden", f"the student's leading shape {leading}", f"shape {own}")
        if head.hidden.device != device:
            fail_value(name + "hidden", f"a tensor on {device}", f"one on {head.hidden.device}")
        for field_name in ("hidden", "weight", "bias"):
            if (tensor := getattr(head, field_name)) is not None:
                check_constant(name + field_name, tensor)

    @property
    def backend(self) -> str:
        """The one that the caller named; empty for any."""
        return self._request.backend or ""

    def gemm(self, device: str) -> torch.dtype:
        """Dtype of the products' operands on a type of device."""
        return gemm_dtype(self._mixed, device)

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of the values."""
        return accumulate_dtype(self.student.hidden.dtype)

    def recipe(
        self, functionals: Sequence[Functional], *, argmax: bool = False, topk: int = 0
    ) -> Recipe:
        """The static half of the call."""
        student, grad = self.student, torch.is_grad_enabled()
        bias = student.bias
        return Recipe(
            functionals=tuple(functionals),
            heads=tuple(self._options),
            biased=tuple(h.bias is not None for h in (student, *self.teachers)),
            input_names=tuple(self.inputs),
            vocab=self.vocab,
            ignore_index=None if self.ignore_index is None else int(self.ignore_index),
            gemm=self.gemm(student.hidden.device.type),
            needs=(
                grad and student.hidden.requires_grad,
                grad and student.weight.requires_grad,
                grad and bias is not None and bias.requires_grad,
            ),
            argmax=argmax,
            request=self._request,
            topk=topk,
        )

    def shape(self, recipe: Recipe, *, reduced: bool) -> Shape:
        """What the planner would see."""
        heads = [self.student, *self.teachers]
        weights = [h.weight for h in heads]
        return plan_shape(recipe, [h.rows for h in heads], weights, reduced=reduced)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor], list[Tensor]]:
        """The ops' tensors in their order, which is that of :class:`Arguments`."""
        teachers: list[Tensor] = []
        for head in self.teachers:
            teachers += [head.rows, head.weight]
            teachers += [] if head.bias is None else [head.bias]
        student = self.student
        return student.rows, student.weight, student.bias, list(self.inputs.values()), teachers

    def refuse_early(self) -> None:
        """Raise if an early plan is asked for where the output is not one number."""
        self._request.refuse_early()

    def tokens(
        self, functionals: Sequence[Functional], *, argmax: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Per-token values [outputs, N], differentiable, and greedy tokens [N] if wanted."""
        recipe = self.recipe(functionals, argmax=argmax)
        self.refuse_early()
        values, greedy, _, _ = ops.token_outputs(*self.tensors(), recipe.dumps())
        return values, greedy

    def total(
        self, functionals: Sequence[Functional], coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum(coefficients * values), one differentiable number; coefficients [outputs, N].

        Also its summands, one per output, without gradient.
        """
        reject_transforms("token_weights", coefficients)
        if coefficients.requires_grad and torch.is_grad_enabled():
            values, _ = self.tokens(functionals)
            summands = weighted(values, coefficients).sum(1)
            return summands.sum(), summands.detach()
        recipe = self.recipe(functionals)
        found = ops.weighted_sum(*self.tensors(), coefficients, recipe.dumps())
        return found[0], found[1]
