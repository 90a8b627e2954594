"""Results and models on disk, each written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from examples.miniature.lab import SHARED, Lab
from examples.miniature.methods import METHODS, STAGES
from examples.miniature.settings import Settings


def key(settings: Settings) -> str:
    """A short name of everything that decides the numbers: settings, stages and their options."""
    stages = {
        name: [each.trainer, each.options, each.in_row, each.teachers, each.rate]
        for name, each in STAGES.items()
    }
    text = json.dumps([dataclasses.asdict(settings), stages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def slug(name: str) -> str:
    """A name as part of a file's name.

    >>> slug("ADPA+"), slug("KD, aligned")
    ('adpa-plus', 'kd-aligned')
    """
    return name.lower().replace("+", "-plus").replace(", ", "-").replace(" ", "-")


class Store:
    """The files of one experiment, in a folder of its settings.

    Args:
        folder: of all experiments.
        settings: of this one: other settings never find its files.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = settings
        self.folder = folder / key(settings)

    def models(self, seed: int) -> Path:
        """Folder of a seed's models."""
        return self.folder / f"seed{seed}" / "models"

    def has_model(self, seed: int, name: str) -> bool:
        """Whether a model was written."""
        return (self.models(seed) / f"{name}.safetensors").exists()

    def lab(self, seed: int, *names: str) -> Lab:
        """A seed's lab with some models."""
        lab = Lab.of(self.settings, seed)
        for name in (*SHARED, *names):
            if self.has_model(seed, name):
                lab.load(name, self.models(seed))
        return lab

    def path(self, seed: int, method: str) -> Path:
        """File of a result."""
        return self.folder / f"seed{seed}" / f"{slug(method)}.json"

    def write(self, seed: int, method: str, result: dict[str, Any]) -> None:
        """Write a result."""
        path = self.path(seed, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        result = {"method": method, "seed": seed, **result}
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.rename(path)

    def read(self, seeds: list[int]) -> list[dict[str, Any]]:
        """All results there are of some seeds."""
        names = [*SHARED, *METHODS]
        paths = [self.path(seed, name) for seed in seeds for name in names]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
