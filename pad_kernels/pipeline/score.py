"""``score``: a teacher's rewards of responses, from its hidden states, never its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.integrations.transformers import ModelTeacher, hidden_states
from pad_kernels.integrations.transformers.collate import Example, lay_out
from pad_kernels.integrations.transformers.data import Encoder, Format
from pad_kernels.integrations.transformers.teachers import head_logprob
from pad_kernels.pipeline import models, parts, questions, rows
from pad_kernels.pipeline.settings import Score, Settings, as_dict, needed

ADDED = ("rewards", "teacher_logprob", "option_probability")
SCORED = Format(many="responses")


def run(settings: Settings) -> Path:
    """The command; returns the folder.

    Raises:
        ValueError: a mistake in what is given.
    """
    options = needed("score", settings.score)
    source = options.responses or str(settings.folder("samples"))
    data = rows.read("score.responses", source)
    rows.need("score.responses", data, "prompt", "responses")
    data = data.remove_columns([name for name in ADDED if name in data.column_names])
    models.check_tokenizers(settings, "teacher")
    tokenizer = models.tokenizer("teacher", settings.teacher_tokenizer or settings.teacher)
    room = models.context(models.config("teacher", settings.teacher))
    encoder = Encoder(SCORED, tokenizer, room, "error", "score.responses")
    encoded = data.map(
        encoder, with_indices=True, remove_columns=data.column_names, desc="Tokenizing responses"
    )
    sizes = [len(each) for each in encoded["response_ids"]]
    _check_counts(sizes, options.calibration)
    shown = {"none": 0, "pairwise": 2, "nway": max(sizes)}[options.calibration]
    letters = questions.option_ids(tokenizer, shown)
    identity = {
        "stage": "score",
        "settings": as_dict(options),
        "seed": settings.seed,
        "dtype": settings.dtype,
        "device": str(models.device(settings)),
        "inputs": {
            "teacher": rows.fingerprint(settings.teacher),
            "tokenizer": settings.teacher_tokenizer
            and rows.fingerprint(settings.teacher_tokenizer),
            "responses": rows.fingerprint(source),
        },
    }
    scorer: list[Scorer] = []

    def make(start: int, stop: int, advance: Callable[[int], Any]) -> dict[str, pa.Array]:
        if not scorer:
            scorer.append(Scorer(models.teacher("teacher", settings), options, letters))
        columns: dict[str, list[Any]] = {}
        for i in range(start, stop, options.batch_size):
            j = min(i + options.batch_size, stop)
            asked = [_asked(data[k], k, options.calibration, encoder) for k in range(i, j)]
            found = scorer[0](encoded.select(range(i, j)).to_list(), asked)
            for name, values in found.items():
                columns.setdefault(name, []).extend(values)
            advance(j - i)
        kind = pa.list_(pa.float32())
        return {name: pa.array(values, kind) for name, values in columns.items()}

    folder = settings.folder("scored")
    parts.write(folder, identity, data, options.shard_rows, make)
    return folder


class Asked(dict[tuple[int, ...], list[int]]):
    """A prompt's questions: which responses each shows, and its ids."""


def _check_counts(sizes: list[int], calibration: str) -> None:
    """Refuse rows with too few responses for a question, or too many."""
    if calibration == "none":
        return
    most = len(questions.LETTERS) if calibration == "nway" else max(sizes)
    for index, size in enumerate(sizes):
        if not 2 <= size <= most:
            limit = f"2 to {most}" if calibration == "nway" else "at least 2"
            raise ValueError(
                f"score.responses, column 'responses', row {index}: expected {limit} responses for "
                f"calibration: {calibration}, got {size}"
            )


def _asked(row: Mapping[str, Any], index: int, calibration: str, encoder: Encoder) -> Asked:
    """The questions about a row; made when they are due, since all together would be large."""
    asked = Asked()
    if calibration == "none":
        return asked
    tokenizer = encoder.tokenizer
    texts = [questions.plain(each, tokenizer) for each in row.get("texts") or row["responses"]]
    request = questions.plain(row["prompt"], tokenizer)
    talk = not isinstance(row["prompt"], str)
    for group in questions.shown(calibration, len(texts)):
        text = questions.question(request, [texts[i] for i in group])
        ids = encoder.prompt(questions.prompt(text, tokenizer, talk=talk), index)
        if encoder.limit is not None and len(ids) > encoder.limit:
            raise ValueError(
                f"score.responses, row {index}: expected a question of at most the teacher's "
                f"context, {encoder.limit} tokens, got {len(ids)}; pairwise ones are shorter than "
                "nway"
            )
        asked[group] = ids
    return asked


class Scorer:
    """A teacher that scores.

    Args:
        teacher: the model.
        options: what to compute.
        letters: for each option's letter the ids that stand for it; none without questions.
    """

    def __init__(self, teacher: ModelTeacher, options: Score, letters: list[list[int]]) -> None:
        self.teacher, self.options = teacher, options
        self.device = next(teacher.model.parameters()).device
        self.letters = letters

    @torch.inference_mode()
    def __call__(
        self, encoded: list[Mapping[str, Any]], asked: list[Asked]
    ) -> dict[str, list[list[float]]]:
        """Rewards of some prompts' responses, and what they are made of."""
        sizes = [len(row["response_ids"]) for row in encoded]
        means = self.mean_logprobs(encoded)
        columns = {"rewards": means}
        if self.letters:
            chances = torch.cat([self.chances(*each) for each in zip(asked, sizes, strict=True)])
            calibrated = pk.calibrated_rewards(
                means, chances, alpha=self.options.alpha, floor=self.options.floor
            )
            columns = {"rewards": calibrated, "option_probability": chances}
        columns["teacher_logprob"] = means
        return {n: [p.tolist() for p in each.split(sizes)] for n, each in columns.items()}

    def mean_logprobs(self, encoded: list[Mapping[str, Any]]) -> Tensor:
        """Mean log-prob of each response [all of them], float32 on the CPU."""
        examples = [
            Example(row["prompt_ids"], ids, 0, 0) for row in encoded for ids in row["response_ids"]
        ]
        batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in lay_out(examples, 0).items()
        }
        logprob = head_logprob(self.teacher(batch), batch["targets"])
        offsets = [0, *accumulate(len(each.response) for each in examples)]
        bounds = torch.tensor(offsets, device=self.device)
        return pk.sequence_reward(logprob, cu_seqlens=bounds, normalize="length").cpu()

    def chances(self, asked: Asked, n: int) -> Tensor:
        """Probability of each of a prompt's n responses [n]: the mean over its questions."""
        device = self.device
        count = len(next(iter(asked)))
        longest = max(map(len, asked.values()))
        ids = [each + [0] * (longest - len(each)) for each in asked.values()]
        mask = [[1] * len(each) + [0] * (longest - len(each)) for each in asked.values()]
        last = torch.tensor([len(each) - 1 for each in asked.values()], device=device)
        hidden = hidden_states(
            self.teacher.model,
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
        )
        at = hidden[torch.arange(len(last), device=device), last]
        head = self.teacher.head()
        flat = torch.tensor([i for each in self.letters[:count] for i in each], device=device)
        logprob = pk.option_logprobs(at, head.weight, flat, **head.options()).cpu()
        widths = [len(each) for each in self.letters[:count]]
        letters = [each.exp().sum(1) for each in logprob.split(widths, 1)]
        total, seen = torch.zeros(n), torch.zeros(n)
        for question, group in enumerate(asked):
            for letter, response in enumerate(group):
                total[response] += letters[letter][question].float()
                seen[response] += 1
        return (total / seen).clamp(max=1.0)
