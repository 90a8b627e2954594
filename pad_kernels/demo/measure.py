"""What is measured on held-out prompts, before and after."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

import pad_kernels as pk
from pad_kernels.demo.outcome import Estimate, Result
from pad_kernels.demo.preference import score
from pad_kernels.demo.sampling import Responses, sample
from pad_kernels.demo.settings import Settings
from pad_kernels.integrations.transformers.metrics import kendall_tau


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts [P, L], the first student's responses to them, the teacher's rewards."""

    prompts: Tensor
    responses: Responses
    teacher_rewards: Tensor

    @torch.no_grad()
    def ranking(self, model: PreTrainedModel, settings: Settings) -> tuple[Tensor, Tensor]:
        """Listwise loss and Kendall's tau against the teacher of each prompt, two tensors [P]."""
        rewards = score(model, self.responses)
        losses = pk.listwise_preference_loss(
            rewards, self.teacher_rewards, beta=settings.pad.beta, kind="jsd", reduction="none"
        )
        every = torch.ones_like(rewards, dtype=torch.bool)
        return losses, kendall_tau(rewards, self.teacher_rewards, every)


def distinct_pairs(responses: Responses) -> float:
    """Share of different pairs of neighbouring tokens; low when a model repeats itself."""
    pairs: list[tuple[int, int]] = []
    for prompt in range(responses.labels.shape[0]):
        for response in range(responses.labels.shape[1]):
            tokens = responses.tokens(prompt, response)
            pairs += itertools.pairwise(tokens)
    return len(set(pairs)) / max(1, len(pairs))


def measure(
    name: str,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    held_out: HeldOut,
    text_loss: float,
    seconds: float,
    settings: Settings,
) -> Result:
    """Measure a student; every student samples its fresh responses with the same seed."""
    losses, taus = held_out.ranking(model, settings)
    written = sample(model, held_out.prompts, settings, settings.seed + 3)
    rewards = score(teacher, written)
    return Result(
        name=name,
        loss=Estimate.of(losses),
        tau=Estimate.of(taus),
        teacher_logprob=Estimate.of(rewards.mean(1)),
        length=written.lengths().float().mean().item(),
        distinct=distinct_pairs(written),
        text_loss=text_loss,
        seconds=seconds,
        written=written,
    )
