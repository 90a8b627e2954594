"""What the demo measures: plain data, as it goes into `results.json` and into the report."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pad_kernels.demo.sampling import Responses
from pad_kernels.demo.settings import Settings

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Curve:
    """A named series of a plot: x are steps."""

    name: str
    x: list[int]
    y: list[float]


@dataclass(frozen=True)
class Estimate:
    """A figure of each prompt; `mean` and its standard `error`."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From a tensor [prompts]."""
        return cls(tuple(values.double().tolist()))

    @property
    def mean(self) -> float:
        """Mean over prompts."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 of a single prompt."""
        if len(self.values) < 2:
            return 0.0
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def __sub__(self, other: Estimate) -> Estimate:
        """Difference prompt by prompt, whose error is smaller than the errors of both suggest."""
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Result:
    """One student on the held-out prompts.

    Attributes:
        name: "before" or a method.
        loss: PAD's listwise loss on responses that the student wrote before it was trained.
        tau: Kendall's tau between this student's and the teacher's ranking of them.
        teacher_logprob: the teacher's mean log-prob a token of what this student writes now.
        length: tokens of these fresh responses.
        distinct: share of their neighbouring token pairs that are different.
        text_loss: next-token loss on held-out topics of the reference, which people wrote.
        seconds: time of preference training.
        written: the fresh responses.
    """

    name: str
    loss: Estimate
    tau: Estimate
    teacher_logprob: Estimate
    length: float
    distinct: float
    text_loss: float
    seconds: float
    written: Responses


@dataclass(frozen=True)
class Cost:
    """One PAD training step: rows of logits, median seconds, peak bytes beyond the start."""

    head: str
    vocab_size: int
    rows: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Sample:
    """A prompt and, by student, what it wrote and the teacher's log-prob a token of that."""

    prompt: str
    written: dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Outcome:
    """Everything that one run of the demo measured.

    Pairs are (train, held out) topics and prompts, and (teacher, student) training tokens,
    parameters and held-out next-token losses.
    """

    settings: Settings
    topics: tuple[int, int]
    tokens: tuple[int, int]
    vocabulary: int
    prompts: tuple[int, int]
    parameters: tuple[int, int]
    text_losses: tuple[float, float]
    pretraining: list[Curve]
    results: list[Result]
    taus: list[Curve]
    losses: list[Curve]
    samples: list[Sample]
    costs: list[Cost]
    seconds: float

    def result(self, name: str) -> Result:
        """The result of one student."""
        return next(result for result in self.results if result.name == name)

    def numbers(self) -> dict[str, Any]:
        """What the seed decides: the same settings give the same values on one machine."""
        students = {
            result.name: {
                "loss": result.loss.mean,
                "tau": result.tau.mean,
                "teacher_logprob": result.teacher_logprob.mean,
                "length": result.length,
                "distinct": result.distinct,
                "text_loss": result.text_loss,
            }
            for result in self.results
        }
        curves = {
            "pretraining_loss": {curve.name: curve.y for curve in self.pretraining},
            "held_out_tau": {curve.name: curve.y for curve in self.taus},
            "held_out_loss": {curve.name: curve.y for curve in self.losses},
        }
        names = ("topics", "tokens", "vocabulary", "prompts", "parameters")
        facts = {name: getattr(self, name) for name in (*names, "text_losses")}
        samples = [dataclasses.asdict(sample) for sample in self.samples]
        return {**facts, "students": students, "curves": curves, "samples": samples}

    def timings(self) -> dict[str, Any]:
        """What the machine decides."""
        return {
            "total_seconds": self.seconds,
            "training_seconds": {result.name: result.seconds for result in self.results},
            "step_cost": [dataclasses.asdict(cost) for cost in self.costs],
        }
