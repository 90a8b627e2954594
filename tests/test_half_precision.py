"""Where half precision can go wrong: flat softmaxes, loss scales, many chunks; the filter."""

from __future__ import annotations

import functools

import oracles
import pytest
import torch
from oracles import GRADIENTS, ORACLE, VALUES, OneHead, assert_accurate, dense
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pad_kernels as pk
from pad_kernels.engine import gradients, products
from pad_kernels.engine.filter import column_runs
from pad_kernels.engine.planner import HALF_BLOCKS

pytestmark = pytest.mark.usefixtures("poisoned")

HALF = torch.float16
BACKENDS = ["cpp", "torch_blocked"]


def _plan(schedule: str, backend: str, **more: int | float) -> pk.PlanRequest:
    if backend == "cpp" and pk.available_backends()["cpp"] != "available":
        pytest.skip("the extension is not built")
    return pk.PlanRequest(schedule, backend, **more)


def _mean_loss(z: Tensor, labels: Tensor) -> Tensor:
    return oracles.cross_entropy(z, labels)[None]


# --- float16, a flat softmax over 32000 entries ---

FLAT_TOKENS, FLAT_VOCAB, FLAT_HIDDEN = 96, 32000, 16


@functools.cache
def _flat() -> OneHead:
    """Logits of about 0.01: every probability is 1 / 32000, half of float16's smallest normal."""
    torch.manual_seed(1)
    hidden = torch.randn(FLAT_TOKENS, FLAT_HIDDEN)
    # Hidden states share a direction, so that the gradients of unlabelled entries do not cancel.
    hidden[:, 0] += 2
    weight = torch.randn(FLAT_VOCAB, FLAT_HIDDEN) * 0.003
    labels = torch.randint(FLAT_VOCAB, (FLAT_TOKENS,))
    labels[::5] = -100
    return OneHead(hidden.to(HALF), weight.to(HALF), labels)


@functools.cache
def _flat_reference(scale: float) -> tuple[list[Tensor], list[Tensor]]:
    x = _flat()
    count = int((x.labels >= 0).sum())
    grad = torch.full((1, FLAT_TOKENS), scale / count, dtype=torch.float64)
    return x.compute(ORACLE, _mean_loss, grad), x.compute(dense(HALF), _mean_loss, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["early", "late", "kept", "per-token"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_flat_softmax_keeps_its_gradients(
    scale: float, schedule: str, backend: str, most: float = 1.5
) -> None:
    """``most`` is what may be lost, in last roundings of the gradient."""
    x = _flat()
    plan = _plan("late" if schedule == "per-token" else schedule, backend, vocab_block=6000)
    if schedule == "per-token":
        leaves, logprob = x.ours(pk.linear_logprob, x.labels, plan=plan)
        loss = -logprob.sum() / (x.labels >= 0).sum()
    else:
        leaves, loss = x.ours(pk.linear_cross_entropy, x.labels, plan=plan)
    found = torch.autograd.grad(loss * scale, leaves)
    oracle, careful = _flat_reference(scale)
    for ours, reference, other in zip(found, oracle[1:], careful[1:], strict=True):
        assert_accurate(ours, reference, other, k=GRADIENTS, dtype=HALF)
        # More than the rule asks for.
        last = float((reference.to(HALF).double() - reference).norm())
        assert float((ours.double() - reference).norm()) <= most * last
    _check_unlabelled(found[1], oracle[2], x.labels, most)


@pytest.mark.usefixtures("multiply_float16")
@pytest.mark.parametrize("schedule", ["early", "late", "kept", "per-token"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_so_does_one_whose_operands_are_float16(scale: float, schedule: str) -> None:
    """1 / N and the loss scale are not what float16 has to hold.

    All entries of dL/dz are equal, and so are their roundings: they add up.
    """
    test_a_flat_softmax_keeps_its_gradients(scale, schedule, "torch_blocked", most=4)


@pytest.mark.usefixtures("multiply_float16")
@pytest.mark.parametrize("schedule", ["early", "late"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4])
def test_factors_of_any_size(size: float, schedule: str) -> None:
    """Rows of factors that float16 does not have; a sum of many rows that is beyond it."""
    torch.manual_seed(5)
    tokens = 3000
    x = OneHead(torch.randn(tokens, 8).to(HALF), torch.randn(40, 8).to(HALF), torch.zeros(tokens))
    x.labels = x.labels.long()
    x.hidden[:, 0] += 60
    x.weight[:, 0] = 0
    weights = torch.rand(tokens) * size

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return oracles.cross_entropy(z, labels)[None]

    grad = weights.double()[None] / (size * tokens)
    oracle, careful = (x.compute(how, loss, grad) for how in (ORACLE, dense(HALF)))
    plan = _plan(schedule, "torch_blocked", token_block=700)
    leaves, value = x.ours(
        pk.linear_cross_entropy, x.labels, token_weights=weights, normalizer=tokens, plan=plan
    )
    found = torch.autograd.grad(value, leaves, torch.tensor(1 / size))
    for ours, reference, other in zip(found, oracle[1:], careful[1:], strict=True):
        assert_accurate(ours, reference, other, k=GRADIENTS, dtype=HALF)


def test_nothing_and_infinity_have_no_power() -> None:
    for numbers, power in (([0.0, 0.0], 1), ([1.0, torch.inf], 1), ([torch.nan], 1), ([-3.0], 4)):
        assert gradients._power(torch.tensor(numbers), 4) == power


def test_products_and_their_power_stay_on_a_gpu() -> None:
    """Without one: what a product in float32 of float16 gives there, and that nobody waits."""
    with FakeTensorMode():
        left, right = (torch.empty(s, dtype=HALF, device="cuda") for s in ((8, 16), (16, 24)))
        out = torch.empty(8, 24, device="cuda")
        assert products.multiply(left, right, out).dtype == torch.float32
    assert gradients._power(torch.empty(3, 5, device="meta"), 4).device.type == "meta"


def test_a_captured_graph_reads_no_tiles_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter multiplies all columns then; a fake tensor has no numbers to look at."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        peaks, bound = torch.empty(4, device="cuda"), torch.empty((), device="cuda")
        assert column_runs([peaks, None], bound, 500) == [(0, 500)]
    bound = torch.tensor(0.5)
    assert column_runs([torch.tensor([1.0, 0.0, 0.0, 1.0])], bound, 500) == [(0, 128), (384, 500)]


def _check_unlabelled(d_weight: Tensor, oracle: Tensor, labels: Tensor, most: float = 1.5) -> None:
    """Entries that are nobody's label: their gradients are the ones that vanish."""
    rest = torch.ones(len(oracle), dtype=torch.bool)
    rest[labels[labels >= 0]] = False
    ours, reference = d_weight[rest].double(), oracle[rest]
    last = float((reference.to(HALF).double() - reference).norm())
    assert float(reference.norm()) > 0
    assert float((ours - reference).norm()) <= most * last


def test_a_dense_float16_loses_the_flat_gradients() -> None:
    """What the tests above are worth: the same computation in the obvious way fails them."""
    oracle, careful = _flat_reference(1.0)
    with pytest.raises(AssertionError):
        _check_unlabelled(careful[2], oracle[2], _flat().labels)


def test_a_loss_scale_of_float16_overflows_only_where_it_must() -> None:
    """An early gradient waits times a power of two: neither it nor the product overflows early."""
    torch.manual_seed(2)
    x = OneHead(torch.randn(8, 16).to(HALF), torch.randn(64, 16).to(HALF), torch.randint(64, (8,)))
    for scale in (2.0**-10, 1.0, 2.0**12):
        reference = x.compute(ORACLE, _mean_loss, torch.full((1, 8), scale / 8).double())
        leaves, loss = x.ours(pk.linear_cross_entropy, x.labels, plan="early")
        for ours, exact in zip(
            torch.autograd.grad(loss * scale, leaves), reference[1:], strict=True
        ):
            last = float((exact.to(HALF).double() - exact).norm())
            assert float((ours.double() - exact).norm()) <= 2 * last


# --- bfloat16, many chunks ---

MANY, CHUNKS, WIDE, FEATURES = 4096, 64, 4096, 64


@functools.cache
def _many() -> tuple[OneHead, list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    hidden = torch.randn(MANY, FEATURES)
    weight = torch.randn(WIDE, FEATURES) / 4
    x = OneHead(hidden.bfloat16(), weight.bfloat16(), torch.randint(WIDE, (MANY,)))
    grad = torch.full((1, MANY), 1 / MANY, dtype=torch.float64)
    return (
        x,
        x.compute(ORACLE, _mean_loss, grad),
        x.compute(dense(torch.bfloat16), _mean_loss, grad),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [CHUNKS, HALF_BLOCKS])
@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
def test_bfloat16_in_chunks(schedule: str, chunks: int, backend: str) -> None:
    """No error of its own: within 2x (loss) and 3x (gradients) of the dense computation's.

    Be it in 64 chunks, or in as many as early gradients add up without an accumulator.
    """
    x, oracle, careful = _many()
    blocks = {"token_block": MANY // chunks, "vocab_block": WIDE // chunks}
    plan = _plan(schedule, backend, **blocks)
    leaves, loss = x.ours(pk.linear_cross_entropy, x.labels, plan=plan)
    found = torch.autograd.grad(loss, leaves)

    error = abs(float(loss.detach()) - float(oracle[0].mean()))
    others = float((careful[0] - oracle[0]).norm()) / MANY
    assert error <= VALUES * max(others, torch.finfo(torch.float32).eps * float(oracle[0].mean()))
    for ours, reference, other in zip(found, oracle[1:], careful[1:], strict=True):
        error, others = (float((g.double() - reference).norm()) for g in (ours, other))
        assert error <= GRADIENTS * others


# --- the gradient filter ---


def _peaked(dtype: torch.dtype) -> OneHead:
    """Rows that are sure of a few hundred entries; the others have next to no probability."""
    torch.manual_seed(4)
    tokens, vocab, width = 40, 2048, 24
    hidden = torch.randn(tokens, width)
    weight = torch.randn(vocab, width) * 0.3
    bias = torch.where(torch.arange(vocab) < 300, 4.0, -12.0)
    x = OneHead(hidden.to(dtype), weight.to(dtype), torch.randint(300, (tokens,)), bias.to(dtype))
    x.labels[::7] = -100
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_filter_keeps_its_bound(
    scale: float, dtype: torch.dtype, schedule: str, backend: str
) -> None:
    """Skipped entries of dz are below filter x the largest weight, and some are skipped."""
    x = _peaked(dtype)
    bound = 1e-3

    def gradients(level: float) -> list[Tensor]:
        plan = _plan(schedule, backend, filter=level, token_block=16, vocab_block=700)
        leaves, loss = x.ours(pk.linear_cross_entropy, x.labels, reduction="sum", plan=plan)
        return list(torch.autograd.grad(loss * scale, leaves))

    exact, filtered = gradients(0.0), gradients(bound)
    live = x.labels >= 0
    limit = bound * scale
    errors = [(a - b).abs() for a, b in zip(exact, filtered, strict=True)]
    # |d dz| <= limit, entry by entry, through the two products.
    slack = 1 + 1e-3
    assert (errors[0][live] <= limit * x.weight.abs().sum(0) * slack).all()
    assert (errors[1] <= limit * x.hidden[live].abs().sum(0) * slack).all()
    # The order of the vocabulary shows in the last digits of the statistics.
    assert errors[2].norm() <= 1e-6 * exact[2].norm(), "the bias gradient is not filtered"
    skipped = ~filtered[1].any(1)
    assert int(skipped.sum()) >= 1500 and exact[1][skipped].any(1).all()
    assert filtered[1][:256].any(1).all(), "what matters is not skipped"
    assert errors[0].any() and not filtered[0][~live].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["early", "late"])
def test_a_filter_below_everything_changes_nothing(schedule: str, backend: str) -> None:
    x = _peaked(torch.float64)

    def gradients(level: float) -> list[Tensor]:
        plan = _plan(schedule, backend, filter=level)
        leaves, loss = x.ours(pk.linear_cross_entropy, x.labels, plan=plan)
        return list(torch.autograd.grad(loss, leaves))

    for a, b in zip(gradients(0.0), gradients(1e-30), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_filter_above_everything_skips_all(backend: str) -> None:
    x = _peaked(torch.float32)
    x.bias = None
    flat = OneHead(x.hidden * 1e-3, x.weight, torch.full_like(x.labels, -100))
    flat.labels[0] = 3
    for level, some in ((0.999, True), (0.9999, False)):
        plan = _plan("late", backend, filter=level)
        leaves, logprob = flat.ours(pk.linear_logprob, flat.labels, plan=plan)
        # The largest entry is the label's, 1 - 1/2048 = 0.9995.
        for gradient in torch.autograd.grad(logprob.sum(), leaves):
            assert bool(gradient.any()) == some
