"""Ascending lists of vocabulary ids, walked beside the vocabulary: of one row, or of a tile's.

A cursor stands in each row's list. A tile asks which of the upcoming ids lie in it, one for each
row at a time, and moves those cursors on; a tile without any costs one comparison a row, however
long the lists are.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Larger than any vocabulary id: what lies behind the end of a list, or was not found.
NOWHERE: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def list_ends(local, count, inside):
    """Places behind each row's list, counted from that of the tile's first row; 0 for no row."""
    return tl.where(inside, (local + 1) * count, 0)


@triton.jit
def upcoming_ids(lists, cursor, ends):
    """The ids at the cursors [BLOCK_M], int32; ``lists`` points at those of the first row."""
    return tl.load(lists + cursor, cursor < ends, other=NOWHERE).to(tl.int32)


@triton.jit
def cursors_at(lists, local, count, ends, least):
    """In each row's list the place of the first id that is not below ``least``, by bisection."""
    low = local * count
    high = tl.maximum(low, ends)
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(lists + middle, searching, other=NOWHERE) < least
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit
def next_column(ids, cursor, count, offset):
    """The column of the id at the cursor of one row's list; far right behind its end."""
    return tl.load(ids + cursor, mask=cursor < count, other=NOWHERE).to(tl.int32) - offset


@triton.jit
def first_at_least(ids, count, least):
    """In one row's list the place of the first id that is not below ``least``, by bisection."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(ids + middle) < least
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low
