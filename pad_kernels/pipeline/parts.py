"""A stage's output: Parquet files, written one after the other, and a manifest of them.

A file is there whole or not at all, and counts once the manifest lists it. Files hold fixed ranges
of rows, and what goes into one depends on nothing before it: a stage that was killed goes on at
the first file that is missing, and writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pad_kernels.cache.store import write_atomically
from pad_kernels.cache.writer import lock

MANIFEST, LOCK = "manifest.json", "writer.lock"
FORMAT = "pad_kernels rows, version 1"

#: Columns of some rows, and a function to call with the number of rows done.
Make = Callable[[int, int, Callable[[int], Any]], dict[str, pa.Array]]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read one that was written so.

    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@contextmanager
def claimed(folder: Path, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hold a folder for what ``identity`` says, and no other.

    Args:
        folder: made if it is not there.
        identity: nested mappings; what is computed depends on all of it.

    Yields:
        The manifest so far; ``{"format": ..., "identity": ...}`` in a new folder.

    Raises:
        ValueError: the folder was begun with something else; the first difference is named.
        RuntimeError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder / LOCK)
    try:
        path = folder / MANIFEST
        identity = json.loads(json.dumps(identity))
        work = [each.name for each in folder.iterdir() if not _bookkeeping(each.name)]
        if work and not path.exists():
            expected = "a new or empty folder or one of this command's"
            raise ValueError(f"{folder}: expected {expected}, got one with {work[0]!r}")
        if not work:  # new, or only claimed: what went wrong then may have been a setting
            write_json(path, {"format": FORMAT, "identity": identity})
        manifest = read_manifest(path)
        for name in _difference(manifest["identity"], identity):
            raise ValueError(
                f"{folder} was begun with {name}. Choose another 'out' for this configuration, or "
                f"remove {folder} to begin anew"
            )
        yield manifest
    finally:
        held.close()


def _bookkeeping(name: str) -> bool:
    return name.startswith(MANIFEST) or name == LOCK


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest.

    Raises:
        ValueError: it is damaged.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is damaged: it is no manifest of {FORMAT!r}")
    return manifest


def _difference(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where two identities differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({**old, **new}):
            inner = f"{name}.{key}" if name else key
            yield from _difference(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{name} = {old!r}, not {new!r}"


def write(
    folder: Path, identity: dict[str, Any], rows: datasets.Dataset, shard_rows: int, make: Make
) -> None:
    """Write rows with more columns, going on where an earlier call was stopped.

    Args:
        folder: the stage's.
        identity: see :func:`claimed`; ``shard_rows`` should be in it.
        rows: what the columns are added to.
        shard_rows: rows in a file.
        make: from a range of rows to the columns.
    """
    with claimed(folder, identity) as manifest:
        files = manifest.setdefault("files", [])
        manifest["rows"] = len(rows)
        for each in folder.glob("part-*"):
            if each.name not in {entry["name"] for entry in files}:
                each.unlink()
        for entry in files:
            _check(folder, entry)
        done = sum(entry["rows"] for entry in files)
        arrow = rows.with_format("arrow")
        with tqdm(total=len(rows), initial=done, unit="row", desc=folder.name) as bar:
            for start in range(done, len(rows), shard_rows):
                stop = min(start + shard_rows, len(rows))
                table = arrow[start:stop]
                for name, column in make(start, stop, bar.update).items():
                    table = table.append_column(name, column)
                name = f"part-{len(files):05d}.parquet"
                data = _encoded(table)
                write_atomically(folder / name, data)
                digest = hashlib.sha256(data).hexdigest()
                files.append({"name": name, "rows": stop - start, "sha256": digest})
                write_json(folder / MANIFEST, manifest)


def _encoded(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None), buffer)
    return buffer.getvalue().to_pybytes()


def _check(folder: Path, entry: dict[str, Any]) -> Path:
    """A file that the manifest lists, unless it is not the one that was written."""
    path = folder / entry["name"]
    if not path.is_file():
        raise ValueError(f"{path} is damaged: the file is missing. Remove {folder} to begin anew")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ValueError(
            f"{path} is damaged: it has not the SHA-256 that its manifest names. Remove {folder} "
            "to begin anew"
        )
    return path


def finished(where: str, folder: Path) -> list[Path]:
    """The files of a finished stage, in order.

    Raises:
        ValueError: it is unfinished or damaged.
    """
    manifest = read_manifest(folder / MANIFEST)
    files = manifest.get("files", [])
    done = sum(entry["rows"] for entry in files)
    if done != manifest.get("rows"):
        total = manifest.get("rows", "unknown")
        raise ValueError(
            f"{where}: {folder} is unfinished, {done} of {total} rows: run its command again"
        )
    return [_check(folder, entry) for entry in files]
