"""``train``: a student, from its data to its last weights, through the trainers."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerState

from pad_kernels.integrations import transformers as trainers
from pad_kernels.pipeline import checkpoints, methods, models, parts, rows, sample
from pad_kernels.pipeline.settings import Settings, needed

FINAL, LOG = "final", "log.json"
_TIMES = ("_runtime", "_per_second", "peak_memory_mib")


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        method: of METHODS.
        folder: where to.
        student: the folder of the model to begin with.
        data: rows to train on.
        arguments: of the method's config.
    """

    method: str
    folder: Path
    student: str
    data: str
    arguments: dict[str, Any]


def run(settings: Settings) -> Path:
    """The command; returns the folder of the trained student."""
    options = needed("train", settings.train)
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise ValueError(f"train: expected one process (for more, use the trainers), got {ranks}")
    folder = settings.folder("train") / options.method
    if options.method != "adpa+":
        return fit(settings, job(settings))
    if options.teacher != "model":
        raise ValueError(f"train.teacher: expected model for adpa+, got {options.teacher}")
    if options.eval_data is not None:
        raise ValueError("train.eval_data: expected none for adpa+, whose halves read other rows")
    if options.data is None:
        raise ValueError("train.data: expected rows with chosen and rejected for adpa+, got none")
    if settings.sample is None:
        raise ValueError("sample: expected this section: adpa+ samples from its DCKD student")
    models.folder("reference", settings.reference)
    first, second = options.arguments_of("dckd"), options.arguments_of("adpa")
    own = folder.with_name("adpa+.samples")
    methods.arguments(settings, "adpa", second, folder)  # a mistake there is found now
    begun = fit(
        settings,
        Job("dckd", folder.with_name("adpa+.dckd"), settings.student, options.data, first),
    )
    sample.again(settings, begun, own, options.data)
    return fit(settings, Job("adpa", folder, str(begun), str(own), second))


def job(settings: Settings) -> Job:
    """What ``train`` asks for, and ``cache`` prepares; for all methods but adpa+."""
    options = needed("train", settings.train)
    source = options.data
    stage = methods.METHODS[options.method].data
    if source is None and stage is None:
        raise ValueError(f"train.data: expected rows for {options.method}, got nothing")
    if source is None:
        source = str(settings.folder(str(stage)))
        if options.method == "seqkd":
            _check_teachers(settings, Path(source))
    folder = settings.folder("train") / options.method
    given = options.arguments_of(options.method)
    return Job(options.method, folder, settings.student, source, given)


def _check_teachers(settings: Settings, samples: Path) -> None:
    """The rows that seqkd imitates must be the teacher's."""
    if not (samples / parts.MANIFEST).is_file():
        raise ValueError(f"train.data: there is no {samples}: run the command sample first")
    identity = parts.read_manifest(samples / parts.MANIFEST)["identity"]
    if identity["settings"]["model"] != "teacher":
        expected = "the teacher's responses (sample: model: teacher), got the student's"
        raise ValueError(f"train.data: {samples}: expected {expected}")


def training_rows(where: str, path: str, method: str) -> datasets.Dataset:
    """A method's rows from a file or folder."""
    return methods.METHODS[method].rows(rows.read(where, path))


def teachers_of(settings: Settings, method: str, data: datasets.Dataset, lora: bool) -> list[str]:
    """Which models a method needs beside its student, by their names among the settings."""
    found = [*methods.METHODS[method].teachers]
    if method == "pad" and "rewards" in data.column_names:
        return []  # the teacher has spoken
    if found == ["reference"] and settings.reference is None:
        given = {"ref_chosen_logps", "ref_rejected_logps"} <= {*data.column_names}
        return [] if lora or given else ["student"]
    return found


def arguments(settings: Settings, work: Job, teachers: list[str]) -> Any:
    """The trainer's config; its ``max_length`` is what the student and all teachers can take."""
    configs = [models.config("student", work.student)]
    configs += [models.config(name, getattr(settings, name)) for name in teachers]
    given = {"max_length": models.context(*configs), **work.arguments}
    return methods.arguments(settings, work.method, given, work.folder)


def fit(settings: Settings, work: Job) -> Path:
    """Train, or go on where an earlier call was stopped.

    Returns:
        The folder of the trained student.

    Raises:
        ValueError: a mistake in what is given; another configuration in the same folder.
    """
    options = needed("train", settings.train)
    data = training_rows("train.data", work.data, work.method)
    names = teachers_of(settings, work.method, data, options.lora is not None)
    args = arguments(settings, work, names)
    cached = options.teacher == "cache"
    if cached and not {*names} & {"teacher"}:
        raise ValueError(f"train.teacher: expected model for {work.method} on these rows")
    models.check_tokenizers(settings, *(name for name in names if name != "student"))
    final = work.folder / FINAL
    with parts.claimed(work.folder, _identity(settings, work, names)):
        if final.is_dir():
            print(f"{final} is there already")
            return final
        state = checkpoints.newest(work.folder)
        if state is not None:
            print(f"going on from {state}")
        trainer = _trainer(settings, work, names, data, args)
        trainer.add_callback(checkpoints.Marker())
        _go_on(trainer, state)
        _save(trainer, final)
    return final


def _go_on(trainer: Any, state: Path | None) -> None:
    """Train from a checkpoint to the end; one that is the end is only loaded."""
    if state is not None:
        reached = TrainerState.load_from_json(str(state / "trainer_state.json"))
        if reached.global_step >= reached.max_steps:  # Trainer would take another step
            trainer._load_from_checkpoint(str(state))
            trainer.state = reached
            return
    trainer.train(resume_from_checkpoint=None if state is None else str(state))


def _identity(settings: Settings, work: Job, names: list[str]) -> dict[str, Any]:
    """All that a training's result depends on."""
    options = needed("train", settings.train)
    inputs: dict[str, Any] = {
        "student": rows.fingerprint(models.folder("student", work.student)),
        "data": rows.fingerprint(work.data),
    }
    if options.eval_data is not None:
        rows.read("train.eval_data", options.eval_data)
        inputs["eval_data"] = rows.fingerprint(options.eval_data)
    if options.teacher == "cache":
        for folder in cache_folders(settings, work.method):
            if not folder.is_dir():
                raise ValueError(
                    f"train.teacher: there is no {folder}: run the command cache first"
                )
            inputs[folder.name] = rows.fingerprint(folder)
    for name in names:
        if name != "student":
            inputs[name] = rows.fingerprint(models.folder(name, getattr(settings, name)))
    return {
        "stage": "train",
        "method": work.method,
        "arguments": work.arguments,
        "teacher": options.teacher,
        "lora": options.lora,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "device": str(models.device(settings)),
        "inputs": inputs,
    }


def _trainer(
    settings: Settings, work: Job, names: list[str], data: datasets.Dataset, args: Any
) -> Any:
    options = needed("train", settings.train)
    given: dict[str, Any] = {}
    if options.teacher == "cache":
        argument = methods.METHODS[work.method].teachers["teacher"]
        given[argument] = trainers.CachedTeacher(*cache_folders(settings, work.method))
    else:
        wanted = methods.METHODS[work.method].teachers
        for name in names:
            argument = wanted.get(name, "reference")
            given[argument] = models.teacher(name, settings)
    if options.lora is not None:
        given["peft_config"] = _lora(options.lora)
    held_out = None
    if options.eval_data is not None:
        held_out = training_rows("train.eval_data", options.eval_data, work.method)
    kind = getattr(trainers, methods.METHODS[work.method].trainer)
    try:
        return kind(
            models.load("student", work.student, settings),
            args,
            processing_class=models.tokenizer("student", work.student),
            train_dataset=data,
            eval_dataset=held_out,
            **given,
        )
    except ValueError as error:
        text = str(error).replace("train_dataset", f"train.data ({work.data})", 1)
        raise ValueError(text.replace("eval_dataset", "train.eval_data", 1)) from error


def cache_folders(settings: Settings, method: str) -> list[Path]:
    """Where a method's teacher is kept: on its rows, and on those to evaluate on."""
    both = [settings.folder("cache") / method]
    if needed("train", settings.train).eval_data is not None:
        both.append(settings.folder("cache") / f"{method}.eval")
    return both


def _lora(values: dict[str, Any]) -> Any:
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train.lora: {rows.first_line(error)}") from None


def _save(trainer: Any, final: Path) -> None:
    """The last weights, whole or not at all; of adapters also the sum with their base."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    partial = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(final.with_name("adapter"))
        model = model.merge_and_unload()
    model.save_pretrained(partial)
    trainer.tokenizer.save_pretrained(partial)
    history = [
        {name: entry[name] for name in sorted(entry) if not name.endswith(_TIMES)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry  # of this process alone
    ]
    parts.write_json(final.with_name(LOG), history)
    os.replace(partial, final)
