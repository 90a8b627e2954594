"""Block sizes of the kernels that multiply: data, with the reason of each."""

from __future__ import annotations

from dataclasses import dataclass

from pad_kernels.backends.traits import traits


@dataclass(frozen=True)
class Tiling:
    """Shape of a kernel that multiplies.

    Args:
        rows: token rows of a tile.
        cols: vocabulary entries of a tile.
        depth: hidden features of one step of the product.
        warps: of a program.
        stages: steps whose tiles are under way at a time.
        group: token tiles that run side by side, see ``tiles.place``.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 16


# Accumulators of all streams are in registers at once and 8 warps have 64 Ki of them: a tile of
# 128 x 256 float32 takes half, and the epilogue needs most of the rest. So tiles shrink with every
# stream, and again if more than one moment, sum or greedy token is wanted (``_FULL``): the largest
# that the compiler fits into 255 registers a thread. A group of 16 token tiles of 128 rows has
# 16 MiB of hidden states at H = 4096 in half precision, which stay in the L2 cache (40 MiB on an
# A100, 50 on an H100) while the weight goes by. By generation, then streams.
_LIGHT = {
    # Steps of 32 features: four stages are 64 KiB, so that two programs share a multiprocessor.
    80: {
        1: Tiling(128, 128, 32, 8, 4),
        2: Tiling(128, 64, 32, 8, 4),
        3: Tiling(128, 64, 32, 8, 4),
        4: Tiling(64, 64, 32, 8, 4),
    },
    # wgmma reads both operands from shared memory: 128 entries a step keep it fed, 64 nearly do.
    90: {
        1: Tiling(128, 128, 64, 8, 4),
        2: Tiling(128, 128, 64, 8, 4),
        3: Tiling(128, 64, 64, 8, 4),
        4: Tiling(128, 64, 64, 8, 4),
    },
    # Accumulators are in tensor memory, but come through registers whole.
    100: {
        1: Tiling(128, 128, 64, 8, 4),
        2: Tiling(128, 64, 64, 8, 4),
        3: Tiling(128, 64, 64, 8, 4),
        4: Tiling(128, 32, 64, 8, 4),
    },
}
_FULL = {
    80: {1: _LIGHT[80][2], 2: _LIGHT[80][2], 3: _LIGHT[80][4], 4: _LIGHT[80][4]},
    90: {1: _LIGHT[90][1], 2: _LIGHT[90][3], 3: _LIGHT[90][3], 4: _LIGHT[90][4]},
    100: {1: _LIGHT[100][2], 2: _LIGHT[100][2], 3: _LIGHT[100][4], 4: _LIGHT[100][4]},
}
#: With the tail of some ids: one more tile of logits, in which the ids are looked for.
_TAILED = {
    80: {1: _LIGHT[80][4], 2: _LIGHT[80][4], 3: Tiling(64, 32, 32, 8, 4)},
    90: {1: _LIGHT[90][3], 2: _LIGHT[100][4], 3: _LIGHT[100][4]},
    100: {1: _LIGHT[100][2], 2: _LIGHT[100][4], 3: _LIGHT[100][4]},
}
#: A gradient behind a soft cap, where raw products, logits and slopes are alive together.
_CURVED = {
    80: _FULL[80],
    90: {1: _LIGHT[90][3], 2: _LIGHT[90][3], 3: _LIGHT[100][4], 4: _LIGHT[100][4]},
    100: _FULL[100],
}
#: One stream without a head transform and nothing besides: the widest instructions.
_WIDE = Tiling(128, 256, 64, 8, 3)

#: What autotuning tries beside the shipped sizes, by generation; see ``tiling_trials``.
TRIALS = {
    80: (
        Tiling(128, 128, 32, 8, 3),  # fewer stages: more of the L1 cache is one
        Tiling(128, 128, 32, 8, 4, 8),  # half as many hidden states side by side in a small L2
        Tiling(64, 128, 32, 4, 4),  # half the tile: more programs, which hide each other's epilogue
        Tiling(128, 64, 64, 8, 3),  # deeper steps: half as many barriers; twice as wide they spill
        Tiling(64, 64, 32, 8, 3),  # more spill where three streams have everything
    ),
    90: (
        Tiling(128, 256, 64, 8, 4),  # a stage more; nearly all shared memory
        Tiling(256, 128, 64, 8, 3),  # two tall wgmmas instead of a wide one
        Tiling(128, 128, 64, 8, 3),  # fewer stages: two programs share a multiprocessor
        Tiling(128, 128, 128, 8, 2),  # deeper steps: half as many barriers
        Tiling(128, 128, 64, 8, 4, 8),  # half as many hidden states side by side
        Tiling(64, 128, 64, 4, 4),  # half the tile, one warp group: two programs hide each other's
        Tiling(128, 64, 64, 8, 3),  # fewer stages, and deeper steps, for what has several streams
        Tiling(128, 64, 128, 8, 3),
        Tiling(128, 32, 128, 8, 3),
    ),
    100: (
        Tiling(128, 128, 64, 8, 3),  # as on Hopper
        Tiling(128, 128, 128, 8, 2),
        Tiling(128, 128, 64, 8, 4, 8),
        Tiling(128, 64, 64, 8, 3),
        Tiling(128, 64, 128, 8, 3),
        Tiling(128, 32, 128, 8, 3),
    ),
}

#: Streams of one kernel.
MOST_STREAMS = traits("triton").fuses
#: Rows of a program that merges vocabulary splits.
MERGE_ROWS = 128


def generation(capability: int) -> int:
    """The generation whose block sizes fit: Ampere's are small enough for every other device."""
    known = capability // 10 * 10
    return known if known in (90, 100) else 80


def statistics_tiling(
    capability: int, streams: int, extras: int, *, plain: bool, tail: bool
) -> Tiling:
    """For fused statistics.

    Args:
        capability: 90 for sm_90.
        streams: whose logits are computed.
        extras: moments, sums, greedy tokens and lists of ids that are wanted besides normalisers.
        plain: whether no head transforms its logits.
        tail: whether the normaliser outside a list is wanted.
    """
    known = generation(capability)
    if tail:
        return _LIGHT[known][3] if (streams, extras) == (1, 1) else _TAILED[known][streams]
    if known == 90 and streams == 1 and extras == 0 and plain:
        return _WIDE
    return (_FULL if extras > 1 else _LIGHT)[known][streams]


def gradient_tiling(capability: int, tiles: int, *, plain: bool, filtered: bool) -> Tiling:
    """For the fused gradient.

    Nothing is carried from tile to tile, and yet a wide tile spills on Blackwell with Triton 3.6.
    One that finds the largest magnitudes for the filter has the filter's tile where that fits.

    Args:
        capability: 90 for sm_90.
        tiles: of numbers that are alive together: for each stream, and what a tail shares.
        plain: whether no head transforms its logits.
        filtered: whether the largest magnitudes are wanted.
    """
    known = generation(capability)
    if plain and tiles == 1:
        return _WIDE if known == 90 and not filtered else _LIGHT[known][1]
    return _LIGHT[known][tiles] if plain and not filtered else _CURVED[known][tiles]


def tiling_trials(capability: int, shipped: Tiling, *, filtered: bool = False) -> list[Tiling]:
    """What to measure a shipped tiling against.

    Never more sums a warp: the shipped sizes have what fits into registers. A gradient that is
    filtered keeps its tile, which the filter's is made of, or is.
    """

    def sums(tiling: Tiling) -> int:
        return tiling.rows * tiling.cols // tiling.warps

    shape = shipped.rows, shipped.cols
    return [
        t
        for t in TRIALS[generation(capability)]
        if sums(t) <= sums(shipped) and (not filtered or (t.rows, t.cols) == shape)
    ]


@dataclass(frozen=True)
class LiveTiling:
    """Shape of a product over live tiles: how many features of H, and of one step.

    Args:
        features: of H that a program adds up, for one tile's rows or columns.
        depth: rows or columns of dL/dz of one step; divides the filter's tile.
        warps: of a program.
        stages: of the pipeline. The list's entry, the entry's place in the vocabulary and the
            matrices are read one after the other, so that two stages hold no matrix yet.
    """

    features: int
    depth: int
    warps: int
    stages: int


#: The widest that the compiler fits into registers; at 128 x 256 a step's operands are 48 KiB for
#: 4.2 Mflop, at 128 x 128 32 KiB for 2.1. Blackwell's sums come through registers when they are
#: added to what is there.
LIVE = {
    80: LiveTiling(128, 32, 8, 7),
    90: LiveTiling(256, 64, 8, 5),
    100: LiveTiling(128, 64, 8, 5),
}
#: What autotuning tries beside them: fewer stages, so that more programs share a multiprocessor or
#: its L1 cache; deeper steps, which are half as many barriers; half the features and warps, so that
#: there are programs enough where few lines of tiles are.
LIVE_TRIALS = {
    80: (LiveTiling(128, 32, 8, 6), LiveTiling(128, 64, 8, 6), LiveTiling(64, 32, 4, 8)),
    90: (LiveTiling(256, 64, 8, 4), LiveTiling(128, 64, 8, 5), LiveTiling(128, 128, 8, 4)),
    100: (LiveTiling(128, 64, 8, 4), LiveTiling(128, 128, 8, 3), LiveTiling(64, 64, 4, 5)),
}


def choose_splits(row_tiles: int, col_tiles: int, processors: int, group: int, most: int) -> int:
    """Into how many parts to split the vocabulary, at most ``most``.

    At least so many that one group of token tiles keeps every processor busy; among up to four
    times that, the number that leaves the fewest idle in the last round.
    """
    least = -(-processors // min(group, row_tiles))
    most = max(min(most, col_tiles), 1)

    def steps(splits: int) -> int:
        """Column tiles that the busiest processor goes through."""
        return -(-row_tiles * splits // processors) * -(-col_tiles // splits)

    candidates = range(min(least, most), min(4 * least, most) + 1)
    return min(candidates, key=lambda splits: (steps(splits), splits))
