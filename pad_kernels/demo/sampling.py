"""PAD's first phase: n responses a prompt, sampled from the student at high temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pad_kernels.demo.models import IGNORE
from pad_kernels.demo.settings import Settings

CHUNK = 256  # sequences sampled side by side: enough to fill the GEMMs, small enough for any memory
EOS = 2


@dataclass(frozen=True)
class Responses:
    """Sampled responses of some prompts.

    Attributes:
        inputs: token ids [prompts, n, L], a prompt and its response, without the last token.
        labels: [prompts, n, L], the next tokens: the response up to and with its end-of-text token;
            the prompt and what follows the end are ignored.
    """

    inputs: Tensor
    labels: Tensor

    def select(self, responses: Tensor) -> Responses:
        """Some responses [prompts, m] of each prompt, by their indices."""
        index = responses[..., None].expand(-1, -1, self.inputs.shape[-1])
        return Responses(self.inputs.gather(1, index), self.labels.gather(1, index))

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt."""
        begins = (self.labels[:, 0] != IGNORE).int().argmax(-1).tolist()
        return [row[: at + 1].tolist() for row, at in zip(self.inputs[:, 0], begins, strict=True)]

    def continuations(self) -> list[list[list[int]]]:
        """Token ids of each response, with its end-of-text token, by prompt."""
        return [[row[row != IGNORE].tolist() for row in group] for group in self.labels]

    def tokens(self, prompt: int, response: int) -> list[int]:
        """Token ids of one response, without its end-of-text token."""
        row = self.labels[prompt, response]
        return row[(row != IGNORE) & (row != EOS)].tolist()

    def lengths(self) -> Tensor:
        """Response tokens [prompts, n]."""
        return (self.labels != IGNORE).sum(-1)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index a row from softmax(logits) [B, V], as [B, 1].

    By inverting the cumulative distribution: one random number a row. `torch.multinomial` draws one
    for every entry, which takes longer than the model does.
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(-1)
    point = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)


def _sample(
    model: PreTrainedModel, prompts: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """Continue prompts [B, L] by response_tokens tokens, with the keys and values cached."""
    cache = DynamicCache(config=model.config)
    ids, step = prompts, prompts
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for position in range(settings.response_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1] / settings.temperature
        if position < settings.least_tokens:
            logits[:, EOS] = -torch.inf
        step = draw(logits, generator)
        step[done] = EOS
        done |= step[:, 0] == EOS
        ids = torch.cat([ids, step], dim=1)
    return ids


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Tensor, settings: Settings, seed: int, n: int | None = None
) -> Responses:
    """Sample n responses to each of prompts [P, L]; the seed decides all of them."""
    n = n or settings.responses
    generator = torch.Generator().manual_seed(seed)
    repeated = prompts.repeat_interleave(n, dim=0)
    parts = [_sample(model, part, settings, generator) for part in repeated.split(CHUNK)]
    ids = torch.cat(parts)
    labels = ids[:, 1:].clone()
    labels[:, : prompts.shape[1] - 1] = IGNORE
    ended = ((labels == EOS).cumsum(-1) - (labels == EOS).long()) > 0
    labels[ended] = IGNORE
    shape = (len(prompts), n, ids.shape[1] - 1)
    return Responses(ids[:, :-1].reshape(shape), labels.reshape(shape))
