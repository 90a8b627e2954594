"""Weights that are sent over in pieces arrive before they are read, and are not overwritten."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine import feed, problem


class LazyLane:
    """Copies run at the last moment that the protocol allows, or at the first."""

    def __init__(self, late: bool) -> None:
        self.late, self.waiting, self.sent = late, [], 0

    def send(self, target: Tensor, source: Tensor) -> None:
        target.fill_(torch.nan)
        self.waiting.append((target, source))
        self.sent += 1
        if not self.late:
            target.copy_(source)

    def arrive(self) -> None:
        target, source = self.waiting.pop(0)
        if self.late:
            target.copy_(source)


@pytest.fixture(params=[False, True], ids=["first moment", "last moment"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LazyLane:
    found = LazyLane(request.param)
    monkeypatch.setattr(feed, "_lane", lambda device: found)
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("span", [(0, 37), (5, 30), (4, 5), (6, 6)])
def test_every_entry_arrives(
    lane: LazyLane, monkeypatch: pytest.MonkeyPatch, rows: int, span: tuple[int, int]
) -> None:
    monkeypatch.setattr(feed, "elsewhere", lambda weight, device: True)
    weight, buffer = torch.randn(37, 4), torch.empty(rows, 4)
    found = [(a, b, w.clone()) for a, b, w in feed.weight_chunks(weight, *span, buffer)]
    whole = torch.cat([w for *_, w in found]) if found else torch.empty(0, 4)
    assert torch.equal(whole, weight[slice(*span)])
    edges = [a for a, _, _ in found] + [found[-1][1]] if found else []
    assert edges == sorted(edges) and (not edges or (edges[0], edges[-1]) == span)
    assert not lane.waiting


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_a_teacher_elsewhere_gives_the_same_numbers(
    lane: LazyLane, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    hidden, weight = torch.randn(21, 8), torch.randn(507, 8)
    teacher = pk.Head(torch.randn(21, 6), torch.randn(507, 6), torch.randn(507))
    plan = pk.PlanRequest(schedule, token_block=5, vocab_block=64)
    found = []
    for away in (False, True):
        is_away = (lambda w, device: w.data_ptr() == teacher.weight.data_ptr()) if away else None
        for module in (feed, problem):
            if is_away:
                monkeypatch.setattr(module, "elsewhere", is_away)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = pk.linear_divergence(pk.Head(*leaves), teacher, plan=plan)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    assert lane.sent > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
