"""Gradients that the filter leaves single tiles out of, beside float64 ones without those tiles.

For the interpreter and for devices: half precision on a backend that multiplies single tiles.
"""

from __future__ import annotations

import torch
from oracles import GRADIENTS
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.filter import FILTER_TILE


def tiles_of(x: Tensor, tile: int) -> Tensor:
    """Largest magnitudes of the tiles of a matrix, [row tiles, column tiles]."""
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -cols % tile, 0, -rows % tile))
    return padded.view(-(-rows // tile), tile, -(-cols // tile), tile).amax((1, 3))


def spread(mask: Tensor, tile: int, shape: torch.Size) -> Tensor:
    """A flag for each tile as one for each entry."""
    wide = mask.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    return wide[: shape[0], : shape[1]]


class Peaked:
    """Rows that believe in some entries of a shuffled vocabulary; some have no chance at all."""

    def __init__(self, dtype: torch.dtype, rows: int = 150, vocab: int = 700, width: int = 32):
        prior = torch.full((vocab,), -11.0)
        prior[torch.randperm(vocab)[:90]] = 3.0
        self.hidden = torch.randn(rows, width).to(dtype)
        self.weight = (torch.randn(vocab, width) * 0.1).to(dtype)
        self.bias = torch.where(torch.rand(vocab) < 0.05, -torch.inf, prior).to(dtype)
        self.bias[:3] = prior[:3]
        likely = (self.bias == 3.0).nonzero()[:, 0]
        self.labels = likely[torch.randint(likely.shape[0], (rows,))]
        self.labels[:2] = torch.tensor([0, 2])  # one that nobody expects makes its tile alive
        self.labels[::11] = -100

    def gradient(self) -> tuple[Tensor, Tensor]:
        """dL/dz of the live rows [live, V] of the summed loss, and which rows they are."""
        live = (self.labels >= 0).nonzero()[:, 0]
        z = self.hidden[live].double() @ self.weight.double().t() + self.bias.double()
        dz = z.softmax(1)
        dz[torch.arange(live.shape[0]), self.labels[live]] -= 1
        return dz, live

    def order(self) -> Tensor:
        """As the library's: by the mean logit of the live rows."""
        _, live = self.gradient()
        mean = (self.weight.double() @ self.hidden[live].double().mean(0)) + self.bias
        return mean.argsort(descending=True)


def check(x: Peaked, level: float, request: pk.PlanRequest, **options: object) -> Tensor:
    """Gradients against float64 ones with the same entries left out; which those are."""
    leaves = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    bias = x.bias.clone().requires_grad_(bool(options.get("biased")))
    loss = pk.linear_cross_entropy(*leaves, x.labels, bias=bias, reduction="sum", plan=request)
    loss.backward()
    dz, live = x.gradient()
    order = torch.arange(x.weight.shape[0]) if options.get("natural") else x.order()
    step = request.token_block or live.shape[0]
    kept = torch.zeros_like(dz)
    for start in range(0, live.shape[0], step):
        block = dz[start : start + step][:, order]
        alive = spread(tiles_of(block, FILTER_TILE) >= level, FILTER_TILE, block.shape)
        kept[start : start + step, order] = torch.where(alive, block, 0)
    eps = torch.finfo(x.hidden.dtype).eps
    exact = kept @ x.weight.double(), kept.t() @ x.hidden[live].double()
    assert not leaves[0].grad[x.labels < 0].any()
    for mine, ref in zip((leaves[0].grad[live], leaves[1].grad), exact, strict=True):
        assert (mine.double() - ref).norm() <= GRADIENTS * eps * ref.norm()
    if options.get("biased"):
        torch.testing.assert_close(bias.grad.double(), dz.sum(0), rtol=4 * eps, atol=4 * eps)
    assert (dz - kept).abs().max() < level
    return kept == 0


def check_schedule(schedule: str, backend: str, biased: bool, dtype: torch.dtype) -> None:
    """Some tiles dead, -inf and an unlikely label among them; two blocks or chunks."""
    x, level = Peaked(dtype), 1e-3
    blocks = {"token_block": 75} if schedule == "early" else {"vocab_block": 384}
    request = pk.PlanRequest(schedule, backend, filter=level, **blocks)
    left_out = check(x, level, request, biased=biased)
    assert 0.3 < left_out.double().mean() < 0.9
