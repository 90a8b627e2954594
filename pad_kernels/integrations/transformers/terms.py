"""The parts of a loss, and what a method sees of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import pad_kernels as pk
from pad_kernels.integrations.transformers.teachers import head_logprob


@dataclass(frozen=True)
class Term:
    """A part of a loss: ``coefficient`` times a mean over what ``per`` (see COUNTS) counts."""

    per: str
    coefficient: float = 1.0


@dataclass(frozen=True)
class Student:
    """The student's head over a batch's N response tokens, inside its forward."""

    head: pk.Head
    batch: Mapping[str, Any]

    @property
    def labels(self) -> Tensor:
        """The tokens [N]."""
        return self.batch["targets"]

    def logprob(self) -> Tensor:
        """Log-prob [N] of each token, differentiable."""
        return head_logprob(self.head, self.labels)

    def by_response(self, logprob: Tensor, normalize: str) -> Tensor:
        """Sums ("none") or means ("length") over each response [rows, n]."""
        return by_response(logprob, self.batch, normalize)


def by_response(logprob: Tensor, batch: Mapping[str, Any], normalize: str) -> Tensor:
    """Sums ("none") or means ("length") of log-probs [N] over each response, [rows, n]."""
    rewards = pk.sequence_reward(logprob, cu_seqlens=batch["offsets"], normalize=normalize)
    return rewards.view(batch["valid"].shape) if "valid" in batch else rewards


@dataclass
class Result:
    """What a method makes of a batch.

    Attributes:
        sums: for each term of the loss, its sum [] over this batch.
        metrics: pairs [2] of a sum and a count.
        loss: the loss itself where the method has computed it in one piece, all denominators in.
    """

    sums: dict[str, Tensor]
    metrics: dict[str, Tensor]
    loss: Tensor | None = None
