"""Offline teachers: what was kept of a distribution, k tokens a position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels._checks import FLOATS, IDS, check_choice, check_constant, check_tensor, fail_value
from pad_kernels._transforms import reject_transforms


def _checked(
    prefix: str, ids: Tensor, name: str, values: Tensor, leading: torch.Size, vocab: int
) -> None:
    """Check ids and values [..., k] against the student's leading shape and vocabulary."""
    check_tensor(prefix + "ids", ids, dtypes=IDS)
    if ids.dim() == 0 or ids.shape[:-1] != leading or ids.shape[-1] == 0:
        expected = f"shape [{', '.join([*map(str, leading), 'k'])}] with k >= 1"
        fail_value(prefix + "ids", expected, f"shape {tuple(ids.shape)}")
    check_tensor(prefix + name, values, dtypes=FLOATS, shape=tuple(ids.shape), device=ids.device)
    reject_transforms(prefix + name, values)
    check_constant(prefix + name, values)
    if ids.shape[-1] > vocab:
        expected = f"at most {vocab} ids a row, the vocabulary size"
        fail_value(prefix + "ids", expected, ids.shape[-1])


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher that kept the log-probs of k tokens a position, as ``linear_topk`` gives them.

    Args:
        ids: token ids, int64 or int32 [..., k], distinct in each row, in any order.
        logprobs: their full-vocabulary log-probabilities [..., k], floating point.
        tail: "bucket": the remaining probability is one more outcome, for teacher and student;
            "renormalize": both are renormalised over the k tokens, and only those k rows of the
            student's weight are read and get a gradient.

    Example:
        >>> import torch, pad_kernels as pk
        >>> found = pk.linear_topk(torch.randn(5, 8), torch.randn(11, 8), 3)
        >>> teacher = pk.TopKTeacher(*found)
        >>> student = pk.Head(torch.randn(5, 4), torch.randn(11, 4))
        >>> pk.linear_divergence(student, teacher).shape
        torch.Size([])
    """

    ids: Tensor
    logprobs: Tensor
    tail: str = "bucket"

    def checked(self, prefix: str, leading: torch.Size, vocab: int) -> None:
        """Check shapes, dtypes and the choice of tail; values are checked inside the op."""
        check_choice(prefix + "tail", self.tail, ("bucket", "renormalize"))
        _checked(prefix, self.ids, "logprobs", self.logprobs, leading, vocab)


@dataclass(frozen=True)
class TopKAdvantage:
    """Offline log-ratios log(aligned / reference) of k tokens a position; 0 for all others.

    Args:
        ids: token ids, int64 or int32 [..., k], distinct in each row, in any order.
        values: log-ratios [..., k], floating point, finite.

    Example:
        >>> import torch, pad_kernels as pk
        >>> kept = pk.TopKAdvantage(torch.tensor([[1, 4]]), torch.tensor([[0.7, -0.2]]))
        >>> student = pk.Head(torch.zeros(1, 4), torch.zeros(10, 4))
        >>> pk.linear_expected_advantage(student, kept)
        tensor(0.0500)
    """

    ids: Tensor
    values: Tensor

    def checked(self, prefix: str, leading: torch.Size, vocab: int) -> None:
        """Check shapes and dtypes; values are checked inside the op."""
        _checked(prefix, self.ids, "values", self.values, leading, vocab)
