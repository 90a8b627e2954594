"""The tensors that an op was called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pad_kernels.engine.recipe import Recipe


@dataclass(frozen=True)
class Arguments:
    """An op's tensors; its recipe says what they are.

    Args:
        hidden: [N, H], the student's.
        weight: [V, H], the student's.
        bias: [V], the student's, if it has one.
        row_inputs: [N, k] each.
        teachers: hidden states, weight and, if there is one, bias of each, one after the other.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    row_inputs: Sequence[Tensor]
    teachers: Sequence[Tensor]

    def inputs(self, recipe: Recipe) -> dict[str, Tensor]:
        """Per-row inputs by name."""
        return dict(zip(recipe.input_names, self.row_inputs, strict=True))

    def streams(self, recipe: Recipe) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(hidden, weight, bias) of the student and of each teacher."""
        rest = list(self.teachers)
        teachers = [
            (rest.pop(0), rest.pop(0), rest.pop(0) if biased else None)
            for biased in recipe.biased[1:]
        ]
        return [(self.hidden, self.weight, self.bias), *teachers]
