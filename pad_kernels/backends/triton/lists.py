"""Ascending lists of vocabulary ids, one for each row of a tile, walked beside the vocabulary.

A cursor stands in each row's list. A tile asks which of the upcoming ids lie in it, one for each
row at a time, and moves those cursors on; a tile without any costs one comparison a row, however
long the lists are.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Larger than any vocabulary id: what lies behind the end of a list.
NOWHERE: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def upcoming_ids(lists, cursor, count, inside):
    """The ids at the cursors [BLOCK_M], int32; ``lists`` points at each row's first."""
    return tl.load(lists + cursor, inside & (cursor < count), other=NOWHERE).to(tl.int32)


@triton.jit
def cursors_at(lists, count, least, inside):
    """In each row's list the place of the first id that is not below ``least``, by bisection."""
    low = inside.to(tl.int32) * 0
    high = low + count
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        below = upcoming_ids(lists, middle, count, inside & searching) < least
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low
