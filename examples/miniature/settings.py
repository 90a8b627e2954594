"""All numbers of the experiment in one place; a result knows with which of them it was made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """A Llama-style model."""

    hidden: int
    layers: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class Settings:
    """Task, models and budgets.

    Attributes:
        subjects, manners: a prompt is one of each; ``held_out`` combinations are for evaluation.
        words: of which responses are made, beside the prompts' own tokens.
        length: words of a response: always as many, so that no method gains by length.
        texts: what the reference teacher and the student's base are trained on.
        pairs: preferences of people, on the prompts that are not held out.
        held_out_pairs, samples: for the evaluation; samples are fresh responses of a model.
        rows: responses in a batch, whatever the method.
        reference_steps, aligned_steps, base_steps: before the comparison starts.
        aligned_rate, aligned_beta: of the aligned teacher's DPO, those with the highest reward.
        steps: of each of the two stages of every method.
        curve_points: how often true reward is looked at in a stage.
    """

    subjects: int = 12
    manners: int = 8
    words: int = 48
    length: int = 8
    held_out: int = 24
    texts: int = 8192
    pairs: int = 4096
    held_out_pairs: int = 2048
    samples: int = 4800
    teacher: Size = field(default_factory=lambda: Size(64, 2, 128, 4))
    student: Size = field(default_factory=lambda: Size(16, 1, 32, 2))
    rows: int = 64
    reference_steps: int = 800
    aligned_steps: int = 400
    aligned_rate: float = 3e-3
    aligned_beta: float = 0.1
    base_steps: int = 400
    steps: int = 400
    curve_points: int = 5
