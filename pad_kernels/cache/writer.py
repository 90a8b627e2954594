"""Writing a cache: batch by batch, or a head over a dataset; both go on where they were killed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from pad_kernels._checks import (
    FLOATS,
    INTEGERS,
    check_integer,
    check_tensor,
    fail_type,
    fail_value,
)
from pad_kernels.api import linear_topk, option_logprobs
from pad_kernels.cache.info import DTYPES, CacheInfo
from pad_kernels.cache.reader import TeacherCache
from pad_kernels.cache.store import (
    LOCK,
    MANIFEST,
    SUFFIX,
    TEMPORARY,
    Manifest,
    Shard,
    shard_name,
    write_atomically,
)
from pad_kernels.heads import Head

try:
    import fcntl
except ImportError:  # Windows: nothing then keeps a second writer out
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 64 << 20
_VALUES = {
    "teacher": "log-probs <= 0",
    "advantage": "finite log-ratios",
    "hidden": "finite hidden states",
}


class TeacherCacheWriter:
    """Writes a cache batch by batch and, opened on one that was interrupted, goes on with it.

    Batches collect in memory until they fill a shard, which is then safe on disk. Ask ``rows``
    which row comes next, append from there, and call :meth:`finish` after the last. Whoever leaves
    before that, by an exception or a kill, leaves whole shards, with the boundaries that an
    uninterrupted run gives them.

    Args:
        path: directory: a new one, or an unfinished cache with the same ``info``.
        info: what is written.
        shard_bytes: a shard is written once it holds this much: what an interruption can cost, and
            about a quarter of what the writer needs in memory.

    Raises:
        ValueError: the directory holds something else, a damaged cache, or one whose info differs.
        RuntimeError: another writer is at work in it.
    """

    def __init__(self, path: Any, info: CacheInfo, *, shard_bytes: int = SHARD_BYTES) -> None:
        if not isinstance(info, CacheInfo):
            fail_type("info", "a CacheInfo", info)
        self.info = info
        self._limit = check_integer("shard_bytes", shard_bytes, at_least=1)
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        others = {p.name for p in self._path.iterdir()} - {LOCK, MANIFEST + TEMPORARY}
        if others and MANIFEST not in others:
            fail_value("path", "a new or empty directory, or a cache", f"{path} with other files")
        self._lock = lock(self._path / LOCK)
        try:
            self._manifest = self._resume() if others else Manifest(info)
            if not others:
                self._manifest.write(self._path)
        except BaseException:
            self.close()
            raise
        self._buffer: list[tuple[Tensor, Tensor, Tensor]] = []

    def _resume(self) -> Manifest:
        manifest = Manifest.read(self._path)
        manifest.info.check(self.info, str(self._path))
        kept = {shard_name(i) for i in range(len(manifest.shards))}
        for file in [*self._path.glob(f"shard-*{SUFFIX}"), *self._path.glob(f"*{TEMPORARY}")]:
            if file.name not in kept:
                file.unlink()
        return manifest

    @property
    def rows(self) -> int:
        """The next row to append: all before it are on disk or in the buffer."""
        return self._manifest.rows + sum(len(lengths) for _, _, lengths in self._buffer)

    @property
    def complete(self) -> bool:
        """Whether the cache is finished, and takes no more rows."""
        return self._manifest.complete

    def append(self, ids: Tensor | None, values: Tensor, lengths: Sequence[int] | Tensor) -> None:
        """Add some rows, packed one after the other.

        Args:
            ids: integer [tokens, k], distinct in each position, in [0, vocab_size); None for hidden
                states.
            values: floating point [tokens, k], stored as ``info.dtype``: log-probabilities <= 0,
                finite log-ratios, or hidden states.
            lengths: tokens of each row, integers >= 0 that sum to ``tokens``.

        Raises:
            TypeError, ValueError: any of that does not hold, or the cache is finished.
        """
        self._check_open()
        first = values if self.info.kind == "hidden" else ids
        shape = (first.shape[0] if isinstance(first, Tensor) and first.dim() else 0, self.info.k)
        if self.info.kind != "hidden":
            ids = self._checked_ids(ids, shape)
        elif ids is not None:
            fail_type("ids", "None with hidden states", ids)
        else:
            ids = torch.zeros(shape[0], 0, dtype=torch.int32)
        check_tensor("values", values, dtypes=FLOATS, shape=shape)
        sizes = _lengths(lengths, shape[0])
        values = values.detach().cpu()
        good = values <= 0 if self.info.kind == "teacher" else values.isfinite()
        if not bool(good.all()):
            fail_value("values", _VALUES[self.info.kind], values[~good][0].item())
        stored = values.to(DTYPES[self.info.dtype])
        if bool((stored.isinf() & values.isfinite()).any()):
            fail_value("values", f"values in the range of {self.info.dtype}", "values beyond it")
        self._buffer.append((ids.int(), stored.contiguous(), sizes))
        if sum(i.nbytes + v.nbytes for i, v, _ in self._buffer) >= self._limit:
            self._flush()

    def _checked_ids(self, ids: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ids = check_tensor("ids", ids, dtypes=(torch.int64, torch.int32), shape=shape)
        ids = ids.detach().cpu()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.info.vocab_size:
            fail_value("ids", f"ids in [0, {self.info.vocab_size})", "ids outside")
        if bool((ids.sort(-1).values.diff() == 0).any()):
            fail_value("ids", "distinct ids in each position", "one twice")
        return ids

    def _check_open(self) -> None:
        if self.complete or self._lock is None:
            state = (
                f"is finished, with {self.rows} rows" if self.complete else "has a closed writer"
            )
            raise ValueError(f"the cache {self._path} {state}")

    def _flush(self) -> None:
        columns = [torch.cat(parts) for parts in zip(*self._buffer, strict=True)]
        data = save(dict(zip(("ids", "values", "lengths"), columns, strict=True)))
        digest = hashlib.sha256(data).hexdigest()
        shard = Shard(len(columns[2]), len(columns[0]), len(data), digest)
        write_atomically(self._path / shard_name(len(self._manifest.shards)), data)
        manifest = self._manifest.add(shard)
        manifest.write(self._path)
        self._manifest, self._buffer = manifest, []

    def finish(self) -> None:
        """Write what is left and mark the cache as complete."""
        self._check_open()
        if self._buffer:
            self._flush()
        manifest = replace(self._manifest, complete=True)
        manifest.write(self._path)
        self._manifest = manifest

    def close(self) -> None:
        """Let another writer in; rows that do not fill a shard are dropped. A `with` calls it."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(path: Path) -> Any:
    """An open file with an exclusive lock, which the system takes back when the process ends."""
    file = open(path, "wb")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RuntimeError(f"another writer is at work in {path.parent}") from None
        except OSError:  # a file system without locks
            pass
    return file


def _lengths(lengths: Sequence[int] | Tensor, tokens: int) -> Tensor:
    sizes = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths)
    sizes = check_tensor("lengths", sizes, dtypes=INTEGERS, ndim=1).detach().cpu().long()
    if bool((sizes < 0).any()) or int(sizes.sum()) != tokens:
        fail_value("lengths", f"lengths >= 0 that sum to the {tokens} tokens", sizes.tolist()[:16])
    return sizes


def write_teacher_cache(
    path: Any,
    dataset: Iterable[Any],
    run: Callable[[list[Any]], tuple[Any, ...]],
    info: CacheInfo,
    *,
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> TeacherCache:
    """Run a head over a dataset and write its outputs; call it again to go on where it was stopped.

    Args:
        path: the cache's directory.
        dataset: what has a length and is indexed by integers (a list, a `datasets.Dataset`, a torch
            map-style dataset), or any iterable, whose first rows are then skipped on resumption.
            Its order must be the same every time. One example becomes one row.
        run: takes a list of examples; returns ``(head, lengths)``, or for kind "advantage"
            ``(aligned, reference, lengths)``: `pad_kernels.Head`s with hidden states [tokens, H] of
            the examples' tokens, one example after the other, and the tokens of each. Of a padded
            batch that is ``hidden[mask]`` and ``mask.sum(-1)``. Called without gradients.
        info: whose outputs these are; the heads' options and vocabulary must agree with it.
        batch_size: examples per call of ``run``.
        shard_bytes: as in :class:`TeacherCacheWriter`.
        progress: show a progress bar, in rows.

    Returns:
        The cache, open. A cache that was complete is returned as it is, ``run`` is not called.

    Raises:
        TypeError, ValueError: heads, lengths or an existing cache do not fit ``info``; the
            dataset has fewer rows than the cache, or another number than one that is complete.
    """
    check_integer("batch_size", batch_size, at_least=1)
    indexed = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    total = len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]
    with TeacherCacheWriter(path, info, shard_bytes=shard_bytes) as writer:
        start = writer.rows
        if total is not None and (total != start if writer.complete else total < start):
            fail_value("dataset", f"{start} rows as in the cache {path}", f"{total} rows")
        if not writer.complete:
            if indexed and total is not None:
                rest: Iterator[Any] = (dataset[i] for i in range(start, total))  # type: ignore[index]
            else:
                rest = iter(dataset)
                skipped = sum(1 for _ in islice(rest, start))
                if skipped < start:
                    fail_value("dataset", f"the {start} rows of the cache {path}", f"{skipped}")
            with (
                tqdm(total=total, initial=start, unit="row", disable=not progress) as bar,
                torch.no_grad(),
            ):
                while batch := list(islice(rest, batch_size)):
                    writer.append(*_outputs(info, run(batch), len(batch)))
                    bar.update(len(batch))
            if total is not None and writer.rows != total:
                fail_value("dataset", f"as many rows as its length {total}", writer.rows)
            writer.finish()
    return TeacherCache(path, info, verify=False)


def _outputs(
    info: CacheInfo, returned: tuple[Any, ...], rows: int
) -> tuple[Tensor | None, Tensor, Sequence[int] | Tensor]:
    """Ids, values and lengths of a batch from what the caller's function returned."""
    both = info.kind == "advantage"
    names = ("aligned", "reference", "lengths") if both else ("head", "lengths")
    if not isinstance(returned, tuple) or len(returned) != len(names):
        fail_value("run", f"a function that returns ({', '.join(names)})", type(returned).__name__)
    *heads, lengths = returned
    if len(lengths) != rows:
        fail_value("lengths", f"one for each of the {rows} examples", len(lengths))
    info.check_head(names[0], heads[0])
    if info.kind == "hidden":
        return None, heads[0].hidden, lengths
    ids, values = linear_topk(heads[0].hidden, heads[0].weight, info.k, **_options(heads[0]))
    if info.kind == "advantage":
        reference: Head = heads[1]
        info.check_head("reference", reference, "reference_")
        if len(reference.hidden) != len(ids):
            fail_value("reference.hidden", f"{len(ids)} tokens", len(reference.hidden))
        there = ids.to(reference.hidden.device)  # two models need not share a GPU
        logprobs = option_logprobs(reference.hidden, reference.weight, there, **_options(reference))
        values = values - logprobs.to(values.device)
    return ids, values, lengths


def _options(head: Head) -> dict[str, Any]:
    names = ("bias", "softcap", "logit_scale", "temperature", "vocab_size")
    return {name: getattr(head, name) for name in names}
