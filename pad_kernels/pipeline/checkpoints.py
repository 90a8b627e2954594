"""Which of a training's checkpoints are whole.

Trainer writes a checkpoint file by file. A list of them, with their hashes, is put beside them when
all are there: what has no list was cut short, and what is not as its list says is damaged.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pad_kernels.pipeline import parts, rows

MARK = "files.json"


class Marker(TrainerCallback):
    """Puts the list into each checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The newest checkpoint is whole now."""
        mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def mark(folder: Path) -> None:
    """List a checkpoint's files, once they are safe on disk."""
    files = _files(folder)
    for path in files.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    listed = {name: rows.fingerprint(path) for name, path in files.items()}
    parts.write_json(folder / MARK, listed)


def _files(folder: Path) -> dict[str, Path]:
    found = {str(each.relative_to(folder)): each for each in sorted(folder.rglob("*"))}
    return {name: path for name, path in found.items() if path.is_file() and name != MARK}


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a training; what a kill left of others is removed.

    Raises:
        ValueError: the newest is damaged.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole: Path | None = None
    for path in reversed(found):
        cut = not (path / MARK).is_file()
        if whole is None and not cut:
            _check(path)
            whole = path
        elif cut or any(not (path / name).is_file() for name in parts.read_json(path / MARK)):
            shutil.rmtree(path)
    return whole


def _check(folder: Path) -> None:
    advice = f"Remove {folder} to go on from the checkpoint before it"
    listed = parts.read_json(folder / MARK)
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is damaged: the file is missing. {advice}")
        if rows.fingerprint(path) != digest:
            raise ValueError(f"{path} is damaged: it is not the file that was saved. {advice}")
