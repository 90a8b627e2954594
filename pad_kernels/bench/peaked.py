"""Peaked logits as of a trained model: what the gradient filter is for, and what it leaves.

Every row believes in the same Zipf-distributed vocabulary, in its own way: a logit is the token's
(log of its rank, times an exponent) plus a row's own (normal, ``context`` wide). The exponent is
the one that gives rows an entropy of 2 nats. Tokens lie in no order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pad_kernels.bench.device_rates import seconds

#: Mean entropy of a row, nats; and the filter of the benchmark, as a share of a token's weight.
ENTROPY, LEVEL = 2.0, 2.0**-12
#: Rows whose logits exist at a time.
ROWS = 256
Figures = dict[str, Any]


@dataclass
class Peaked:
    """Tensors of a cross-entropy whose logits are peaked."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,), drawn from the rows' own softmax

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their float32 logits, their labels), a block at a time."""
        for start in range(0, self.hidden.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            yield rows, (self.hidden[rows] @ self.weight.t()).float(), self.labels[rows]


def exponent(vocab: int, context: float) -> float:
    """Of Zipf's law, so that rows have ``ENTROPY``; found by bisection on 128 rows."""
    generator = torch.Generator().manual_seed(1)
    noise = context * torch.randn(128, vocab, generator=generator)
    ranks = torch.arange(1, vocab + 1).log()
    low, high = 0.0, 16.0
    for _ in range(12):
        middle = (low + high) / 2
        logprob = (noise - middle * ranks).log_softmax(1)
        spread = float(-(logprob.exp() * logprob).sum(1).mean())
        low, high = (middle, high) if spread > ENTROPY else (low, middle)
    return (low + high) / 2


def make_peaked(
    shape: tuple[int, int, int], context: float, dtype: torch.dtype, device: torch.device
) -> Peaked:
    """Tensors at (N, H, V), the same every time on the same type of device.

    Args:
        context: standard deviation of what a row's own logits add, in nats.
    """
    tokens, width, vocab = shape
    generator = torch.Generator(device).manual_seed(1234)
    drawn: dict[str, Any] = {"generator": generator, "device": device}
    shared = torch.randint(0, 2, (width,), **drawn).mul_(2).sub_(1).float()

    def own(count: int) -> Tensor:
        """Normal rows, orthogonal to what is shared."""
        found = torch.randn(count, width, **drawn)
        return found.addr_(found @ shared, shared, alpha=-1 / width)

    prior = -exponent(vocab, context) * torch.arange(1, vocab + 1, device=device).log()
    prior = prior[torch.randperm(vocab, **drawn)]
    hidden = own(tokens).add_(shared).to(dtype)
    weight = own(vocab).mul_(context / width**0.5).addr_(prior, shared, alpha=1 / width).to(dtype)
    found = Peaked(hidden, weight, torch.zeros(tokens, dtype=torch.int64, device=device))
    for rows, logits, _ in found.blocks():
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        found.labels[rows] = (logits - noise).argmax(1)
    return found


def live_shares(
    x: Peaked, level: float, tiles: Sequence[tuple[int, int]], *, ordered: bool
) -> list[float]:
    """Shares of the tiles of the summed cross-entropy's dL/dz whose largest entry reaches a level.

    Args:
        tiles: their sizes: rows, a divisor of ``ROWS``, and columns.
        ordered: whether the vocabulary is by mean logit.
    """
    mean = x.hidden.float().mean(0).to(x.weight.dtype)
    order = (x.weight @ mean).argsort(descending=True, stable=True)
    counts = [[0, 0] for _ in tiles]
    for _, logits, labels in x.blocks():
        dz = logits.softmax(1)
        dz.scatter_add_(1, labels[:, None], torch.full_like(dz[:, :1], -1.0))
        reached = dz.abs_() >= level
        if ordered:
            reached = reached.index_select(1, order)
        for (height, width), count in zip(tiles, counts, strict=True):
            edges = (0, -reached.shape[1] % width, 0, -reached.shape[0] % height)
            padded = torch.nn.functional.pad(reached, edges)
            live = padded.view(-1, height, padded.shape[1] // width, width).any(3).any(1)
            count[0] += int(live.sum())
            count[1] += live.numel()
    return [live / total for live, total in counts]


def benchmark(shape: tuple[int, int, int], context: float, device: torch.device) -> Figures:
    """Milliseconds of cross-entropy, forward and backward, with the filter and without; its error.

    ``error`` is the largest entry of a gradient's error over what the filter allows it, rounding
    included.
    """
    import pad_kernels as pk

    x = make_peaked(shape, context, torch.bfloat16, device)
    calls = 5 if device.type == "cuda" else 1
    leaves = x.hidden.requires_grad_(), x.weight.requires_grad_()
    backend = "triton" if device.type == "cuda" else "torch_blocked"

    def step(request: pk.PlanRequest) -> Callable[[], list[Tensor]]:
        def action() -> list[Tensor]:
            loss = pk.linear_cross_entropy(
                x.hidden, x.weight, x.labels, reduction="sum", plan=request
            )
            return list(torch.autograd.grad(loss, leaves))

        return action

    plain = {"auto": pk.PlanRequest(), "early": pk.PlanRequest("early", backend)}
    filtered = {name: pk.PlanRequest(name, backend, filter=LEVEL) for name in ("early", "late")}
    found: Figures = {"unfiltered_ms": {}, "filtered_ms": {}, "error": {}}
    for key, requests in (("unfiltered_ms", plain), ("filtered_ms", filtered)):
        for name, request in requests.items():
            found[key][name] = 1e3 * seconds(step(request), device, calls)
    exact = step(plain["early"])()
    # A row's error is at most level * sum over the vocabulary of |W|; a weight row's of |h|.
    allowed = [LEVEL * t.detach().float().abs().sum(0) for t in (x.weight, x.hidden)]
    for name, request in filtered.items():
        triples = zip(step(request)(), exact, allowed, strict=True)
        found["error"][name] = max(
            float(((a - b).float().abs() / most).max()) for a, b, most in triples
        )
    best = [min(found[key].values()) for key in ("unfiltered_ms", "filtered_ms")]
    with torch.no_grad():
        shares = {o: live_shares(x, LEVEL, [(128, 128)], ordered=o)[0] for o in (False, True)}
    return found | {
        "speedup": best[0] / best[1],
        "live": shares[True],
        "live_unordered": shares[False],
    }
