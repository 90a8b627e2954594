"""The task: prompts, writers of mixed quality, and the reward that all of this is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.miniature.settings import Settings

SPECIAL = ("<pad>", "<bos>", "<eos>")


class World:
    """Says what a response is worth, and what people write.

    A response's reward is a sum over its words. A word is worth something to the prompt's subject,
    something to its manner, and something after the word before it; all of these are random
    numbers. People write what they are used to, which has the same form and nothing to do with the
    reward, but each writer cares about the reward too, one more than another.

    Prompts are [bos, subject, manner]. Those held out combine what others have apart: a model that
    has learnt both parts does well there too.

    Args:
        settings: sizes.
        seed: decides everything.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        s = settings
        self.first_word = len(SPECIAL) + s.subjects + s.manners
        self.vocabulary = [
            *SPECIAL,
            *(f"subject{i}" for i in range(s.subjects)),
            *(f"manner{i}" for i in range(s.manners)),
            *(f"w{i:02d}" for i in range(s.words)),
        ]
        order = torch.randperm(s.subjects * s.manners, generator=self.generator)
        self.held_out, self.training = order[: s.held_out], order[s.held_out :]
        self.worth = self._tables(0.8, 0.8, 0.8)
        self.habit = self._tables(1.0, 1.0, 1.2)
        again = torch.arange(s.words)
        self.worth[:, again + 1, again] -= 2.0  # nobody likes a word twice in a row

    def _tables(self, subject: float, manner: float, before: float) -> Tensor:
        """[prompts, words + 1, words]: prompt, the word before (0: none), the word."""
        s = self.settings

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator)

        by_subject = subject * normal(s.subjects, 1, 1, s.words)
        by_manner = manner * normal(1, s.manners, 1, s.words)
        by_word = before * normal(1, 1, s.words + 1, s.words)
        return (by_subject + by_manner + by_word).flatten(0, 1)

    def rewards(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """True reward [n] of responses [n, length] of words, to prompts [n]."""
        before = torch.cat([torch.zeros_like(responses[:, :1]), responses[:, :-1] + 1], 1)
        return self.worth[prompts[:, None], before, responses].sum(1)

    def draw(self, prompts: Tensor, count: int) -> Tensor:
        """``count`` of some prompts."""
        return prompts[torch.randint(len(prompts), (count,), generator=self.generator)]

    def written(self, prompts: Tensor) -> Tensor:
        """What people answer, each time somebody else: words [n, length]."""
        care = torch.rand(len(prompts), 1, generator=self.generator)
        rows, words = torch.arange(len(prompts)), []
        before = torch.zeros_like(prompts)
        for _ in rows.new_zeros(self.settings.length):
            at = (prompts, before)
            chances = (self.habit[at] + care * self.worth[at]).softmax(-1)
            word = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
            words.append(word)
            before = word + 1
        return torch.stack(words, 1)

    def pairs(self, prompts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [n], chosen and rejected responses: people choose by reward, and err at times.

        The chance of a choice is Bradley and Terry's: a sigmoid of the rewards' difference.
        """
        prompts = self.draw(prompts, count)
        one, other = self.written(prompts), self.written(prompts)
        gap = self.rewards(prompts, one) - self.rewards(prompts, other)
        first = torch.rand(count, generator=self.generator) < gap.sigmoid()
        chosen = torch.where(first[:, None], one, other)
        return prompts, chosen, torch.where(first[:, None], other, one)

    # Token ids.

    def prompt_ids(self, prompts: Tensor) -> Tensor:
        """Ids [n, 3] of prompts [n]."""
        bos = torch.full_like(prompts, SPECIAL.index("<bos>"))
        subject = len(SPECIAL) + prompts // self.settings.manners
        manner = len(SPECIAL) + self.settings.subjects + prompts % self.settings.manners
        return torch.stack([bos, subject, manner], 1)

    def response_ids(self, responses: Tensor) -> Tensor:
        """Ids of words."""
        return responses + self.first_word

    def rows(self, prompts: Tensor, **columns: Tensor) -> list[dict[str, Any]]:
        """Rows of a data set: ids of the prompt, and of words [n, length] or [n, k, length]."""
        lists = {name: self.response_ids(words).tolist() for name, words in columns.items()}
        lists["prompt"] = self.prompt_ids(prompts).tolist()
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
