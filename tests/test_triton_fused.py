"""The fused Triton kernels compiled for devices that are not here."""

import os
from collections.abc import Iterable

import pytest
import torch

pytest.importorskip("triton")
# isort: split
from pad_kernels.backends.base import GivenTokens
from pad_kernels.backends.triton import fused, gather, topk
from pad_kernels.backends.triton.aot import SHARED_MEMORY, Cubin, compile_kernel
from pad_kernels.backends.triton.fused_operands import Measured, Operands
from pad_kernels.backends.triton.launch import Launch
from pad_kernels.backends.triton.live import LiveLaunches
from pad_kernels.backends.triton.tilings import (
    LIVE,
    LIVE_TRIALS,
    Tiling,
    choose_splits,
    gradient_tiling,
    statistics_tiling,
    tiling_trials,
)
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.problem import Stream
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    Picked,
    Statistic,
    Tail,
    Total,
    empty_stats,
)
from pad_kernels.heads import HeadOptions

#: ``make check-kernels`` compiles every case.
EVERYTHING = os.environ.get("PAD_KERNELS_CUBINS") == "all"
#: What computes a matrix product on the tensor cores of a generation.
TENSOR_CORES = {80: r"HMMA[.\w]*", 90: r"HGMMA[.\w]*", 100: r"UTC[HQ]MMA[.\w]*"}
PLAIN, CAPPED = HeadOptions(), HeadOptions(30.0, 0.9, 0.7)
ENTROPY = Moment(0, (1.0,))
FORWARD, REVERSE = Moment(1, (-1.0, 1.0)), Moment(0, (1.0, -1.0))
ADVANTAGE = Moment(0, (0.0, 1.0, -1.0))
LABEL, TEACHER, TAIL = Picked("labels"), Picked("teacher_ids"), Tail("teacher_ids")
#: Streams, statistics, head: what ops ask for, the lightest and the heaviest of each kind.
ASKED: dict[str, tuple[int, tuple[Statistic, ...], HeadOptions]] = {
    "logprob": (1, (LABEL,), PLAIN),
    "logprob_capped": (1, (LABEL,), CAPPED),
    "options": (1, (LABEL,), PLAIN),
    "options_capped": (1, (LABEL,), CAPPED),
    "token_stats": (1, (LABEL, ENTROPY, Total(), Argmax()), CAPPED),
    "forward_kl": (2, (FORWARD,), PLAIN),
    "distill": (2, (LABEL, FORWARD, REVERSE, ENTROPY), CAPPED),
    "advantage": (3, (ADVANTAGE,), PLAIN),
    "distill_advantage": (3, (LABEL, FORWARD, ADVANTAGE, ENTROPY), CAPPED),
    "topk_teacher": (1, (TEACHER, TAIL), PLAIN),
    "topk_teacher_capped": (1, (LABEL, TEACHER, TAIL), CAPPED),
    "topk_teacher_stats": (1, (LABEL, TEACHER, TAIL, ENTROPY, Total(), Argmax()), CAPPED),
    "topk_teacher_and_another": (2, (LABEL, TEACHER, TAIL, FORWARD, REVERSE, ENTROPY), CAPPED),
    "topk_teacher_advantage": (3, (LABEL, TEACHER, TAIL, ADVANTAGE, ENTROPY), CAPPED),
}
#: Ids a row where it is not one label.
PICKED = {"options": 200, "options_capped": 4}
#: Tokens a row that an offline teacher kept.
KEPT = 64


def _ids(name: str, rows: int) -> dict[str, torch.Tensor]:
    """The lists of ids that an op's rows have."""
    counts = {"labels": PICKED.get(name, 1), "teacher_ids": KEPT}
    return {n: torch.empty(rows, k, dtype=torch.int64, device="meta") for n, k in counts.items()}


def shipped_for_statistics(name: str, capability: int) -> Tiling:
    """The tiling of an op's statistics."""
    count, wanted, head = ASKED[name]
    measured = Measured.of(range(count), wanted)
    assert measured is not None
    extras, tail = measured.extras_with(_ids(name, 1)), measured.tail is not None
    return statistics_tiling(capability, count, extras, plain=head == PLAIN, tail=tail)


def statistics_launches(
    name: str,
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    tiling: Tiling | None = None,
) -> tuple[Launch, Launch]:
    """The launches of an op at (N, V, H), without a device, in the shipped tiling or another."""
    count, wanted, head = ASKED[name]
    rows, vocab, size = shape
    with torch.device("meta"):
        operands = Operands(
            [torch.empty(rows, size, dtype=dtype) for _ in range(count)],
            [torch.empty(vocab, size, dtype=dtype) for _ in range(count)],
            tuple(None if head == PLAIN else torch.empty(vocab) for _ in range(count)),
            [head] * count,
        )
        inputs = _ids(name, rows)
        normalizers = [Normalizer(j) for j in range(count)]
        stats = empty_stats([*normalizers, *wanted], rows, inputs, torch.device("meta"))
        measured = Measured.of(range(count), wanted)
        assert measured is not None
        partial = torch.empty(8, len(measured.slots), rows, dtype=torch.float64)
    tiling = tiling or shipped_for_statistics(name, capability)
    assert operands.readable
    tma = capability >= 90
    return fused.statistics_launches(measured, operands, tiling, stats, partial, tma=tma)


def compiled(launch: Launch, capability: int) -> Cubin:
    """A kernel's machine code, which has no local memory and fits the device."""
    cubin = compile_kernel(
        launch.kernel, launch.arguments, launch.constants, capability=capability, **launch.options
    )
    assert cubin.stack == 0
    assert cubin.local_accesses == 0
    assert cubin.shared <= SHARED_MEMORY[capability]
    assert cubin.scratch == 0  # nobody has set an allocator
    return cubin


#: Recipes with a tail, and where they are compiled by default.
TAILED = {"topk_teacher": (80, 90), "topk_teacher_advantage": (90, 100)}


def cases(names: Iterable[str]) -> list[tuple[str, int]]:
    """Recipes and devices to compile for: all of them if that is wanted."""
    return [
        (name, sm)
        for name in names
        for sm in (80, 90, 100)
        if EVERYTHING or "topk_teacher" not in name or sm in TAILED.get(name, ())
    ]


@pytest.mark.parametrize(("name", "capability"), cases(ASKED))
def test_statistics_compile(name: str, capability: int) -> None:
    """At the shapes of a large model: tensor cores, copies that pass the registers by."""
    launches = statistics_launches(name, capability, torch.bfloat16, (8192, 128256, 4096))
    cubin, _ = (compiled(launch, capability) for launch in launches)
    assert cubin.count(TENSOR_CORES[capability])
    assert cubin.count(r"LDGSTS\.E[.\w]*\.128[.\w]*" if capability < 90 else r"UTMALDG[.\w]*")


#: Streams that a gradient reads, of which it has moments and probabilities, head.
GRADIENTS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], HeadOptions]] = {
    "logprob": (1, (), (), PLAIN),
    "logprob_capped": (1, (0,), (), CAPPED),
    "options": (1, (), (), PLAIN),
    "forward_kl": (2, (), (1,), PLAIN),
    "distill": (2, (0, 1), (1,), CAPPED),
    "advantage": (3, (1, 2), (), PLAIN),
    "distill_advantage": (3, (0, 1, 2), (1,), CAPPED),
    "topk_teacher": (1, (), (), PLAIN),
    "topk_teacher_capped": (1, (0,), (), CAPPED),
    "topk_teacher_and_another": (2, (0, 1), (1,), CAPPED),
    "topk_teacher_advantage": (3, (0, 1, 2), (), CAPPED),
}


def shipped_for_gradient(name: str, capability: int, filtered: bool) -> Tiling:
    """The tiling of an op's gradient."""
    count, _, _, head = GRADIENTS[name]
    tiles = count + ("topk_teacher" in name)
    return gradient_tiling(capability, tiles, plain=head == PLAIN, filtered=filtered)


def gradient_launch(
    name: str, capability: int, filtered: bool, tiling: Tiling | None = None
) -> Launch:
    """The launch of an op's gradient at a large model's block, without a device."""
    count, moments, probabilities, head = GRADIENTS[name]
    rows, cols, size, k = 8192, 4096, 4096, PICKED.get(name, 1)
    tails = [TAIL] if "topk_teacher" in name else []
    with torch.device("meta"):
        operands = Operands(
            [torch.empty(rows, size, dtype=torch.bfloat16) for _ in range(count)],
            [torch.empty(cols, size, dtype=torch.bfloat16) for _ in range(count)],
            tuple(None if head == PLAIN else torch.empty(cols) for _ in range(count)),
            [head] * count,
        )
        normalizers = [Normalizer(j) for j in range(count)]
        inputs = {"teacher_ids": torch.empty(rows, KEPT, dtype=torch.int64)}
        stats = empty_stats([*normalizers, *tails], rows, inputs, torch.device("meta"))
        terms = LogitGradient(
            student=torch.empty(rows),
            moments={j: torch.empty(rows) for j in moments},
            probabilities={j: torch.empty(rows) for j in probabilities},
            sparse=[(torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k))],
            outside={tail.ids: torch.empty(rows) for tail in tails},
        )
        out = torch.empty(rows, cols, dtype=torch.bfloat16)
        peaks = torch.empty(rows // 128, cols // 128, dtype=torch.int32) if filtered else None
        bound = torch.empty(1) if filtered else None
    tiling = tiling or shipped_for_gradient(name, capability, filtered)
    used, tma = list(range(count)), capability >= 90
    arguments = (operands, used, tiling, stats, terms, out, 4096, peaks, bound)
    return fused.gradient_launch(*arguments, tma=tma)


def test_tiles_that_the_filter_can_leave_unwritten() -> None:
    """One plain stream's kernel, without a tail, has the filter's tile on every device."""
    for capability in SHARED_MEMORY:
        for name, (count, _, _, head) in GRADIENTS.items():
            launch = gradient_launch(name, capability, True)
            unwritten = launch.arguments["bound"] is not None
            alone = count == 1 and "topk_teacher" not in name
            assert unwritten == (alone and head == PLAIN)


#: Products over live tiles: transposed, added to what is there, in which dtype, in an order.
LIVE_PRODUCTS = {
    "early_hidden": (False, False, torch.float32, True),
    "early_weight": (True, True, torch.float32, True),
    "late_hidden": (False, True, torch.float32, True),
    "late_weight": (True, False, torch.bfloat16, True),
    "kept_hidden": (False, True, torch.float32, False),
    "kept_weight": (True, True, torch.bfloat16, False),
    "float16_weight": (True, True, torch.float16, True),
}
#: Columns of dL/dz, and how far its rows are apart: a chunk; what 16 does not divide.
BLOCKS = [(4096, 4096), (50257, 50272)]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", LIVE_PRODUCTS if EVERYTHING else ["late_hidden", "float16_weight"])
@pytest.mark.parametrize(("cols", "pitch"), BLOCKS if EVERYTHING else BLOCKS[1:])
def test_live_products_compile(name: str, capability: int, cols: int, pitch: int) -> None:
    transposed, add, into, ordered = LIVE_PRODUCTS[name]
    rows, size, vocab = 8192, 4096, 128256
    dtype = torch.float16 if into == torch.float16 else torch.bfloat16
    with torch.device("meta"):
        dz = torch.empty(rows, pitch, dtype=dtype)[:, :cols]
        live = LiveLaunches(dz, torch.empty(rows // 128, -(-cols // 128)), torch.empty(1))
        listed = live.lists()
        other = torch.empty(rows if transposed else vocab, size, dtype=dtype)
        total = torch.empty(vocab if transposed else rows, size, dtype=into)
        index = torch.empty(cols, dtype=torch.int64) if ordered else None
        scale = torch.empty(()) if into == torch.float16 else None
    for launch in listed[:1]:
        compiled(launch, capability)
    for tiling in (LIVE[capability], *(LIVE_TRIALS[capability] if EVERYTHING else ())):
        options = {"transposed": transposed, "add": add, "scale": scale, "tiling": tiling}
        cubin = compiled(live.product(total, other, index, **options), capability)
        assert cubin.count(TENSOR_CORES[capability])
        # Matrices pass the registers by, 16 bytes at a time, several steps under way.
        assert cubin.count(r"LDGSTS\.E[.\w]*\.128[.\w]*")
        assert not cubin.count(r"LDG[.A-Z]*\.U16[.\w]*")
        under_way = 2 if tiling == LIVE[capability] else 1
        assert cubin.shared >= under_way * 2 * tiling.depth * (FILTER_TILE + tiling.features)


@pytest.mark.parametrize(("name", "capability"), cases(GRADIENTS))
def test_gradients_compile(name: str, capability: int) -> None:
    cubin = compiled(gradient_launch(name, capability, "distill" in name), capability)
    assert cubin.count(TENSOR_CORES[capability])
    assert cubin.count(r"LDGSTS\.E[.\w]*\.128[.\w]*" if capability < 90 else r"UTMALDG[.\w]*")
    assert cubin.count(r"STG\.E\.128[.\w]*")
    compiled(gradient_launch(name, capability, "distill" not in name), capability)


#: Whose trials are compiled: light ones, and the heaviest of each number of streams.
TRIED = ["logprob", "distill", "distill_advantage"]


@pytest.mark.parametrize("capability", [80, 90, 100] if EVERYTHING else [90])
@pytest.mark.parametrize("name", ["token_stats", *TRIED] if EVERYTHING else ["logprob"])
def test_trials_of_statistics_compile(name: str, capability: int) -> None:
    """What autotuning measures; by default, the first."""
    trials = tiling_trials(capability, shipped_for_statistics(name, capability))
    for tiling in trials if EVERYTHING else trials[:1]:
        shape = 8192, 128256, 4096
        launch, _ = statistics_launches(name, capability, torch.bfloat16, shape, tiling)
        compiled(launch, capability)


@pytest.mark.parametrize("filtered", [False, True] if EVERYTHING else [True])
@pytest.mark.parametrize("capability", [80, 90, 100] if EVERYTHING else [100])
@pytest.mark.parametrize("name", ["logprob_capped", *TRIED] if EVERYTHING else ["logprob"])
def test_trials_of_gradients_compile(name: str, capability: int, filtered: bool) -> None:
    shipped = shipped_for_gradient(name, capability, filtered)
    trials = tiling_trials(capability, shipped, filtered=filtered)
    for tiling in trials if EVERYTHING else trials[:1]:
        compiled(gradient_launch(name, capability, filtered, tiling), capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_smallest_shapes_compile(capability: int) -> None:
    """A 1 is a constant to Triton, and no tensor."""
    for launch in statistics_launches("distill", capability, torch.float16, (1, 1, 16)):
        compile_kernel(
            *(launch.kernel, launch.arguments, launch.constants),
            capability=capability,
            **launch.options,
        )


def test_what_kernels_cannot_read() -> None:
    """Rows that cannot be read 16 bytes at a time are the library's product to read."""
    hidden = torch.empty(33, 128, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(507, 128, dtype=torch.bfloat16, device="meta")
    good = Operands([hidden], [weight], (None,), [PLAIN])
    assert good.readable
    for other in (weight[:, 1:], weight[:, :123], weight[:, ::2], weight.t()[:, :496]):
        assert not Operands([hidden[:, : other.shape[1]]], [other], (None,), [PLAIN]).readable
    assert not Operands([hidden.float()], [weight.float()], (None,), [PLAIN]).readable


LARGEST = [(1, 80), (64, 90), (topk.MOST, 100)]
EVERY_LARGEST = [(k, capability) for k in (1, 64, topk.MOST) for capability in (80, 90, 100)]


@pytest.mark.parametrize(("k", "capability"), EVERY_LARGEST if EVERYTHING else LARGEST)
def test_topk_compiles(k: int, capability: int) -> None:
    with torch.device("meta"):
        stream = Stream(torch.empty(0), torch.empty(0), torch.empty(32064), CAPPED)
        logits = torch.empty(4096, 32064, dtype=torch.bfloat16)
        state = torch.empty(2 * k, 4096, dtype=torch.float64)
    cubin = compiled(topk.merge_largest(stream, logits, 0, state), capability)
    assert cubin.count(r"LDG\.E\.(64|128)[.\w]*")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_gathers_compile(capability: int) -> None:
    """Weight rows are read 16 bytes at a time, and nothing is added atomically."""
    rows, vocab, size, k = 8192, 128256, 4096, 64
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, size, dtype=torch.bfloat16) for n in (rows, vocab))
        ids, counted = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
        z, pairs = torch.empty(rows, k), torch.empty(rows * k, dtype=torch.int64)
        given = GivenTokens(hidden, weight, ids, counted)
    for launch in (
        gather.gather_logits(given, z),
        gather.gather_hidden(given, z, hidden),
        gather.scatter_weight(z, hidden, pairs, pairs, weight),
    ):
        cubin = compiled(launch, capability)
        assert cubin.count(r"LDG\.E\.128[.\w]*")
        assert not cubin.count(r"(ATOM[GS]?|RED)(\.[.\w]*)?")


def test_splits_fill_the_device() -> None:
    for row_tiles in (1, 3, 17, 64, 1000):
        for col_tiles in (1, 5, 501, 2004):
            splits = choose_splits(row_tiles, col_tiles, 132, 16, 10**6)
            assert 1 <= splits <= col_tiles
            busy = row_tiles * splits
            steps = -(-busy // 132) * -(-col_tiles // splits)
            if row_tiles * col_tiles >= 20 * 132:
                assert row_tiles * col_tiles >= 0.85 * 132 * steps, (row_tiles, col_tiles, splits)
    assert choose_splits(64, 501, 132, 16, 3) == 3
    assert choose_splits(64, 501, 132, 16, 0) == 1
