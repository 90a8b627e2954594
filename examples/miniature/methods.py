"""The methods: two stages each, and what every stage trains on.

All stages have as many steps and as many responses in a batch. The first stage starts from the
student's base, the second from what the first has made. Rates and options are what `tune.py` found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from examples.miniature.lab import Lab
from examples.miniature.models import sample


@dataclass(frozen=True)
class Stage:
    """One training run of a student.

    Attributes:
        trainer: Preference, DCKD, ADPA or PAD.
        options: of its config.
        data: from lab and student to rows of the data set.
        in_row: responses of a row, so that all batches are equally large.
        teachers: names of teachers by the trainer's argument.
        rate: peak learning rate.
    """

    trainer: str
    options: dict[str, Any]
    data: Callable[[Lab, Any], list[dict[str, Any]]]
    in_row: int = 1
    teachers: dict[str, str] = field(default_factory=dict)
    rate: float = 1e-2


def _chosen(lab: Lab, student: Any) -> list[dict[str, Any]]:
    return lab.world.rows(lab.prompts, chosen=lab.chosen)


def _pairs(lab: Lab, student: Any) -> list[dict[str, Any]]:
    return lab.world.rows(lab.prompts, chosen=lab.chosen, rejected=lab.rejected)


def _written_by(teacher: str) -> Callable[[Lab, Any], list[dict[str, Any]]]:
    def data(lab: Lab, student: Any) -> list[dict[str, Any]]:
        written = sample(lab.models[teacher], lab.world, lab.prompts, seed=lab.seed)
        return lab.world.rows(lab.prompts, completion=written)

    return data


def _own(lab: Lab, student: Any, n: int) -> Tensor:
    """The student's own responses [prompts, n, length] to the prompts of the pairs."""
    prompts = lab.prompts.repeat_interleave(n)
    return sample(student, lab.world, prompts, seed=lab.seed).view(len(lab.prompts), n, -1)


def _chosen_and_own(lab: Lab, student: Any) -> list[dict[str, Any]]:
    return lab.world.rows(lab.prompts, chosen=lab.chosen, responses=_own(lab, student, 1))


def _four_own(lab: Lab, student: Any) -> list[dict[str, Any]]:
    return lab.world.rows(lab.prompts, responses=_own(lab, student, 4))


def _kd(teacher: str) -> Stage:
    options = {"alpha": 16.0, "use_rejected": False}
    return Stage("DCKD", options, _chosen, teachers={"teacher": teacher})


def _pad(**options: Any) -> Stage:
    return Stage("PAD", options, _four_own, 4, {"teacher": "aligned"})


def _seqkd(teacher: str) -> Stage:
    return Stage("Preference", {"loss": "sft"}, _written_by(teacher))


_BOTH = {"aligned": "aligned", "reference": "reference"}

STAGES: dict[str, Stage] = {
    "sft": Stage("Preference", {"loss": "sft"}, _chosen),
    "kd": _kd("reference"),
    "kd-aligned": _kd("aligned"),
    "seqkd": _seqkd("reference"),
    "seqkd-aligned": _seqkd("aligned"),
    "dckd": Stage("DCKD", {"alpha": 16.0}, _pairs, 2, {"teacher": "aligned"}),
    "dpo": Stage("Preference", {"loss": "dpo", "beta": 0.3}, _pairs, 2, {"reference": "before"}),
    "simpo": Stage("Preference", {"loss": "simpo", "beta": 1.0, "gamma": 0.5}, _pairs, 2),
    "adpa": Stage("ADPA", {"gamma": 10.0, "beta": 0.1}, _chosen_and_own, 2, _BOTH, 3e-3),
    "pad-ranking": _pad(kind="ranking", beta=1.0),
    "pad-jsd": _pad(kind="jsd", beta=0.3),
    "pad-decomposed": _pad(kind="jsd", beta=0.3, subset_size=2),
    "pad-kl": _pad(kind="kl", beta=0.3),
}

#: Stages of each method.
METHODS: dict[str, tuple[str, str]] = {
    "SFT": ("sft", "sft"),
    "KD": ("kd", "kd"),
    "KD, aligned": ("kd-aligned", "kd-aligned"),
    "SeqKD": ("seqkd", "seqkd"),
    "SeqKD, aligned": ("seqkd-aligned", "seqkd-aligned"),
    "DPO": ("sft", "dpo"),
    "SimPO": ("sft", "simpo"),
    "DCKD": ("dckd", "dckd"),
    "ADPA": ("sft", "adpa"),
    "ADPA+": ("dckd", "adpa"),
    "PAD ranking": ("sft", "pad-ranking"),
    "PAD jsd": ("sft", "pad-jsd"),
    "PAD decomposed": ("sft", "pad-decomposed"),
    "PAD kl": ("sft", "pad-kl"),
}
FIRST = sorted({first for first, _ in METHODS.values()})
