"""The directory of a cache: shards, and one manifest that says which of them count.

A file is written under a temporary name, synced and renamed, so that it is there whole or not at
all. A shard exists once the manifest that lists it does: what a killed writer leaves beyond that
is swept away by the next one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pad_kernels.cache.info import CacheInfo

MANIFEST, SUFFIX, TEMPORARY, LOCK = "manifest.json", ".safetensors", ".tmp", "writer.lock"
FORMAT = "pad_kernels teacher cache, version 1"


def shard_name(index: int) -> str:
    """File name of a shard; the position in the manifest is the only other place it has."""
    return f"shard-{index:05d}{SUFFIX}"


def fail_damaged(path: Path, why: str) -> NoReturn:
    """Refuse a file."""
    raise ValueError(f"{path} is damaged: {why}. Remove the cache and write it again")


def write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``, all of it or, whenever this is interrupted, what it had."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself is safe once the directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@dataclass(frozen=True)
class Shard:
    """What the manifest knows of a shard."""

    rows: int
    tokens: int
    bytes: int
    sha256: str

    def check_size(self, path: Path) -> None:
        """Refuse a file that is missing or of another length, without reading it."""
        if not path.is_file():
            fail_damaged(path, "the file is missing")
        if path.stat().st_size != self.bytes:
            fail_damaged(path, f"{path.stat().st_size} bytes, expected {self.bytes}")

    def check_content(self, path: Path) -> None:
        """Refuse a file whose bytes are not the ones that were written."""
        self.check_size(path)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            fail_damaged(path, f"its SHA-256 is {found}, expected {self.sha256}")


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a cache."""

    info: CacheInfo
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def rows(self) -> int:
        """Rows that are safe on disk."""
        return sum(shard.rows for shard in self.shards)

    def add(self, shard: Shard) -> Manifest:
        """The manifest with one more shard at its end."""
        return replace(self, shards=(*self.shards, shard))

    def write(self, directory: Path) -> None:
        """Replace the directory's manifest by this one."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
        write_atomically(directory / MANIFEST, text.encode())

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Read a directory's manifest and check that all its shards are there, by their size."""
        path = directory / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"path: expected the directory of a cache, got {directory}: no {MANIFEST}"
            )
        try:
            body = json.loads(path.read_bytes())
            digest = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            fail_damaged(path, f"it is not a manifest ({error})")
        if digest != _digest(body):
            fail_damaged(path, "its content does not have the SHA-256 that it names")
        if body.pop("format") != FORMAT:
            raise ValueError(f"{path}: expected the format {FORMAT!r}, got another one")
        shards = tuple(Shard(**entry) for entry in body["shards"])
        for index, shard in enumerate(shards):
            shard.check_size(directory / shard_name(index))
        return Manifest(CacheInfo(**body["info"]), shards, body["complete"])


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
