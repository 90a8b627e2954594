"""PAD's second and third phase, and DPO and SimPO on the same responses and the same budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.demo.models import LanguageModel
from pad_kernels.demo.outcome import Progress
from pad_kernels.demo.pretrain import Trainer, adamw
from pad_kernels.demo.sampling import Responses
from pad_kernels.demo.settings import Settings

CHUNK = 64  # prompts scored at a time
Checkpoint = Callable[[LanguageModel, int], None]


@torch.no_grad()
def score(model: LanguageModel, responses: Responses, normalize: str = "length") -> Tensor:
    """Rewards [prompts, n]: each response's log-prob under a model, per token or summed."""
    parts = zip(responses.inputs.split(CHUNK), responses.labels.split(CHUNK), strict=True)
    rewards = [
        pk.sequence_reward(model.logprob(inputs, labels), labels=labels, normalize=normalize)
        for inputs, labels in parts
    ]
    return torch.cat(rewards)


def pad_loss(
    model: LanguageModel, responses: Responses, rewards: Tensor, settings: Settings
) -> Tensor:
    """PAD: the student's distribution over rankings against the teacher's, from hidden states.

    The one call below is the whole loss: log-probs of n responses of each prompt over vocabulary
    chunks, length-normalised rewards, and the Jensen-Shannon divergence of two Plackett-Luce
    distributions over the n! rankings.
    """
    return pk.linear_preference_loss(
        model.hidden(responses.inputs),
        model.weight,
        responses.labels,
        rewards,
        beta=settings.pad.beta,
        kind="jsd",
        **model.head,
    )


def pair_loss(
    model: LanguageModel, pairs: Responses, reference: Tensor, kind: str, settings: Settings
) -> Tensor:
    """DPO (sums of log-probs against a reference [P, 2]) or SimPO (means, no reference)."""
    logprob = model.logprob(pairs.inputs, pairs.labels)
    if kind == "dpo":
        sums = pk.sequence_reward(logprob, labels=pairs.labels, normalize="none")
        columns = (*sums.unbind(1), *reference.unbind(1))
        return pk.pairwise_preference_loss(*columns, kind="dpo", beta=settings.dpo.beta).loss
    means = pk.sequence_reward(logprob, labels=pairs.labels)
    simpo = settings.simpo
    return pk.pairwise_preference_loss(
        *means.unbind(1), kind="simpo", beta=simpo.beta, gamma=simpo.gamma
    ).loss


def best_and_worst(rewards: Tensor) -> Tensor:
    """Indices [prompts, 2] of the responses that the teacher likes most and least."""
    return torch.stack([rewards.argmax(1), rewards.argmin(1)], dim=1)


def _prompt_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def train(
    student: LanguageModel,
    kind: str,
    responses: Responses,
    rewards: Tensor,
    settings: Settings,
    progress: Progress,
    checkpoint: Checkpoint,
) -> tuple[LanguageModel, float]:
    """Train a copy of the student; returns it and the seconds spent, checkpoints not counted.

    `checkpoint(model, step)` is called before the first step and `settings.checkpoints` times more.
    """
    method = settings.method(kind)
    vocab_size = student.head["vocab_size"]
    model = LanguageModel(copy.deepcopy(student.model), vocab_size)
    trainer = Trainer(
        model, [adamw(model.parameters(), method.learning_rate)], settings.preference_steps
    )
    chosen = best_and_worst(rewards)
    pairs = responses.select(torch.arange(len(rewards)), chosen)
    reference = score(student, pairs, normalize="none") if kind == "dpo" else chosen
    size = settings.step_responses // method.responses
    batches = _prompt_batches(len(rewards), min(size, len(rewards)), settings.seed)
    seconds, every = 0.0, max(1, settings.preference_steps // settings.checkpoints)
    checkpoint(model, 0)
    for step in range(settings.preference_steps):
        start = time.perf_counter()
        prompts = next(batches)
        if kind == "pad":
            loss = pad_loss(model, responses.select(prompts), rewards[prompts], settings)
        else:
            part = pairs.select(prompts)
            loss = pair_loss(model, part, reference[prompts], kind, settings)
        value = trainer.step(loss)
        seconds += time.perf_counter() - start
        progress(f"{kind} loss {value:.3f}")
        if (step + 1) % every == 0:
            checkpoint(model, step + 1)
    return model, seconds
