"""Memory that ops hand back to themselves: reused, never shared, never more than the limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine import workspace
from pad_kernels.engine.workspace import Workspace, empty

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[workspace._Pool]:
    """A pool of the test's own."""
    fresh = workspace._Pool()
    monkeypatch.setattr(workspace, "_pool", fresh)
    yield fresh


def idle(pool: workspace._Pool) -> int:
    return sum(block.memory.nbytes for block in pool._idle)


def buffer(mib: float, limit: int = 64, workspace: bool = False, brief: bool = False) -> Tensor:
    shape = (int(mib * MIB) // 4,)
    options = {"workspace": workspace, "brief": brief}
    return empty(shape, torch.float32, CPU, limit=limit * MIB, **options)


def test_freed_memory_is_used_again_and_only_then() -> None:
    first = buffer(8)
    place = first.data_ptr()
    second = buffer(8)
    assert second.data_ptr() != place
    part = first[3:5]
    del first
    third = buffer(8)
    assert third.data_ptr() != place  # a slice still lies there
    del part
    assert buffer(7.5).data_ptr() == place


def test_much_smaller_tensors_do_not_take_large_blocks(pool: workspace._Pool) -> None:
    del_me = buffer(32)
    place = del_me.data_ptr()
    del del_me
    assert idle(pool) == 32 * MIB
    assert buffer(8).data_ptr() != place
    assert buffer(1).data_ptr() != place


def test_the_workspace_of_one_op_serves_a_smaller_one(pool: workspace._Pool) -> None:
    """Ops of several shapes that take turns share one block, however different they are."""
    place = buffer(48, workspace=True, brief=True).data_ptr()
    assert buffer(5, workspace=True, brief=True).data_ptr() == place
    assert buffer(48, workspace=True, brief=True).data_ptr() == place
    assert idle(pool) == 48 * MIB


@pytest.mark.parametrize("mib", [1, 65])
def test_small_and_too_large_tensors_are_not_kept(pool: workspace._Pool, mib: int) -> None:
    buffer(mib)
    assert idle(pool) == 0


def test_a_newcomer_goes_where_there_is_no_room(pool: workspace._Pool) -> None:
    tensors = [buffer(24) for _ in range(3)]
    places = [x.data_ptr() for x in tensors]
    while tensors:
        del tensors[0]
    assert idle(pool) == 48 * MIB
    assert [b.memory.data_ptr() for b in pool._idle] == places[:2]


def test_idle_blocks_make_room_for_a_workspace(pool: workspace._Pool) -> None:
    buffer(40)
    assert idle(pool) == 40 * MIB
    held = buffer(30, workspace=True)
    assert idle(pool) == 0  # 70 would be more than 64
    gradient = buffer(40)
    del gradient
    assert idle(pool) == 0  # so would that
    del held
    assert idle(pool) == 30 * MIB


def test_a_smaller_limit_lets_memory_go(pool: workspace._Pool) -> None:
    buffer(40)
    buffer(10, limit=16)
    assert idle(pool) == 10 * MIB


def test_what_nobody_asks_for_is_let_go(pool: workspace._Pool) -> None:
    buffer(40)
    for _ in range(pool.PATIENCE + 2):
        buffer(8)
    assert idle(pool) == 8 * MIB


def test_workspace_made_in_inference_mode_serves_afterwards() -> None:
    with torch.inference_mode():
        place = buffer(8).data_ptr()
    again = buffer(8)
    assert again.data_ptr() == place
    again.requires_grad_()
    again.detach().fill_(1.0)


def test_buffers_of_a_pass_do_not_overlap() -> None:
    with Workspace(CPU, 9 * MIB, 64 * MIB) as space:
        parts = [space.empty(3, 1000, dtype=torch.float64) for _ in range(4)]
        parts += [space.empty(2 * MIB, dtype=torch.bfloat16)]
        for value, part in enumerate(parts):
            part.fill_(value)
        for value, part in enumerate(parts):
            assert (part == value).all()


def test_threads_never_get_the_same_block() -> None:
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(50):
            mine = buffer(4)
            mine[::4096].fill_(mark)
            if not (mine[::4096] == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("plan", ["early", "late", "kept"])
def test_gradients_are_the_callers_own(pool: workspace._Pool, plan: str) -> None:
    """Gradients of one step survive the next, are no views, and are taken without a copy."""
    hidden = torch.randn(64, 256).requires_grad_()
    weight = torch.randn(8192, 256).requires_grad_()
    labels = torch.randint(8192, (64,))
    found = []
    for _ in range(3):
        weight.grad = hidden.grad = None
        pk.linear_cross_entropy(hidden, weight, labels, plan=plan).backward()
        assert weight.grad is not None and not weight.grad._is_view()
        found.append((weight.grad, weight.grad.clone()))
    assert len({kept.data_ptr() for kept, _ in found}) == 3
    assert all(torch.equal(kept, copy) for kept, copy in found)
    found.clear()
    weight.grad = None
    before = {block.memory.data_ptr() for block in pool._idle}
    pk.linear_cross_entropy(hidden, weight, labels, plan=plan).backward()
    assert weight.grad is not None and weight.grad.data_ptr() in before
