"""Weights that are sent over in pieces arrive before they are read, and are not overwritten."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine import feed, problem


class LazyLane:
    """Copies run at the last moment that the protocol allows, or at the first."""

    def __init__(self, late: bool) -> None:
        self.late, self.waiting, self.sent = late, [], 0

    def send(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.fill_(torch.nan)
        copy = (target, source)
        self.waiting.append(copy)
        self.sent += 1
        if not self.late:
            target.copy_(source)

        def arrive() -> None:
            """This copy and those before it, which the same stream makes, have been made."""
            while any(other is copy for other in self.waiting):
                target, source = self.waiting.pop(0)
                if self.late:
                    target.copy_(source)

        return arrive


@pytest.fixture(params=[False, True], ids=["first moment", "last moment"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LazyLane:
    found = LazyLane(request.param)
    monkeypatch.setattr(feed, "_SideStream", lambda device: found)
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


def test_a_reader_that_stops_leaves_nothing_behind(
    lane: LazyLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy that is under way has to be over before the buffer is anybody else's."""
    monkeypatch.setattr(feed, "elsewhere", lambda weight, device: True)
    weight, buffer = torch.randn(37, 4), torch.empty(8, 4)
    for stop_at in (0, 3, 8):
        with pytest.raises(KeyboardInterrupt):
            for i, _ in enumerate(feed.weight_chunks(weight, 0, 37, buffer)):
                if i == stop_at:
                    raise KeyboardInterrupt
        assert not lane.waiting
        found = [w.clone() for *_, w in feed.weight_chunks(weight, 0, 37, buffer)]
        assert torch.equal(torch.cat(found), weight)


def test_readers_beside_each_other_wait_for_their_own_copies(
    lane: LazyLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the backward threads of two devices, or two losses of one step, read."""
    monkeypatch.setattr(feed, "elsewhere", lambda weight, device: True)
    weights, buffers = torch.randn(2, 37, 4), torch.empty(2, 6, 4)
    readers = [feed.weight_chunks(w, 0, 37, b) for w, b in zip(weights, buffers, strict=True)]
    next(readers[0])  # ahead of the other, and never asked again until the end
    found = [w.clone() for *_, w in readers[1]]
    assert torch.equal(torch.cat(found), weights[1])
    rest = [w.clone() for *_, w in readers[0]]
    assert torch.equal(torch.cat(rest), weights[0][3:])


def test_what_streams_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies wait for the products before them, products for their own copy, of their device."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.events = name, 0

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            self.events += 1
            return f"event {self.events} of {self.name}"

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.name} waits for {event}")

        def __enter__(self) -> None:
            calls.append(f"on {self.name}")

        def __exit__(self, *_: object) -> None:
            calls.append("back")

    device = torch.device("cuda", 1)
    cuda = SimpleNamespace(
        current_stream=lambda device: Stream(f"products of {device}"),
        Stream=lambda device: Stream(f"copies to {device}"),
        stream=lambda stream: stream,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    lane = feed._SideStream(device)
    target = SimpleNamespace(copy_=lambda source, non_blocking: calls.append(f"copy {source}"))
    arrivals = [lane.send(target, source) for source in "ab"]  # type: ignore[arg-type]
    arrivals[1]()
    arrivals[0]()
    one = ["copies to cuda:1 waits for products of cuda:1", "on copies to cuda:1"]
    assert calls[:8] == [*one, "copy a", "back", *one, "copy b", "back"]
    assert calls[8:] == [
        f"products of cuda:1 waits for event {i} of copies to cuda:1" for i in (2, 1)
    ]
