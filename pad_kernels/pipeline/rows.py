"""Data sets from files and folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from pad_kernels.pipeline import parts

#: Files up to this size are hashed whole; of larger ones this many pieces of PIECE bytes each,
#: evenly spread: other weights differ everywhere.
WHOLE, PIECES, PIECE = 64 << 20, 64, 1 << 20


def read(where: str, path: str) -> datasets.Dataset:
    """Rows of a .jsonl or .parquet file, of a folder of these, or of one from `save_to_disk`.

    Args:
        where: what the path is called in messages.
        path: it.

    Raises:
        ValueError: there is no such thing, it cannot be read or has no rows.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{where}: there is no {path}")
    try:
        if (place / "state.json").is_file():
            return _checked(where, path, datasets.load_from_disk(path))
        if place.is_dir() and (place / parts.MANIFEST).is_file():
            files = parts.finished(where, place)
        elif place.is_dir():
            files = sorted(each for each in place.iterdir() if each.suffix in _READERS)
        else:
            files = [place]
        if not files or any(each.suffix not in _READERS for each in files):
            expected = "a .jsonl or .parquet file, a folder of these or of datasets.save_to_disk"
            raise ValueError(f"{where}: expected {expected}, got {path}")
        tables = [_READERS[each.suffix](where, each) for each in files]
        table = pa.concat_tables(tables)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: {path} cannot be read: {first_line(error)}") from None
    found = datasets.Dataset(datasets.table.InMemoryTable(table.replace_schema_metadata(None)))
    return _checked(where, path, found)


def _checked(where: str, path: str, found: Any) -> datasets.Dataset:
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"{where}: expected one data set, got splits {list(found)} in {path}")
    if not len(found):
        raise ValueError(f"{where}: expected at least one row, got none in {path}")
    return found


def _jsonl(where: str, path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: {path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {path}, line {number}: expected an object, a row")
            if rows and row.keys() != rows[0].keys():
                expected = f"the first row's columns {sorted(rows[0])}, got {sorted(row)}"
                raise ValueError(f"{where}: {path}, line {number}: expected {expected}")
            rows.append(row)
    return pa.Table.from_pylist(rows)


def _parquet(where: str, path: Path) -> pa.Table:
    return pq.ParquetFile(path).read()


_READERS = {".jsonl": _jsonl, ".parquet": _parquet}


def need(where: str, rows: datasets.Dataset, *columns: str) -> None:
    """Refuse rows without a column."""
    for name in columns:
        if name not in rows.column_names:
            raise ValueError(
                f"{where}: expected a column {name!r}, got columns {rows.column_names}"
            )


def fingerprint(path: Any) -> str:
    """SHA-256 of a file, or of the files in a folder: what tells one input from another."""
    place = Path(path)
    if place.is_file():
        return _of_file(place)
    digest = hashlib.sha256()
    hidden = {parts.LOCK}
    for each in sorted(place.iterdir()):
        if each.is_file() and each.name not in hidden:
            digest.update(f"{each.name} {_of_file(each)}\n".encode())
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            digest.update(b"%d" % size)
            for i in range(PIECES):
                file.seek((size - PIECE) * i // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The beginning of an error's text; the whole may be pages long."""
    line = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= 300 else line[:300] + " ..."
