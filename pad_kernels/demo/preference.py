"""PAD's second and third phase, and DPO and SimPO on the same responses and the same budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

import pad_kernels as pk
from pad_kernels.demo.models import logprob
from pad_kernels.demo.outcome import Progress
from pad_kernels.demo.pretrain import adamw, scheduled
from pad_kernels.demo.sampling import Responses
from pad_kernels.demo.settings import Settings
from pad_kernels.integrations.transformers import (
    DistillationTrainer,
    PADConfig,
    PADTrainer,
    PreferenceConfig,
    PreferenceTrainer,
)

CHUNK = 64  # prompts scored at a time
Checkpoint = Callable[[PreTrainedModel, int], None]


@torch.no_grad()
def score(model: PreTrainedModel, responses: Responses, normalize: str = "length") -> Tensor:
    """Rewards [prompts, n]: each response's log-prob under a model, per token or summed."""
    parts = zip(responses.inputs.split(CHUNK), responses.labels.split(CHUNK), strict=True)
    rewards = [
        pk.sequence_reward(logprob(model, inputs, labels), labels=labels, normalize=normalize)
        for inputs, labels in parts
    ]
    return torch.cat(rewards)


def best_and_worst(rewards: Tensor) -> Tensor:
    """Indices [prompts, 2] of the responses that the teacher likes most and least."""
    return torch.stack([rewards.argmax(1), rewards.argmin(1)], dim=1)


def rows(
    student: PreTrainedModel, kind: str, responses: Responses, rewards: Tensor
) -> list[dict[str, Any]]:
    """The data set of a method's trainer, a row for each prompt.

    PAD has all responses and their rewards; the others have the best and the worst, and DPO the
    log-probs that these have under the student before it is trained.
    """
    prompts = responses.prompts()
    if kind == "pad":
        columns = zip(prompts, responses.continuations(), rewards.tolist(), strict=True)
        return [{"prompt": a, "responses": b, "rewards": c} for a, b, c in columns]
    pairs = responses.select(best_and_worst(rewards))
    found: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, (chosen, rejected) in zip(prompts, pairs.continuations(), strict=True)
    ]
    if kind == "dpo":
        reference = score(student, pairs, normalize="none").tolist()
        for row, (chosen, rejected) in zip(found, reference, strict=True):
            row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return found


class _Watch(TrainerCallback):
    """Tells of every step, hands the model out now and then, and times what is in between."""

    def __init__(self, kind: str, every: int, progress: Progress, checkpoint: Checkpoint) -> None:
        self.kind, self.every = kind, every
        self.progress, self.checkpoint = progress, checkpoint
        self.seconds = self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        self.checkpoint(now["model"], 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        if state.global_step % self.every == 0:
            self.checkpoint(now["model"], state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        if "loss" in now["logs"]:  # the last log of all has none
            self.progress(f"{self.kind} loss {now['logs']['loss']:.3f}")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Data sets are tokenised without a progress bar: the demo has its own."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _trainer(
    model: PreTrainedModel,
    kind: str,
    data: list[dict[str, Any]],
    tokenizer: Any,
    settings: Settings,
    folder: str,
) -> DistillationTrainer:
    """The trainer of a method, which writes nothing and says nothing of its own."""
    method = settings.method(kind)
    optimizer = adamw(model.parameters(), method.learning_rate)
    common: dict[str, Any] = {
        "output_dir": folder,
        "beta": method.beta,
        "max_steps": settings.preference_steps,
        "per_device_train_batch_size": settings.step_responses // method.responses,
        "seed": settings.seed,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    options: dict[str, Any] = {
        "processing_class": tokenizer,
        "train_dataset": data,
        "optimizers": (optimizer, scheduled(optimizer, settings.preference_steps)),
    }
    trainer: DistillationTrainer
    if kind == "pad":
        trainer = PADTrainer(model, PADConfig(**common), **options)
    else:
        args = PreferenceConfig(loss=kind, gamma=method.gamma, **common)
        trainer = PreferenceTrainer(model, args, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    student: PreTrainedModel,
    kind: str,
    responses: Responses,
    rewards: Tensor,
    tokenizer: Any,
    settings: Settings,
    progress: Progress,
    checkpoint: Checkpoint,
) -> tuple[PreTrainedModel, float]:
    """Train a copy of the student; returns it and the seconds spent, checkpoints not counted.

    `checkpoint(model, step)` is called before the first step and `settings.checkpoints` times more.
    """
    model = copy.deepcopy(student)
    every = max(1, settings.preference_steps // settings.checkpoints)
    watch = _Watch(kind, every, progress, checkpoint)
    data = rows(student, kind, responses, rewards)
    with TemporaryDirectory() as folder, _no_bars():
        trainer = _trainer(model, kind, data, tokenizer, settings, folder)
        trainer.add_callback(watch)
        trainer.train()
    return model, watch.seconds
