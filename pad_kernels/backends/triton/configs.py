"""Block sizes of the Triton kernels: data, with the reason of each."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of one access of one thread: the widest there is before Blackwell, and wide enough there.
ACCESS = 16


@dataclass(frozen=True)
class RowConfig:
    """Shape of a row pass.

    Args:
        warps: of a program.
        depth: accesses of 16 bytes that each thread has under way, per stream.
    """

    warps: int
    depth: int

    def lanes(self, itemsize: int) -> int:
        """Columns that one access of every thread covers."""
        return self.warps * 32 * ACCESS // itemsize

    def tile(self, itemsize: int) -> int:
        """Columns of one step."""
        return self.depth * self.lanes(itemsize)


#: By the number of streams. A lane's running numbers live in registers, eight lanes a thread in
#: half precision: more streams leave room for fewer entries. 4 x 16 bytes x 128 threads x 8
#: programs are 64 KiB under way on a multiprocessor, above what hides the latency of its share of
#: the memory (about 40 KiB on an H100).
STATISTICS = {1: RowConfig(4, 4), 2: RowConfig(4, 2), 3: RowConfig(4, 1), 4: RowConfig(4, 1)}
#: Blackwell reads half precision faster than it takes exponentials, and a tile costs one for each
#: lane besides one for each entry: deeper tiles, fewer of the former.
STATISTICS_BLACKWELL = {**STATISTICS, 1: RowConfig(4, 8), 2: RowConfig(4, 4)}
#: Nothing is carried from tile to tile here; the limit is what one tile needs.
GRADIENT = {1: RowConfig(4, 4), 2: RowConfig(4, 2), 3: RowConfig(4, 1), 4: RowConfig(4, 1)}
#: A divergence of two sweeps takes about 80 instructions and 20 temporaries an entry.
OUTCOMES = RowConfig(4, 1)

#: What autotuning tries beside them, by streams: twice or half as many accesses under way, where
#: twice as many fit into registers on every device, and programs of twice or half the warps, which
#: have more lanes to join at the end of a row or fewer.
TRIALS = {
    1: (RowConfig(4, 2), RowConfig(4, 8), RowConfig(8, 2), RowConfig(8, 4)),
    2: (RowConfig(4, 1), RowConfig(4, 4), RowConfig(8, 1), RowConfig(8, 2)),
    3: (RowConfig(2, 1), RowConfig(8, 1)),
    4: (RowConfig(2, 1), RowConfig(8, 1)),
}
#: Beside ``OUTCOMES``. Fewer warps leave a stack frame on Blackwell.
OUTCOMES_TRIALS = (RowConfig(8, 1),)

#: Programs for each multiprocessor: several waves of what fits, so that the last one is small.
PROGRAMS = 32
#: Programs of a grid's second axis, at most.
MOST_SPLITS = 65535
#: Rows of a program that merges parts of rows.
MERGE_ROWS = 128


def statistics_config(capability: int, streams: int) -> RowConfig:
    """Of a first-sweep statistics pass; ``capability`` is 90 for sm_90."""
    return (STATISTICS_BLACKWELL if capability >= 100 else STATISTICS)[streams]


def gradient_config(streams: int, curved: bool) -> RowConfig:
    """Of a gradient pass over the streams that it reads."""
    return OUTCOMES if curved else GRADIENT[streams]


def tiles_of_split(rows: int, cols: int, tile: int, multiprocessors: int) -> int:
    """Tiles of a program: whole rows where there are many, else what fills the device."""
    tiles = max(-(-cols // tile), 1)
    splits = min(max(multiprocessors * PROGRAMS // max(rows, 1), 1), tiles, MOST_SPLITS)
    return -(-tiles // splits)
