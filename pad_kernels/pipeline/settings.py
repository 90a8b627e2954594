"""The settings of a run: what its YAML file may say. docs/pipelines.md explains each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pad_kernels._checks import check_choice, check_integer, check_number, fail_value
from pad_kernels.pipeline import yaml_file

Name = Literal[
    "pad", "dckd", "adpa", "adpa+", "dpo", "simpo", "orpo", "cpo", "kto", "sft", "kd", "seqkd"
]


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        check_integer(name, getattr(settings, name), at_least=1)


@dataclass(frozen=True)
class Sample:
    """``sample``: responses from a model.

    Args:
        prompts: a .jsonl or .parquet file or a data set's folder, with a column ``prompt``.
        model: whose responses.
        n: responses to each prompt.
        temperature, top_p, top_k: of sampling.
        max_new_tokens: the longest response.
        chat: prompts that are strings are the user's message in a conversation.
        overlong: prompts without room for the longest response: "error" or "drop".
        batch_size: prompts at a time.
        shard_rows: prompts in a file: what a kill may cost.
    """

    prompts: str
    model: Literal["student", "teacher"] = "student"
    n: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = 512
    chat: bool = False
    overlong: Literal["error", "drop"] = "error"
    batch_size: int = 8
    shard_rows: int = 64

    def __post_init__(self) -> None:
        _positive(self, "n", "max_new_tokens", "batch_size", "shard_rows")
        check_number("temperature", self.temperature, above=0.0)
        check_number("top_p", self.top_p, above=0.0, at_most=1.0)
        if self.top_k is not None:
            _positive(self, "top_k")


@dataclass(frozen=True)
class Score:
    """``score``: the teacher's rewards of responses.

    Args:
        calibration: "pairwise" as in PAD's released code, "nway" as in its paper, or "none".
        responses: what to score; default: what ``sample`` wrote.
        alpha: weight of the mean log-prob beside the logarithm of the option's probability; the
            released configuration has 0.
        floor: the least probability of an option.
        batch_size: prompts at a time, each with its responses or its questions.
        shard_rows: prompts in a file.
    """

    calibration: Literal["pairwise", "nway", "none"]
    responses: str | None = None
    alpha: float = 0.0
    floor: float = 1e-8
    batch_size: int = 4
    shard_rows: int = 64

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "shard_rows")
        check_number("alpha", self.alpha, at_least=0.0, at_most=1.0)
        check_number("floor", self.floor, above=0.0, at_most=1.0)
        if self.calibration == "none" and self.alpha:
            fail_value("alpha", "none without calibration", self.alpha)


@dataclass(frozen=True)
class Cache:
    """``cache``: a teacher's outputs on ``train``'s data set.

    Args:
        keep: how many of the likeliest tokens, or "hidden".
        dtype: what is stored.
        batch_size: responses at a time.
    """

    keep: int | Literal["hidden"] = 64
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_size: int = 8

    def __post_init__(self) -> None:
        _positive(self, "batch_size", *([] if self.keep == "hidden" else ["keep"]))


@dataclass(frozen=True)
class Train:
    """``train``.

    Args:
        method: how.
        data: rows to train on; default: what ``score`` wrote (pad) or ``sample`` (adpa, seqkd).
        eval_data: rows to evaluate on while training.
        teacher: "model": beside the student; "cache": what ``cache`` wrote.
        arguments: of the methods' configs, TrainingArguments among them.
        methods: for some methods by name, more of them, over ``arguments``; adpa+ takes those of
            dckd and adpa.
        lora: peft.LoraConfig's; default: the whole model is trained.
    """

    method: Name
    data: str | None = None
    eval_data: str | None = None
    teacher: Literal["model", "cache"] = "model"
    arguments: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    lora: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in self.methods:
            check_choice("methods", name, [each for each in get_args(Name) if each != "adpa+"])

    def arguments_of(self, method: str) -> dict[str, Any]:
        """All that is said about a method."""
        return {**self.arguments, **self.methods.get(method, {})}


@dataclass(frozen=True)
class Eval:
    """``eval``: the student and what was trained, on held-out rows.

    Args:
        pairs: rows with ``chosen`` and ``rejected``.
        scored: rows with ``responses`` and ``rewards``.
        models: folders; default: the student and everything trained in ``out``.
        batch_size: rows at a time.
        max_length: tokens; default: the models' context.
    """

    pairs: str | None = None
    scored: str | None = None
    models: list[str] | None = None
    batch_size: int = 8
    max_length: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "batch_size")
        if self.pairs is None and self.scored is None:
            fail_value("pairs", "held-out rows, here or in 'scored'", "neither")


@dataclass(frozen=True)
class Settings:
    """A run.

    Args:
        student, teacher, reference: folders of models. The reference is the teacher before its
            alignment for adpa, and the loss's reference for dpo and kto (default: the student).
        out: the folder that everything is written to.
        teacher_tokenizer: another folder for the teachers' tokenizer: to assert that ids mean the
            same where names of unused tokens differ.
        seed: of sampling and training.
        dtype: of all models' weights.
        device: default: a GPU if there is one (CUDA_VISIBLE_DEVICES says which).
        sample, score, cache, train, eval: the stages.
    """

    student: str
    out: str
    teacher: str | None = None
    reference: str | None = None
    teacher_tokenizer: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] | None = None
    sample: Sample | None = None
    score: Score | None = None
    cache: Cache | None = None
    train: Train | None = None
    eval: Eval | None = None

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, at_least=0)
        if self.seed >= 2**32:
            fail_value("seed", "less than 2^32", self.seed)

    def folder(self, name: str) -> Path:
        """Where a stage writes."""
        return Path(self.out) / name


Section = TypeVar("Section")


def needed(name: str, section: Section | None) -> Section:
    """A section of the file that a command cannot do without."""
    if section is None:
        raise ValueError(f"{name}: expected this section in the file, got none")
    return section


def read(path: Path, *, method: str | None = None) -> Settings:
    """The settings in a YAML file.

    Args:
        path: the file.
        method: one for ``train`` in the place of the file's.

    Raises:
        ValueError: one message for the first mistake, with file and key.
    """
    values = yaml_file.load(path)
    if method is not None and isinstance(values.get("train"), dict):
        values["train"] = {**values["train"], "method": method}
    return yaml_file.build(Settings, f"{path}: ", values)


def as_dict(section: Any) -> dict[str, Any]:
    """A section's settings for a manifest."""
    return dataclasses.asdict(section)
