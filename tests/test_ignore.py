"""Rows that do not count cost nothing: what is multiplied is counted, not timed."""

from __future__ import annotations

import pytest
import torch
from engine_probe import Probe, Watch
from torch import Tensor

import pad_kernels as pk

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 200, 8, 500
LIVE = 40


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of which 80 % of the rows are ignored."""
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,))
    labels[torch.randperm(N)[LIVE:]] = -100
    return hidden, weight, labels


ROUTES = [
    ("cross_entropy", "early", 6),
    ("cross_entropy", "late", 8),
    ("cross_entropy", "kept", 6),
    ("logprob", "late", 8),
    ("logprob", "kept", 6),
    ("token_stats", "late", 8),
]
OPS = {
    "cross_entropy": pk.linear_cross_entropy,
    "logprob": pk.linear_logprob,
    "token_stats": pk.linear_token_stats,
}


def products(
    monkeypatch: pytest.MonkeyPatch, op: str, labels: Tensor, plan: str, **options: object
) -> tuple[int, tuple[Tensor, ...]]:
    """Flops of forward and backward, and the gradients."""
    hidden, weight, _ = make()
    probe = Probe.install(monkeypatch)
    with Watch() as watch:
        OPS[op](hidden, weight, labels, plan=plan, **options)
        shape = probe.outputs[0].shape
        gradients = probe.backward(torch.ones(shape))
    return watch.flops, gradients


@pytest.mark.parametrize(("op", "schedule", "units"), ROUTES)
@pytest.mark.parametrize("backend", ["auto", "torch_blocked"])
def test_ignored_rows_are_not_multiplied(
    monkeypatch: pytest.MonkeyPatch, op: str, schedule: str, units: int, backend: str
) -> None:
    labels = make()[2]
    plan = schedule if backend == "auto" else f"{schedule}:{backend}"
    flops, gradients = products(monkeypatch, op, labels, plan)
    assert flops == units * LIVE * H * V
    assert (gradients[0][labels == -100] == 0).all()
    assert (gradients[0][labels != -100] != 0).any(1).all()


@pytest.mark.parametrize(("op", "schedule", "units"), ROUTES)
def test_nothing_is_multiplied_when_all_is_ignored(
    monkeypatch: pytest.MonkeyPatch, op: str, schedule: str, units: int
) -> None:
    flops, gradients = products(monkeypatch, op, torch.full((N,), -100), schedule)
    assert flops == 0
    assert all((g == 0).all() for g in gradients[:2])


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_rows_without_weight_are_not_multiplied(
    monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    labels = torch.randint(V, (N,))
    weights = torch.rand(N) + 0.5
    weights[torch.randperm(N)[LIVE:]] = 0.0
    flops, gradients = products(
        monkeypatch, "cross_entropy", labels, schedule, token_weights=weights
    )
    units = 6 if schedule == "early" else 8
    assert flops == units * LIVE * H * V
    assert (gradients[0][weights == 0] == 0).all()


def test_the_last_position_of_each_sequence_is_not_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boundaries = torch.tensor([0, 50, 51, 130, N])
    labels = torch.randint(V, (N,))
    flops, _ = products(monkeypatch, "logprob", labels, "late", shift=True, cu_seqlens=boundaries)
    assert flops == 8 * (N - 4) * H * V


def test_what_ignored_rows_hold_does_not_matter() -> None:
    hidden, weight, labels = make()
    clean = pk.linear_cross_entropy(hidden, weight, labels)
    clean.backward()
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = torch.nan
    poisoned.requires_grad_()
    expected, weight.grad = weight.grad, None
    for plan in ("early", "late", "kept", "early:torch_blocked"):
        loss = pk.linear_cross_entropy(poisoned, weight, labels, plan=plan)
        poisoned.grad, weight.grad = None, None
        loss.backward()
        assert torch.allclose(loss, clean)
        assert torch.allclose(poisoned.grad, hidden.grad, atol=1e-7)
        assert torch.allclose(weight.grad, expected, atol=1e-6)


@pytest.mark.parametrize("plan", ["early", "late"])
@pytest.mark.parametrize("normalizer", [None, torch.tensor(0), torch.tensor(0.0), 1.0])
def test_a_mean_over_no_tokens_is_zero(plan: str, normalizer: object) -> None:
    hidden, weight, _ = make()
    labels = torch.full((N,), -100)
    loss = pk.linear_cross_entropy(hidden, weight, labels, plan=plan, normalizer=normalizer)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("boundaries", [[0, 0, 5, 5, N], [0, N, N], [0, N]])
def test_sequences_without_tokens_leak_nothing(boundaries: list[int]) -> None:
    hidden, weight, _ = make()
    labels = torch.randint(V, (N,))
    offsets = torch.tensor(boundaries)
    found = pk.linear_logprob(hidden, weight, labels, shift=True, cu_seqlens=offsets)
    lasts = sorted({stop - 1 for stop in boundaries if stop})
    assert (found == 0).nonzero().flatten().tolist() == lasts
    expected = pk.linear_logprob(hidden[:-1], weight, labels[1:])
    rows = [i for i in range(N - 1) if i not in lasts]
    torch.testing.assert_close(found[rows], expected[rows])


def test_no_tokens_at_all() -> None:
    hidden, weight = torch.zeros(0, H), torch.zeros(V, H)
    labels, offsets = torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])
    found = pk.linear_logprob(hidden, weight, labels, shift=True, cu_seqlens=offsets)
    assert found.shape == (0,)
