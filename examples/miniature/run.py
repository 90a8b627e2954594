"""One run: a method's second stage, measured on prompts that nobody has seen."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from examples.miniature.lab import Lab
from examples.miniature.methods import STAGES, Stage
from examples.miniature.models import logprob, sample
from examples.miniature.training import frozen_copy, train


def measure(lab: Lab, model: Any, since: str = "base") -> dict[str, float]:
    """How good a model is.

    Args:
        lab: its seed's.
        model: a student or teacher.
        since: the model that it was before.

    Returns:
        ``reward``: mean true reward of what it writes; ``accuracy``: how often it gives the better
        of two held-out responses the higher log-prob; ``gain_accuracy``: how often that log-prob
        grew more since then; ``entropy``: nats a word of what it writes; ``repeats``: share of
        words that repeat the one before.
    """
    world, s = lab.world, lab.settings
    asked = world.held_out.repeat_interleave(s.samples // len(world.held_out))
    written = sample(model, world, asked, seed=0)
    prompts, better, worse = lab.held_out
    margin = logprob(model, world, prompts, better) - logprob(model, world, prompts, worse)
    old = lab.models[since]
    before = logprob(old, world, prompts, better) - logprob(old, world, prompts, worse)
    return {
        "reward": world.rewards(asked, written).mean().item(),
        "accuracy": _share(margin > 0),
        "gain_accuracy": _share(margin > before),
        "entropy": -logprob(model, world, asked, written).mean().item() / s.length,
        "repeats": _share(written[:, 1:] == written[:, :-1]),
    }


def _share(found: Tensor) -> float:
    return found.float().mean().item()


class _Watch(TrainerCallback):
    """True reward while a model is trained."""

    def __init__(self, lab: Lab, every: int) -> None:
        self.lab, self.every = lab, every
        self.curve: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            model, world = kwargs["model"], self.lab.world
            asked = world.held_out.repeat(40)
            with torch.random.fork_rng():
                written = sample(model, world, asked, seed=1)
            self.curve.append(world.rewards(asked, written).mean().item())


def run_stage(lab: Lab, name: str, student: Any) -> list[float]:
    """Train a student in place; returns true rewards on the way."""
    stage: Stage = STAGES[name]
    s = lab.settings
    watch = _Watch(lab, s.steps // s.curve_points)
    rows = stage.data(lab, student)
    models = {**lab.models, "before": frozen_copy(student)}
    train(
        student,
        stage.trainer,
        rows,
        lab.tokenizer,
        steps=s.steps,
        batch=s.rows // stage.in_row,
        rate=stage.rate,
        seed=lab.seed,
        teachers={argument: models[teacher] for argument, teacher in stage.teachers.items()},
        options=stage.options,
        watch=watch,
    )
    return watch.curve


def first_stage(lab: Lab, name: str) -> Any:
    """The base after a stage."""
    student = frozen_copy(lab.models["base"]).requires_grad_(True)
    run_stage(lab, name, student)
    return student


def second_stage(lab: Lab, first: str, second: str) -> dict[str, Any]:
    """Result of a method, from the student that its first stage has left in the lab."""
    started = time.perf_counter()
    student = frozen_copy(lab.models[first]).requires_grad_(True)
    curve = run_stage(lab, second, student)
    return {**measure(lab, student), "curve": curve, "seconds": time.perf_counter() - started}
