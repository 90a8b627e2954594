"""Measured block sizes through the engine, interpreted.

What is tried runs twice, as a clock would have it: whatever it writes in the place of something
that matters shows in the results.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import pytest
import torch
from filter_cases import Peaked
from torch import Tensor

import pad_kernels as pk
from pad_kernels.backends.triton import autotune, configs, tilings
from pad_kernels.engine.workspace import account

#: What a device that is interpreted tries. ``make check-kernels`` lets each in turn be the fastest.
TRIALS = (tilings.TRIALS, tilings.LIVE_TRIALS, configs.TRIALS)
LONGEST = max(len(trials) for known in TRIALS for trials in known.values())
EVERYTHING = os.environ.get("PAD_KERNELS_CUBINS") == "all"
WINNERS = range(1, LONGEST + 1) if EVERYTHING else [1]

Results = tuple[Tensor, ...]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[autotune.Choices]:
    """An empty file; NaN in all memory; scratch for some rows and no more."""
    found = autotune.Choices(tmp_path / "kept.json")
    for known in TRIALS:
        for key, trials in known.items():
            monkeypatch.setitem(known, key, trials if EVERYTHING else trials[-1:])
    monkeypatch.setattr(autotune, "choices", lambda device: found)
    monkeypatch.setattr(autotune, "SCRATCH", 20_000)
    torch.manual_seed(0)
    account.poison = True
    yield found
    account.poison = False


def let_win(monkeypatch: pytest.MonkeyPatch, winner: int) -> None:
    """Of every kernel's block sizes the one of that place is the fastest, or the last."""
    original, tried = autotune.choose, [0]

    def choose(*arguments: Any) -> Any:
        tried[0] = 0
        return original(*arguments)

    def clock(trial: Callable[[], None], return_mode: str) -> float:
        trial()
        trial()
        tried[0] += 1
        return float(abs(tried[0] - 1 - winner))

    monkeypatch.setattr(autotune, "choose", choose)
    monkeypatch.setattr(autotune, "do_bench", clock)


def fused(request: pk.PlanRequest) -> Results:
    """Statistics and gradient of products."""
    hidden, weight = torch.randn(9, 32).bfloat16(), torch.randn(70, 32).bfloat16()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    value = pk.linear_logprob(*leaves, torch.randint(70, (9,)), plan=request)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def over_logits(request: pk.PlanRequest) -> Results:
    """Row passes: statistics of two streams, a second sweep, a gradient in place."""
    teacher = pk.Head(torch.randn(6, 24), torch.randn(1100, 24))
    student = torch.randn(6, 24).requires_grad_(), torch.randn(1100, 24).requires_grad_()
    loss = pk.linear_distill(
        pk.Head(*student),
        torch.randint(1100, (6,)),
        teacher=teacher,
        kind="jsd",
        ce_weight=1.0,
        divergence_weight=1.0,
        plan=request,
    ).loss
    assert loss is not None
    return loss.detach(), *torch.autograd.grad(loss, student)


def filtered(request: pk.PlanRequest) -> Results:
    """Magnitudes of the filter's tiles, and products over those that are alive."""
    x = Peaked(torch.bfloat16, rows=60, vocab=500)
    leaves = x.hidden.requires_grad_(), x.weight.requires_grad_()
    loss = pk.linear_cross_entropy(
        *leaves, x.labels, bias=x.bias.clamp(min=-30), reduction="sum", plan=request
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves)


LATE = pk.PlanRequest("late", "triton", vocab_block=384)
FILTERED = pk.PlanRequest("late", "triton", filter=1e-3, vocab_block=256)
EARLY = pk.PlanRequest("early", "triton", filter=1e-3, token_block=60)
#: What runs, and which kernels' block sizes are then kept.
CASES: list[tuple[Callable[[pk.PlanRequest], Results], pk.PlanRequest, set[str]]] = [
    (fused, LATE, {"statistics", "gradient"}),
    (
        over_logits,
        pk.PlanRequest("early", "triton"),
        {"row statistics", "row outcomes", "row gradient"},
    ),
    (filtered, FILTERED, {"statistics", "filtered gradient", "live product"}),
    (filtered, EARLY, {"row statistics", "row gradient", "live product"}),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("winner", WINNERS)
@pytest.mark.parametrize(("compute", "request_", "kernels"), CASES)
def test_trials_change_nothing_but_last_digits(
    monkeypatch: pytest.MonkeyPatch,
    kept: autotune.Choices,
    plans: list[pk.Plan],
    compute: Callable[[pk.PlanRequest], Results],
    request_: pk.PlanRequest,
    kernels: set[str],
    winner: int,
) -> None:
    let_win(monkeypatch, winner)
    found = []
    account.reset()
    for asked in ("0", "1"):
        monkeypatch.setenv("PAD_KERNELS_AUTOTUNE", asked)
        torch.manual_seed(1)
        found.append(compute(request_))
    assert {key.split("/")[0] for key in kept.found} == kernels
    # A line of tiles is more than so little scratch has room for, and lists come on top.
    most = max(autotune.SCRATCH, 128 * 32 * 4) + (16 << 10)
    assert account.high_water <= plans[0].workspace_bytes + most
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any()
        rounding = 2**-7 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=rounding, atol=1e-3 * float(b.abs().max()))
