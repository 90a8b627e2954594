"""What an op is to compute: plain data that travels through ``torch.library`` as a string."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pad_kernels.engine.plan import PlanRequest
from pad_kernels.functionals.base import Functional, from_data, parameters, to_data
from pad_kernels.functionals.statistics import Argmax, Largest, Statistic
from pad_kernels.heads import HeadOptions


def _literal(data: Any) -> str:
    """``repr`` of plain data, in steps that torch.compile can follow."""
    if isinstance(data, dict):
        return "{" + "".join([f"{key!r}: {_literal(x)}, " for key, x in data.items()]) + "}"
    if isinstance(data, list | tuple):
        return "[" + "".join([f"{_literal(x)}, " for x in data]) + "]"
    return f"{data!r}"


@dataclass(frozen=True)
class Recipe:
    """The static half of a problem; the tensors are the other.

    Args:
        functionals: what to compute, in the order of the outputs.
        heads: element-wise head options, one per stream, the student's first.
        biased: whether each stream has a bias among the op's tensors.
        input_names: names of the op's per-row inputs.
        vocab: effective vocabulary size, equal for all streams.
        ignore_index: label value of rows that are left out; None when there are no labels.
        gemm: dtype of the matrix products' operands.
        needs: which of (hidden, weight, bias) want a gradient.
        argmax: whether the greedy token is wanted too.
        topk: how many of the largest logits are wanted too.
        request: what the caller asked of the plan.
    """

    functionals: tuple[Functional, ...]
    heads: tuple[HeadOptions, ...]
    biased: tuple[bool, ...]
    input_names: tuple[str, ...]
    vocab: int
    ignore_index: int | None
    gemm: torch.dtype
    needs: tuple[bool, bool, bool]
    argmax: bool
    request: PlanRequest
    topk: int = 0

    def dumps(self) -> str:
        """As a Python literal."""
        plain = ("biased", "input_names", "vocab", "ignore_index", "needs", "argmax", "topk")
        data: dict[str, Any] = {
            **{name: getattr(self, name) for name in plain},
            "functionals": [to_data(f) for f in self.functionals],
            "heads": [parameters(h) for h in self.heads],
            "gemm": str(self.gemm).removeprefix("torch."),
            "request": parameters(self.request),
        }
        return _literal(data)

    @staticmethod
    @functools.lru_cache(maxsize=512)
    def loads(text: str) -> Recipe:
        """From what :meth:`dumps` wrote."""
        data = ast.literal_eval(text)
        return Recipe(
            functionals=tuple(from_data(f) for f in data["functionals"]),
            heads=tuple(HeadOptions(**h) for h in data["heads"]),
            biased=tuple(data["biased"]),
            input_names=tuple(data["input_names"]),
            vocab=data["vocab"],
            ignore_index=data["ignore_index"],
            gemm=getattr(torch, data["gemm"]),
            needs=tuple(data["needs"]),
            argmax=data["argmax"],
            request=PlanRequest(**data["request"]),
            topk=data["topk"],
        )

    def on(self, backend: str) -> Recipe:
        """The same recipe with its backend resolved."""
        return replace(self, request=replace(self.request, backend=backend))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Every statistic of every functional once, in a fixed order."""
        return _statistics(self.functionals)

    @property
    def sweeps(self) -> int:
        """1, or 2 when a statistic needs the normalisers first."""
        return max((s.sweep for s in self.statistics), default=1)

    def measured(self, functionals: tuple[int, ...] | None = None) -> tuple[Statistic, ...]:
        """The statistics to compute: of all functionals or those at the places that are given.

        Greedy and top-k tokens are among them if they are wanted.
        """
        greedy = (Argmax(),) if self.argmax else ()
        largest = (Largest(self.topk),) if self.topk else ()
        if functionals is None:
            return (*self.statistics, *greedy, *largest)
        return (*_statistics(tuple(self.functionals[i] for i in functionals)), *greedy, *largest)

    def outputs(self, inputs: Mapping[str, Tensor]) -> int:
        """Number of values per row."""
        return sum(f.outputs(inputs) for f in self.functionals)


@functools.lru_cache(maxsize=512)
def _statistics(functionals: tuple[Functional, ...]) -> tuple[Statistic, ...]:
    found: dict[Statistic, None] = {}
    for functional in functionals:
        found.update(dict.fromkeys(functional.statistics))
    return tuple(found)
