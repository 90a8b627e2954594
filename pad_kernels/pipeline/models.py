"""Models and tokenizers from local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pad_kernels.integrations.transformers import ModelTeacher
from pad_kernels.integrations.transformers.teachers import check_same_tokenizer
from pad_kernels.pipeline import rows
from pad_kernels.pipeline.settings import Settings


def folder(where: str, path: str | None) -> str:
    """A model's folder.

    Args:
        where: the setting's name.
        path: its value.

    Raises:
        ValueError: none is given, or it is not there.
    """
    if path is None:
        raise ValueError(f"{where}: expected a model's folder, got nothing")
    if not (Path(path) / "config.json").is_file():
        advice = "hf download NAME --local-dir FOLDER gets one"
        raise ValueError(f"{where}: expected a folder with a config.json ({advice}), got {path}")
    return path


def device(settings: Settings) -> torch.device:
    """Where models run."""
    return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def config(where: str, path: str | None) -> Any:
    """A model's configuration."""
    path = folder(where, path)
    with _named(where, path):
        return AutoConfig.from_pretrained(path, local_files_only=True)


def tokenizer(where: str, path: str | None) -> Any:
    """A tokenizer."""
    path = folder(where, path)
    with _named(where, path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


def load(where: str, path: str | None, settings: Settings) -> Any:
    """A causal language model in eval mode, on the run's device and in its dtype.

    Raises:
        ValueError: it cannot be loaded, or some of its weights are not in the folder.
    """
    path = folder(where, path)
    with _named(where, path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, settings.dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{where}: {path} has no weights for {len(missing)} of them: {missing[0]}")
    return model.eval().to(device(settings))


def teacher(where: str, settings: Settings) -> ModelTeacher:
    """A teacher with its tokenizer.

    Args:
        where: "teacher" or "reference"; or "student", as a reference for itself.
        settings: of the run.
    """
    path = getattr(settings, where)
    model = load(where, path, settings)
    other = settings.teacher_tokenizer if where != "student" else None
    return ModelTeacher(model, tokenizer(where, other or path))


def check_tokenizers(settings: Settings, *names: str) -> None:
    """Refuse teachers with another tokenizer than the student's, before any model is loaded."""
    student = tokenizer("student", settings.student)
    for name in names:
        path = settings.teacher_tokenizer or getattr(settings, name)
        check_same_tokenizer(name, tokenizer(name, path), student)


class _named:
    """Whatever goes wrong inside is about this folder."""

    def __init__(self, where: str, path: str) -> None:
        self.text = f"{where}: {path} cannot be loaded"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        # Parsers of configs, of tokenizers and of weights raise exceptions of all kinds.
        if isinstance(error, Exception):
            raise ValueError(f"{self.text}: {rows.first_line(error)}") from error


def context(*configs: Any) -> int | None:
    """The longest sequence that all of some models take."""
    found = [getattr(each.get_text_config(), "max_position_embeddings", None) for each in configs]
    return min((each for each in found if each is not None), default=None)
