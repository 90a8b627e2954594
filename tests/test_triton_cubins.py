"""Every Triton kernel compiled for devices that are not here, and what its machine code shows.

``PAD_KERNELS_CUBINS=all`` compiles every example in every dtype for every device (``make
check-kernels``); by default, a few that have all that there is between them.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from pad_kernels.backends.triton import aot, configs
from pad_kernels.backends.triton.launch import Launch
from pad_kernels.backends.triton.passes import transform
from pad_kernels.backends.triton.shipped import EXAMPLES, launches
from pad_kernels.heads import HeadOptions

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Each kernel in each dtype, and on each device one stream, several, and two sweeps.
FEW = [
    ("cross_entropy", "bfloat16", 80),
    ("cross_entropy", "bfloat16", 90),
    ("cross_entropy", "bfloat16", 100),
    ("stats", "float32", 90),
    ("cross_entropy_capped", "float32", 100),
    ("cross_entropy_filtered", "float16", 90),
    ("forward_kl", "bfloat16", 100),
    ("advantage", "float16", 80),
    ("topk_teacher", "bfloat16", 80),
    ("jsd", "bfloat16", 90),
    ("distill_jsd", "bfloat16", 90),
    ("distill", "float32", 80),
]
ALL = [(name, dtype, sm) for name in EXAMPLES for dtype in DTYPES for sm in aot.CAPABILITIES]
CASES = ALL if os.environ.get("PAD_KERNELS_CUBINS") == "all" else FEW


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


@pytest.mark.parametrize(("name", "dtype", "capability"), CASES)
def test_row_passes(name: str, dtype: str, capability: int) -> None:
    for launch in launches(EXAMPLES[name], DTYPES[dtype], capability):
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


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_transform(capability: int) -> None:
    check(transform(HeadOptions(30.0, 0.9, 0.7), torch.empty(100, device="meta")), capability)


def test_rows_that_are_not_aligned_still_compile() -> None:
    """An odd vocabulary: no wide accesses, and nothing in local memory either."""
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
