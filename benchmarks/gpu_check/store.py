"""Results on disk: one file of JSON lines a stage, one line a finished unit."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ROOT = Path(__file__).parents[2]
#: What a result depends on.
SOURCES = ("pad_kernels/**/*.py", "csrc/**/*.*", "setup.py", "tests/*.py", "benchmarks/**/*.py")


def fingerprint(patterns: tuple[str, ...] = SOURCES) -> str:
    """A short hash of the sources; a copy without its history has it too."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in patterns for p in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def circumstances(device: str) -> Record:
    """The machine, versions and sources of a run. ``COMMIT`` names a copy without history."""
    import torch

    from pad_kernels.backends.choice import available_backends
    from pad_kernels.bench.report import metadata

    meta = metadata(torch.device(device), torch.get_num_threads())
    meta["commit"] = os.environ.get("COMMIT") or meta["commit"]
    meta["backends"] = available_backends()
    meta["sources"] = fingerprint()
    meta["cuda"] = torch.version.cuda
    if meta["gpu"]:
        properties = torch.cuda.get_device_properties(device)
        meta["gpu_gib"] = round(properties.total_memory / 2**30, 1)
        meta["gpu_capability"] = f"{properties.major}.{properties.minor}"
        meta["gpu_processors"] = properties.multi_processor_count
    return meta


class Store:
    """The records of a stage, of these circumstances; others' are dropped when it is opened."""

    def __init__(self, path: Path, meta: Record, fresh: bool = False) -> None:
        self.path, self._lock = path, threading.Lock()
        same = {k: meta[k] for k in ("sources", "gpu", "versions", "backends")}
        lines = [] if fresh or not path.exists() else read(path)
        kept = lines[1:] if lines and lines[0].get("same") == same else []
        self.done: dict[str, Record] = {record["unit"]: record for record in kept}
        path.parent.mkdir(parents=True, exist_ok=True)
        first = {"same": same, "meta": meta}
        path.write_text("".join(json.dumps(x) + "\n" for x in [first, *kept]))

    def add(self, record: Record) -> None:
        """Keep a finished unit."""
        with self._lock, self.path.open("a") as file:
            self.done[record["unit"]] = record
            file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """Whole lines; one that a kill has cut off does not count."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
