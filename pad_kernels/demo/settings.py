"""Every number the demo depends on, in one place.

The defaults were chosen by measuring on two CPU cores; `SMALL` runs the same code in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

METHODS = ("pad", "dpo", "simpo")


@dataclass(frozen=True)
class ModelSize:
    """Shape of a Gemma-2-style model and how it is pre-trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak rate of the embedding (which is the LM head too) and the norms.
        matrix_rate: peak rate of the other matrices.
    """

    hidden: int
    layers: int
    mlp: int
    heads: int
    steps: int
    learning_rate: float = 6e-3
    matrix_rate: float = 1e-2


@dataclass(frozen=True)
class Method:
    """How one preference loss is trained.

    Attributes:
        responses: responses a prompt brings into a step, which decides how many prompts fit.
        beta: the loss's own scale of rewards (PAD and SimPO: of mean log-probs, DPO: of sums).
        learning_rate: peak of the schedule.
        gamma: SimPO's target margin.
    """

    responses: int
    beta: float
    learning_rate: float
    gamma: float | None = None


@dataclass(frozen=True)
class Settings:
    """One run of the demo. The same settings give the same numbers on the same machine."""

    seed: int = 0

    # Text: docstrings of `modules` modules (None: all) for both models, and the reference for the
    # teacher, some times over. On little text the tokenizer ends with less than `vocab_size`.
    modules: int | None = None
    reference_repeats: int = 3
    held_out_share: float = 0.25
    vocab_size: int = 8192

    # Models, next-token prediction on blocks of `block` tokens.
    softcap: float = 30.0
    teacher: ModelSize = field(default_factory=lambda: ModelSize(192, 3, 512, 4, steps=500))
    student: ModelSize = field(default_factory=lambda: ModelSize(128, 2, 384, 4, steps=220))
    block: int = 128
    batch: int = 8

    # Sampling: n responses a prompt; a prompt is the beginning of a sentence of the reference.
    train_prompts: int = 1024
    held_out_prompts: int = 192
    prompt_tokens: int = 12
    response_tokens: int = 48
    least_tokens: int = 24
    responses: int = 4
    temperature: float = 1.0

    # Preference training. Each step of each method sends the same number of responses through.
    step_responses: int = 64
    preference_steps: int = 120
    checkpoints: int = 6
    pad: Method = field(default_factory=lambda: Method(4, beta=4.0, learning_rate=2e-4))
    dpo: Method = field(default_factory=lambda: Method(2, beta=0.1, learning_rate=2e-5))
    simpo: Method = field(default_factory=lambda: Method(2, 4.0, learning_rate=5e-5, gamma=0.5))

    shown_samples: int = 4

    # The comparison of memory and time with dense logits.
    cost_steps: int = 5
    cost_vocab_sizes: tuple[int, ...] = (8192, 32768)

    def method(self, name: str) -> Method:
        """Settings of one of `METHODS`."""
        chosen = {"pad": self.pad, "dpo": self.dpo, "simpo": self.simpo}
        return chosen[name]


SMALL = Settings(
    modules=25,
    vocab_size=1024,
    teacher=ModelSize(48, 2, 96, 2, steps=40),
    student=ModelSize(32, 1, 64, 2, steps=20),
    block=64,
    train_prompts=16,
    held_out_prompts=8,
    prompt_tokens=8,
    response_tokens=12,
    least_tokens=4,
    step_responses=16,
    preference_steps=4,
    checkpoints=2,
    cost_steps=2,
    cost_vocab_sizes=(1024,),
)
