"""Reading a cache: rows by index, packed, as tensors that the losses take."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from pad_kernels._checks import check_integer, fail_value
from pad_kernels.cache.info import CacheInfo
from pad_kernels.cache.store import Manifest, shard_name
from pad_kernels.offline import TopKAdvantage, TopKTeacher


class CachedRows(NamedTuple):
    """Some rows, one after the other.

    Attributes:
        ids: int64 [tokens, k].
        values: float32 (float64 in a cache of that dtype) [tokens, k]: log-probabilities, or
            log-ratios in a cache of kind "advantage"; hidden states, in the dtype they are stored
            in, in one of kind "hidden", whose ids are [tokens, 0].
        cu_seqlens: int64 [rows + 1], where rows begin and end.
    """

    ids: Tensor
    values: Tensor
    cu_seqlens: Tensor


class TeacherCache:
    """A finished cache of teacher outputs, open for reading. Files are memory-mapped.

    Args:
        path: the cache's directory.
        expect: what the trainer needs. Every field must be the same; None opens any cache, to
            look at its ``info``.
        verify: read every shard now and compare its SHA-256; False does so for each shard when it
            is first used, which opens a large cache at once.

    Raises:
        ValueError: a field of ``expect`` differs; the cache is unfinished, damaged or not there.

    Example:
        >>> import tempfile, torch, pad_kernels as pk
        >>> from pad_kernels.cache import CacheInfo, TeacherCache, write_teacher_cache
        >>> info = CacheInfo("teacher", "0" * 64, vocab_size=10, k=2)
        >>> def run(batch):  # a list of examples, here sequences of 3 tokens, to a head
        ...     return pk.Head(torch.zeros(3 * len(batch), 8), torch.zeros(10, 8)), [3] * len(batch)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = write_teacher_cache(path, range(5), run, info, progress=False)
        ...     cache = TeacherCache(path, info)
        ...     len(cache), cache.pack([4, 0]).ids.shape
        (5, torch.Size([6, 2]))
    """

    def __init__(self, path: Any, expect: CacheInfo | None, *, verify: bool = True) -> None:
        self._path = Path(path)
        self._manifest = Manifest.read(self._path)
        self.info = self._manifest.info
        if expect is not None:
            self.info.check(expect, str(self._path))
        if not self._manifest.complete:
            rows = self._manifest.rows
            raise ValueError(
                f"the cache {self._path} is unfinished: {rows} rows so far; write the rest of it"
            )
        self._starts = list(accumulate((shard.rows for shard in self._manifest.shards), initial=0))
        self._open: dict[int, tuple[Any, Tensor]] = {}
        self._verified: set[int] = set()
        if verify:
            for index in range(len(self._manifest.shards)):
                self._verify(index)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file does not travel to a data loader's worker, which maps its own.
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self._manifest.rows

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Ids int64 [T, k] and values [T, k] of one row; negative indices count from the end."""
        return self.pack([row])[:2]

    def _verify(self, index: int) -> None:
        self._manifest.shards[index].check_content(self._path / shard_name(index))
        self._verified.add(index)

    def _shard(self, index: int) -> tuple[Any, Tensor]:
        """The mapped file and where in it rows begin and end, int64 [rows + 1]."""
        if index not in self._open:
            if index not in self._verified:
                self._verify(index)
            file = safe_open(self._path / shard_name(index), "pt")
            bounds = torch.nn.functional.pad(file.get_tensor("lengths").cumsum(0), (1, 0))
            self._open[index] = file, bounds
        return self._open[index]

    def pack(self, rows: Sequence[int] | Tensor) -> CachedRows:
        """Rows by index, in the order given, packed one after the other.

        Raises:
            TypeError, IndexError: not integers; out of range.
        """
        indices = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        ids, values, lengths = [], [], [0]
        for row in indices:
            number = check_integer("row", row)
            if not -len(self) <= number < len(self):
                raise IndexError(f"row: expected one of the cache's {len(self)} rows, got {number}")
            number %= len(self)
            index = bisect_right(self._starts, number) - 1
            file, bounds = self._shard(index)
            start, end = bounds[number - self._starts[index] :][:2].tolist()
            ids.append(file.get_slice("ids")[start:end])
            values.append(file.get_slice("values")[start:end])
            lengths.append(end - start)
        if not ids:
            fail_value("rows", "at least one row", "none")
        packed = torch.cat(values)  # copies: what is returned is never the mapped file
        narrow = packed.dtype == torch.float16 and self.info.kind != "hidden"
        wide = packed.float() if narrow else packed
        return CachedRows(torch.cat(ids).long(), wide, torch.tensor(lengths).cumsum(0))

    def batches(self, batch_size: int) -> Iterator[CachedRows]:
        """All rows in order, ``batch_size`` at a time; the last batch may be smaller."""
        size = check_integer("batch_size", batch_size, at_least=1)
        for start in range(0, len(self), size):
            yield self.pack(range(start, min(start + size, len(self))))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [rows]: for sorting into buckets, or comparing with labels."""
        shards = [self._shard(i)[1].diff() for i in range(len(self._manifest.shards))]
        return torch.cat(shards) if shards else torch.zeros(0, dtype=torch.int64)

    def teacher(
        self, rows: Sequence[int] | Tensor, *, tail: str = "bucket", device: Any = None
    ) -> TopKTeacher:
        """Rows of a cache of kind "teacher", packed, as the losses take them.

        Args:
            rows: as in :meth:`pack`; the student's hidden states [tokens, H] are packed alike.
            tail: as in :class:`pad_kernels.TopKTeacher`.
            device: where to put them; default the CPU.
        """
        ids, logprobs = self._of_kind("teacher", rows, device)
        return TopKTeacher(ids, logprobs, tail)

    def advantage(self, rows: Sequence[int] | Tensor, *, device: Any = None) -> TopKAdvantage:
        """Rows of a cache of kind "advantage", packed; arguments as in :meth:`teacher`."""
        return TopKAdvantage(*self._of_kind("advantage", rows, device))

    def hidden(self, rows: Sequence[int] | Tensor, *, device: Any = None) -> Tensor:
        """Hidden states [tokens, H] from a cache of kind "hidden"; arguments as in :meth:`teacher`.

        They and the teacher's weight make a :class:`pad_kernels.Head`.
        """
        return self._of_kind("hidden", rows, device)[1]

    def _of_kind(
        self, kind: str, rows: Sequence[int] | Tensor, device: Any
    ) -> tuple[Tensor, Tensor]:
        if self.info.kind != kind:
            fail_value("kind", f"a cache of kind {kind!r}", repr(self.info.kind))
        packed = self.pack(rows)
        return packed.ids.to(device), packed.values.to(device)
