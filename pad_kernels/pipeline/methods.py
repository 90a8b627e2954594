"""What each method of ``train`` is made of: a config, a trainer, teachers and columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

import datasets

from pad_kernels.integrations import transformers as trainers
from pad_kernels.pipeline import models, yaml_file
from pad_kernels.pipeline.settings import Settings

#: Arguments that the command sets itself.
OWN = (
    "output_dir",
    "seed",
    "data_seed",
    "use_cpu",
    "resume_from_checkpoint",
    "load_best_model_at_end",
)
#: What the command has for others where the file says nothing. Two checkpoints: the one before
#: stays until the next is whole.
DEFAULTS: dict[str, Any] = {"report_to": "none", "save_total_limit": 2}


@dataclass(frozen=True)
class Method:
    """One of them.

    Args:
        config, trainer: names in pad_kernels.integrations.transformers.
        fixed: arguments that make the method.
        teachers: the trainer's argument for each model, by its name among the settings.
        data: the stage whose rows it trains on by default.
        rows: makes its columns from others.
    """

    config: str
    trainer: str
    fixed: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)
    data: str | None = None
    rows: Callable[[datasets.Dataset], datasets.Dataset] = lambda data: data


def best_and_worst(data: datasets.Dataset) -> datasets.Dataset:
    """Pairs from scored responses: the highest reward and the lowest."""
    if {"chosen", "rejected"} & {*data.column_names} or not _scored(data):
        return data

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        rewards, responses = row["rewards"], row["responses"]
        order = sorted(range(len(rewards)), key=rewards.__getitem__)
        return {"chosen": responses[order[-1]], "rejected": responses[order[0]]}

    return data.map(pair, remove_columns=["responses", "rewards"], desc="Best and worst")


def _scored(data: datasets.Dataset) -> bool:
    return {"responses", "rewards"} <= {*data.column_names}


def completions(data: datasets.Dataset) -> datasets.Dataset:
    """A row for each response of a list."""
    if "completion" in data.column_names or "responses" not in data.column_names:
        return data
    return _exploded(data, lambda row: [{"completion": each} for each in row["responses"]])


def labelled(data: datasets.Dataset) -> datasets.Dataset:
    """A desirable and an undesirable row from each pair."""
    data = best_and_worst(data)
    if "completion" in data.column_names or "chosen" not in data.column_names:
        return data
    if "rejected" not in data.column_names:
        return data
    names = {"chosen": True, "rejected": False}
    return _exploded(
        data, lambda row: [{"completion": row[n], "label": good} for n, good in names.items()]
    )


def _exploded(
    data: datasets.Dataset, into: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> datasets.Dataset:
    found = [
        {"prompt": row["prompt"], **each} if "prompt" in row else each
        for row in data
        for each in into(row)
    ]
    return datasets.Dataset.from_list(found)


def _preference(loss: str, *, reference: bool = False) -> Method:
    teachers = {"reference": "reference"} if reference else {}
    rows = labelled if loss == "kto" else best_and_worst
    return Method("PreferenceConfig", "PreferenceTrainer", {"loss": loss}, teachers, None, rows)


_SFT = Method("PreferenceConfig", "PreferenceTrainer", {"loss": "sft"})
METHODS: dict[str, Method] = {
    "pad": Method("PADConfig", "PADTrainer", {}, {"teacher": "teacher"}, "scored"),
    "dckd": Method(
        "DCKDConfig", "DCKDTrainer", {"use_rejected": True}, {"teacher": "teacher"}, None,
        best_and_worst,
    ),
    "kd": Method("DCKDConfig", "DCKDTrainer", {"use_rejected": False}, {"teacher": "teacher"}),
    "adpa": Method(
        "ADPAConfig", "ADPATrainer", {}, {"teacher": "aligned", "reference": "reference"}, "samples"
    ),
    "sft": _SFT,
    "seqkd": dataclasses.replace(_SFT, data="samples", rows=completions),
    "dpo": _preference("dpo", reference=True),
    "kto": _preference("kto", reference=True),
    **{name: _preference(name) for name in ("simpo", "orpo", "cpo")},
}  # fmt: skip


@cache
def _hints(config: str) -> dict[str, Any]:
    kind = getattr(trainers, config)
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


def arguments(settings: Settings, name: str, given: dict[str, Any], folder: Any) -> Any:
    """A method's config.

    Args:
        settings: of the run.
        name: the method.
        given: arguments from the file.
        folder: the trainer's.

    Raises:
        ValueError: an argument that is unknown, of the wrong type or range, or not the file's.
    """
    method = METHODS[name]
    known = _hints(method.config)
    for key in (*OWN, *method.fixed):
        if key in given:
            raise ValueError(f"train.arguments.{key}: expected none, the command sets it")
    yaml_file.checked("train.arguments.", given, known)
    if given.get("save_total_limit") == 1:
        raise ValueError(
            "train.arguments.save_total_limit: expected at least 2, or a kill between two "
            "checkpoints would lose both; got 1"
        )
    device = models.device(settings)
    try:
        return getattr(trainers, method.config)(
            output_dir=str(folder),
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=device.type == "cpu",
            **DEFAULTS | {"dataloader_pin_memory": device.type != "cpu"} | method.fixed | given,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"train.arguments.{error}") from None
