"""What is measured on held-out prompts, before and after."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.demo.models import LanguageModel
from pad_kernels.demo.outcome import Estimate, Result
from pad_kernels.demo.preference import score
from pad_kernels.demo.sampling import Responses, sample
from pad_kernels.demo.settings import Settings


def kendall_tau(first: Tensor, second: Tensor) -> Tensor:
    """Kendall's tau-b of each row of two [groups, n] tensors; 0 where one of them is all ties.

    (concordant − discordant pairs) / sqrt(pairs untied in the first · pairs untied in the second),
    Kendall 1945.

    >>> kendall_tau(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 3, 2]]))
    tensor([0.3333])
    """
    left, right = torch.triu_indices(first.shape[-1], first.shape[-1], offset=1)
    a = torch.sign(first[:, left] - first[:, right])
    b = torch.sign(second[:, left] - second[:, right])
    untied = a.abs().sum(-1) * b.abs().sum(-1)
    return (a * b).sum(-1) / untied.clamp(min=1).sqrt()


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts [P, L], the first student's responses to them, the teacher's rewards."""

    prompts: Tensor
    responses: Responses
    teacher_rewards: Tensor

    @torch.no_grad()
    def ranking(self, model: LanguageModel, settings: Settings) -> tuple[Tensor, Tensor]:
        """Listwise loss and Kendall's tau against the teacher of each prompt, two tensors [P]."""
        rewards = score(model, self.responses)
        losses = pk.listwise_preference_loss(
            rewards, self.teacher_rewards, beta=settings.pad.beta, kind="jsd", reduction="none"
        )
        return losses, kendall_tau(rewards, self.teacher_rewards)


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
    model: LanguageModel,
    teacher: LanguageModel,
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
