"""The z-loss that goes with Cut Cross-Entropy's normalisers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pad_kernels.compat.cut_cross_entropy import linear_cross_entropy
from pad_kernels.compat.cut_cross_entropy.utils import compute_z_loss, softcapping

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shift", [False, True, 2])
def test_from_the_loss(shift: int) -> None:
    hidden, weight = torch.randn(3, 6, 8), torch.randn(37, 8)
    targets = torch.randint(37, (3, 6))
    targets.view(-1)[::4] = -100
    _, lse = linear_cross_entropy(hidden, weight, targets, shift=shift, return_lse=True)
    exact = torch.logsumexp(hidden.double() @ weight.double().T, -1)[:, : 6 - int(shift)]
    counted = targets[:, int(shift) :] != -100
    squares = (exact**2).where(counted, 0.0)
    expected = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / counted.sum()}
    for reduction, value in expected.items():
        found = compute_z_loss(lse, targets, shift, -100, reduction)
        torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compute_z_loss(lse), squares.mean().float(), rtol=1e-5, atol=1e-5)
    assert compute_z_loss(lse.bfloat16()).dtype == torch.float32


def test_ignored_rows_are_left_out() -> None:
    lse = torch.tensor([3.0, math.inf], requires_grad=True)
    z_loss = compute_z_loss(lse, torch.tensor([4, 7]), ignore_index=7)
    assert z_loss == 9
    assert torch.equal(torch.autograd.grad(z_loss, lse)[0], torch.tensor([6.0, 0.0]))
    assert compute_z_loss(lse, torch.tensor([7, 7]), ignore_index=7) == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lse": [1.0]}, TypeError, "lse"),
        ({"targets": torch.zeros(2)}, TypeError, "targets"),
        ({"targets": torch.tensor([1, 2, 3])}, ValueError, "targets"),
        ({"shift": 2}, ValueError, "shift"),
        ({"ignore_index": None}, TypeError, "ignore_index"),
        ({"reduction": "max"}, ValueError, "reduction"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type, words: str) -> None:
    good = {"lse": torch.tensor([3.0, 4.0]), "targets": torch.tensor([4, 7])}
    with pytest.raises(error, match=words):
        compute_z_loss(**{**good, **change})


def test_soft_cap() -> None:
    x = torch.tensor([-1e9, -2.0, 0.0, 1e9])
    torch.testing.assert_close(softcapping(x, 5.0), 5 * (x / 5).tanh())
