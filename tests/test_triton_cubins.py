"""Every Triton kernel compiled for devices that are not here, and what its machine code shows.

``PAD_KERNELS_CUBINS=all`` compiles every example in every dtype for every device (``make
check-kernels``); by default, a few that have all that there is between them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from pad_kernels.backends.triton import aot, autotune, configs
from pad_kernels.backends.triton.launch import Launch
from pad_kernels.backends.triton.passes import transform
from pad_kernels.backends.triton.shipped import EXAMPLES, launches
from pad_kernels.heads import HeadOptions

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Columns of a block, and how far its rows are apart: as many; padded, what 16 does not divide.
ALIGNED, PADDED = (32064, 32064), (50257, 50272)
#: Each kernel in each dtype, and on each device one stream, several, and two sweeps.
FEW = [
    ("cross_entropy", "bfloat16", 80, ALIGNED),
    ("cross_entropy", "bfloat16", 90, PADDED),
    ("cross_entropy", "bfloat16", 100, ALIGNED),
    ("stats", "float32", 90, PADDED),
    ("cross_entropy_capped", "float32", 100, ALIGNED),
    ("cross_entropy_filtered", "float16", 90, PADDED),
    ("forward_kl", "bfloat16", 100, PADDED),
    ("advantage", "float16", 80, ALIGNED),
    ("topk_teacher", "bfloat16", 80, PADDED),
    ("jsd", "bfloat16", 90, ALIGNED),
    ("distill_jsd", "bfloat16", 90, PADDED),
    ("distill", "float32", 80, ALIGNED),
]
#: A bias has no padding, and is read entry by entry.
ALL = [
    (name, dtype, sm, block)
    for name, example in EXAMPLES.items()
    for dtype in DTYPES
    for sm in aot.CAPABILITIES
    for block in ((ALIGNED,) if example.biased else (ALIGNED, PADDED))
]
EVERYTHING = os.environ.get("PAD_KERNELS_CUBINS") == "all"
CASES = ALL if EVERYTHING else FEW
#: Whose trials are compiled: of each number of streams a light and a heavy one.
TRIED = ["stats", "forward_kl", "distill_jsd", "skew_reverse_kl"]


def compiled(launch: Launch, capability: int) -> aot.Cubin:
    return aot.compile_kernel(
        launch.kernel, launch.arguments, launch.constants, capability=capability, **launch.options
    )


def check(launch: Launch, capability: int) -> aot.Cubin:
    """What holds for every kernel: nothing in local memory, shared memory that the device has."""
    found = compiled(launch, capability)
    assert found.stack == 0, f"{found.stack} bytes a thread in local memory"
    assert found.local_accesses == 0
    assert found.shared <= aot.SHARED_MEMORY[capability]
    assert found.scratch == 0  # nobody has set an allocator
    return found


@pytest.mark.parametrize(("name", "dtype", "capability", "block"), CASES)
def test_row_passes(name: str, dtype: str, capability: int, block: tuple[int, int]) -> None:
    for launch in launches(EXAMPLES[name], DTYPES[dtype], capability, 4096, *block):
        found = check(launch, capability)
        if launch.kernel.__name__ == "merge_statistics":
            continue
        logits = launch.arguments["logits"]
        depth = launch.constants["DEPTH"]
        wide, loads = found.count(r"LDG[.A-Z]*\.128[.\w]*"), found.count(r"LDG[.\w]*")
        assert wide >= depth * len(logits), f"{wide} loads of 16 bytes"
        # The others read one number for the whole row: coefficients, places in lists.
        assert loads - wide <= launch.constants.get("FIELDS", 5) + 8
        if launch.kernel.__name__ == "row_gradient":
            assert found.count(r"STG[.A-Z]*\.128[.\w]*") == found.count(r"STG[.\w]*") == depth


@pytest.mark.parametrize(
    ("name", "capability", "place"),
    [(name, sm, place) for name in TRIED for sm in aot.CAPABILITIES for place in range(4)]
    if EVERYTHING
    else [("skew_reverse_kl", 90, 1)],
)
def test_trials_of_row_passes(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: int, place: int
) -> None:
    """Each kernel in the shapes that autotuning measures beside the shipped one."""

    def choose(key: str, like: object, shipped: Any, trials: Any, attempt: object) -> Any:
        return trials[min(place, len(trials) - 1)]

    monkeypatch.setattr(autotune, "choose", choose)
    for launch in launches(EXAMPLES[name], torch.bfloat16, capability):
        check(launch, capability)


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_transform(capability: int) -> None:
    check(transform(HeadOptions(30.0, 0.9, 0.7), torch.empty(100, device="meta")), capability)


def test_rows_that_are_not_aligned_still_compile() -> None:
    """Kept logits of an odd vocabulary: no wide accesses, and nothing in local memory either."""
    for launch in launches(EXAMPLES["forward_kl"], torch.bfloat16, 90, cols=50257):
        found = check(launch, 90)
        assert found.count(r"STG[.A-Z]*\.128[.\w]*") == 0


def test_a_spill_would_be_seen() -> None:
    """What the checks are worth: the same kernel with too few registers has local memory."""
    launch = next(iter(launches(EXAMPLES["distill"], torch.bfloat16, 90)))
    options = {**launch.options, "maxnreg": 40}
    found = aot.compile_kernel(
        launch.kernel, launch.arguments, launch.constants, capability=90, **options
    )
    assert found.stack > 0 and found.local_accesses > 0


def test_every_row_is_covered_and_the_device_is_full() -> None:
    tile = 4096
    for rows in (1, 5, 100, 4096, 100_000):
        for cols in (1, 507, 4096, 128_256, 10**9):
            tiles = configs.tiles_of_split(rows, cols, tile, 132)
            splits = -(-cols // (tiles * tile))
            assert 1 <= splits <= configs.MOST_SPLITS
            assert (splits - 1) * tiles * tile < cols <= splits * tiles * tile
            if cols == 128_256:
                assert rows * splits >= min(132 * 8, rows * -(-cols // tile))
