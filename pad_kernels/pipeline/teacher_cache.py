"""``cache``: a teacher's outputs on the rows that ``train`` will read."""

from __future__ import annotations

from pathlib import Path

from pad_kernels.integrations.transformers import cache_teacher
from pad_kernels.pipeline import models, rows, train
from pad_kernels.pipeline.settings import Cache, Settings, needed

METHODS = ("dckd", "kd", "adpa", "pad")


def run(settings: Settings) -> Path:
    """The command; returns the folder.

    Raises:
        ValueError: a mistake in what is given.
    """
    options = settings.cache or Cache()
    section = needed("train", settings.train)
    if section.method not in METHODS:
        expected = "one of " + ", ".join(METHODS) + " to cache a teacher for"
        raise ValueError(f"train.method: expected {expected}, got {section.method}")
    work = train.job(settings)
    sources = {"train.data": work.data, "train.eval_data": section.eval_data}
    found = {
        name: train.training_rows(name, path, work.method)
        for name, path in sources.items()
        if path is not None
    }
    names = train.teachers_of(settings, work.method, found["train.data"], lora=False)
    if not names:
        raise ValueError("train.data: expected rows without rewards to cache a teacher for pad")
    args = train.arguments(settings, work, names)
    models.check_tokenizers(settings, *names)
    teachers = [models.teacher(name, settings) for name in names]
    labels = [f"{path}@{rows.fingerprint(path)}" for path in (getattr(settings, n) for n in names)]
    folders = train.cache_folders(settings, work.method)
    for (name, data), folder in zip(found.items(), folders, strict=True):
        try:
            cache_teacher(
                folder,
                data,
                args,
                *teachers,
                name=labels[0],
                reference_name=labels[1] if len(labels) > 1 else "",
                keep=options.keep,
                dtype=options.dtype,
                batch_size=options.batch_size,
                device=models.device(settings),
            )
        except ValueError as error:
            text = str(error)
            here = f"{name} ({sources[name]})" + text.removeprefix("dataset")
            raise ValueError(here if text.startswith("dataset,") else text) from error
    return folders[0]
