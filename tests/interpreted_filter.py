"""The gradient filter on single tiles, under the interpreter."""

from collections.abc import Iterator
from typing import Any

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import filter_cases
import pytest
import torch
from filter_cases import Peaked, check, spread, tiles_of
from oracles import GRADIENTS

import pad_kernels as pk
from pad_kernels.backends.triton import fused
from pad_kernels.backends.triton import live as live_module
from pad_kernels.backends.triton.fused_operands import Operands
from pad_kernels.backends.triton.launch import reach
from pad_kernels.backends.triton.live import LiveLaunches
from pad_kernels.backends.triton.tilings import LiveTiling, Tiling
from pad_kernels.engine import problem
from pad_kernels.engine import run as engine_run
from pad_kernels.engine.workspace import account
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Block, Normalizer, measure
from pad_kernels.heads import HeadOptions

HALF = [torch.bfloat16, torch.float16]
TILE = 32


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    torch.manual_seed(0)
    account.poison = True
    yield
    account.poison = False


# --- the products ---


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(75, 107, 48), (32, 64, 16), (1, 507, 80), (40, 1, 16)])
def test_products_read_live_tiles_alone(
    shape: tuple[int, int, int], share: float, dtype: torch.dtype
) -> None:
    """Dead tiles hold NaN, and so does whatever lies beyond the edges but padding."""
    rows, cols, width = shape
    peaks = torch.rand(-(-rows // TILE), -(-cols // TILE))
    peaks[0, 0] = torch.nan if share else 0.0
    bound = torch.tensor([2.0 if share == 0 else 1 - share])
    room = torch.full((rows + 3, cols + 5), torch.nan, dtype=dtype)
    dz = room[:rows, :cols]
    padded = room[:rows, : reach(cols, dz) or cols]
    assert padded.shape[1] - cols == {107: 5, 507: 5}.get(cols, 0)
    alive = spread(~(peaks < bound), TILE, padded.shape)
    padded[alive] = torch.randn(int(alive.sum())).to(dtype)
    padded[:, cols:][alive[:, cols:]] = 0
    dense = torch.where(alive[:, :cols], dz, 0).double()
    vocab = cols + 9
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype)
    cases = (
        (LiveTiling(32, 16, 4, 3), None, False, torch.float32),
        (LiveTiling(64, 32, 4, 5), torch.randperm(vocab)[:cols], True, dtype),
    )
    for tiling, index, add, into in cases:
        scale = torch.tensor(0.25, dtype=torch.float64) if add else None
        live = LiveLaunches(dz, peaks, bound, TILE)
        for launch in live.lists():
            launch.run()
        places, eps = torch.arange(cols) if index is None else index, torch.finfo(into).eps
        start = torch.randn(rows, width).to(into)
        got = start.clone() if add else torch.full_like(start, torch.nan)
        live.product(got, weight, index, transposed=False, add=add, tiling=tiling).run()
        exact = dense @ weight[places].double() + (start.double() if add else 0)
        torch.testing.assert_close(got.double(), exact, rtol=eps, atol=3e-5)
        start = torch.randn(vocab, width).to(into)
        got = start.clone() if add else torch.full_like(start, torch.nan)
        options = {"add": add, "scale": scale, "tiling": tiling}
        live.product(got, hidden, index, transposed=True, **options).run()
        exact = start.double()
        if not add:
            exact.fill_(torch.nan)[places] = 0.0
        exact[places] += dense.t() @ hidden.double() * (1 if scale is None else scale)
        torch.testing.assert_close(got.double(), exact, rtol=eps, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("tma", [False, True])
def test_dead_tiles_are_not_written(tma: bool) -> None:
    """A kernel whose tile is the filter's writes what is alive; smaller ones write it all."""
    rows, cols, width, dtype = 40, 150, 32, torch.bfloat16
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(cols, width).to(dtype)
    weight[TILE : 3 * TILE] *= 0.01
    hidden[TILE:] *= 0.1
    operands = Operands([hidden], [weight], (None,), [HeadOptions()])
    logits = (hidden.double() @ weight.double().t()).float()
    stats = measure([Normalizer(0)], Block({0: logits}, 0, {}), None)
    label = torch.full((rows, 1), 70)
    label[TILE:] = 5
    terms = LogitGradient(student=-torch.ones(rows), sparse=[(label, torch.ones(rows, 1))])
    exact = -logits.double().softmax(1)
    exact[torch.arange(rows), label[:, 0]] += 1
    bound = torch.tensor([0.05])
    assert 0 < int((tiles_of(exact, TILE) < 0.05).sum()) < 8
    for size, written in ((TILE, False), (TILE // 2, True)):
        room = torch.full((rows, 160), torch.nan, dtype=dtype)
        out = room[:, :cols]
        peaks = torch.zeros(2, 5, dtype=torch.int32)
        tiling = Tiling(size, size, 16, 4, 3, 2)
        fused.gradient_launch(
            *(operands, [0], tiling, stats, terms, out, 0, peaks, bound), tile=TILE, tma=tma
        ).run()
        found = peaks.view(torch.float32)
        torch.testing.assert_close(found.double(), tiles_of(exact, TILE), rtol=8e-3, atol=1e-6)
        alive = spread(~(found < bound), TILE, room.shape)
        assert torch.equal(room.isnan(), torch.zeros_like(alive) if written else ~alive)
        expected = torch.nn.functional.pad(exact, (0, 160 - cols))  # zeros behind the last column
        torch.testing.assert_close(room[alive].double(), expected[alive], rtol=8e-3, atol=1e-6)


# --- through the engine ---


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many live tiles each product over rows had."""
    counts: list[int] = []
    original = LiveLaunches.product

    def spy(self: LiveLaunches, *arguments: Any, transposed: bool, **options: Any) -> object:
        if not transposed:
            counts.append(int(self._lists[False][1].sum()))
        return original(self, *arguments, transposed=transposed, **options)

    monkeypatch.setattr(live_module.LiveLaunches, "product", spy)
    return counts


@pytest.mark.usefixtures("multiply_float16")
@pytest.mark.parametrize(
    ("schedule", "biased", "dtype", "padded"),
    [
        ("early", False, torch.bfloat16, True),
        ("early", True, torch.float16, False),
        ("late", False, torch.float16, True),
        ("late", True, torch.bfloat16, True),
    ],
)
def test_filtered_gradients(
    products: list[int],
    plans: list[pk.Plan],
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    biased: bool,
    dtype: torch.dtype,
    padded: bool,
) -> None:
    """Some tiles dead, -inf and an unlikely label among them; with a bias all of dz is summed.

    Padded, rows of logits begin at multiples of 16 entries as on a GPU, 700 columns and the last
    316 of a late plan.
    """
    if padded:
        for module in (problem, engine_run):
            monkeypatch.setattr(module, "total_memory", lambda device: 1 << 30)
    account.reset()
    filter_cases.check_schedule(schedule, "triton", biased, dtype)
    assert len(products) == 2
    assert 0 < account.high_water <= plans[0].workspace_bytes


@pytest.mark.usefixtures("multiply_float16")
@pytest.mark.parametrize("dtype", HALF)
def test_kept_rows_in_natural_order(products: list[int], dtype: torch.dtype) -> None:
    """Kept logits lie as they are; rows beside them are recomputed, in tiles of their own."""
    x = Peaked(dtype)
    x.labels[:] = 5
    x.bias[5] = 1.0
    x.bias[300:] = -12.0
    request = pk.PlanRequest("kept", "triton", filter=1e-3, vocab_block=384, kept_rows=128)
    left_out = check(x, 1e-3, request, natural=True)
    assert left_out[:, 384:].all() and len(products) == 4


@pytest.mark.parametrize(("level", "alive"), [(0.999, 0), (1e-30, 12)])
def test_all_tiles_dead_or_alive(products: list[int], level: float, alive: int) -> None:
    x = Peaked(torch.bfloat16)
    x.bias[:] = 0
    x.bias[5] = 2.0
    request = pk.PlanRequest("late", "triton", filter=level)
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    x.labels[:] = 5
    logprob = pk.linear_logprob(hidden * 1e-2, weight, x.labels, bias=x.bias, plan=request)
    # The labels' entries are about 1 - 0.0105, which bfloat16 does not round to 1.
    logprob.sum().backward()
    assert products == [alive]
    assert bool(hidden.grad.any()) == bool(weight.grad.any()) == (alive > 0)


def test_matrices_that_kernels_cannot_read(products: list[int]) -> None:
    """Column runs by the library's products: rows of an odd size, float32."""
    for dtype, width in ((torch.bfloat16, 24), (torch.float32, 32)):
        x = Peaked(dtype, rows=30, width=width)
        request = pk.PlanRequest("late", "triton", filter=1e-3, vocab_block=384)
        leaves = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        pk.linear_cross_entropy(
            *leaves, x.labels, bias=x.bias, reduction="sum", plan=request
        ).backward()
        dz, live = x.gradient()
        left_out = ~leaves[1].grad.any(1)
        assert 200 < int(left_out.sum()) < 600 and (dz[:, left_out].abs() <= 1e-3).all()
        exact = dz.t() @ x.hidden[live].double()
        error = (leaves[1].grad.double() - exact)[~left_out].norm()
        assert error <= GRADIENTS * torch.finfo(dtype).eps * exact.norm()
    assert not products


def test_the_same_bits_every_time() -> None:
    x = Peaked(torch.bfloat16)
    found = []
    for _ in range(2):
        leaves = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        plan = pk.PlanRequest("early", "triton", filter=1e-3, token_block=75)
        loss = pk.linear_cross_entropy(*leaves, x.labels, bias=x.bias, plan=plan)
        found.append(torch.autograd.grad(loss, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_teachers_and_parts_in_order(products: list[int]) -> None:
    """Rows with a teacher and rows without: two parts, each with its own tiles, one weight."""
    x, teacher = (
        Peaked(torch.bfloat16),
        pk.Head(torch.randn(150, 16).bfloat16(), (torch.randn(700, 16) / 2).bfloat16()),
    )
    wanted = torch.rand(2, 150) * (torch.rand(2, 150) < 0.7)
    found = []
    for level in (0.0, 1e-30):
        leaves = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        loss = pk.linear_distill(
            pk.Head(*leaves, x.bias.clamp(min=-9)),
            x.labels,
            teacher=teacher,
            ce_weight=wanted[0],
            divergence_weight=wanted[1],
            reduction="sum",
            plan=pk.PlanRequest("late", "triton", filter=level, vocab_block=384),
        ).loss
        assert loss is not None
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert len(products) == 4
    eps = torch.finfo(torch.bfloat16).eps
    for exact, mine in zip(*found, strict=True):
        error = (mine.double() - exact.double()).norm()
        assert error <= GRADIENTS * eps * exact.double().norm()
    assert torch.equal(found[0][0], found[1][0])
