"""Batches: sequences padded or end to end, and where in them the tokens are that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What a loss may be a mean over: rows of the data set, or tokens of a row's first or its other
#: responses.
COUNTS = ("rows", "first", "second")


class Example(NamedTuple):
    """One response behind its prompt."""

    prompt: Sequence[int]
    response: Sequence[int]
    role: int  # 0: a row's first response column, 1: any other
    cache_row: int  # its place among all responses of the data set that a teacher is asked about


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward is called with."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {"use_cache": False, **{name: batch[name] for name in names if name in batch}}


def flat_hidden(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states [N, H] of the N positions that predict a response's token.

    Every loss works on these: it sees no prompts, no padding and no difference between padded and
    packed batches.
    """
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch["positions"])


def _padded(examples: Sequence[Example], pad_id: int) -> tuple[dict[str, Tensor], list[int]]:
    lengths = [len(each.prompt) + len(each.response) for each in examples]
    longest = max(lengths)
    ids = [
        [*each.prompt, *each.response] + [pad_id] * (longest - length)
        for each, length in zip(examples, lengths, strict=True)
    ]
    mask = [[1] * length + [0] * (longest - length) for length in lengths]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return inputs, [longest * i for i in range(len(examples))]


def _packed(examples: Sequence[Example]) -> tuple[dict[str, Tensor], list[int]]:
    ids = [token for each in examples for token in (*each.prompt, *each.response)]
    lengths = [len(each.prompt) + len(each.response) for each in examples]
    positions = [i for length in lengths for i in range(length)]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return inputs, [0, *accumulate(lengths)][:-1]


def lay_out(
    examples: Sequence[Example], pad_id: int, *, padding_free: bool = False
) -> dict[str, Any]:
    """Tensors of some sequences.

    Returns:
        ``input_ids`` [S, T] with ``attention_mask``, or [1, total] with ``position_ids``;
        ``positions`` int64 [N], where in the flattened ids a response's token is predicted;
        ``targets`` int64 [N], these tokens; ``cache_rows``, a list.
    """
    inputs, starts = _packed(examples) if padding_free else _padded(examples, pad_id)
    positions = [
        start + len(each.prompt) - 1 + i
        for start, each in zip(starts, examples, strict=True)
        for i in range(len(each.response))
    ]
    targets = [token for each in examples for token in each.response]
    return {
        **inputs,
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
        "cache_rows": [each.cache_row for each in examples],
    }


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows that :func:`~pad_kernels.integrations.transformers.data.encode` made.

    Beside what :func:`lay_out` makes of all their responses, a batch has

    - ``offsets`` int64 [rows·n + 1]: where in the N tokens each response begins, n being the
      most that a row has; one that a row lacks is empty;
    - ``valid`` bool [rows, n]: which are there;
    - ``second`` bool [N]: tokens of other responses than a row's first;
    - ``counts`` float64 [3], see COUNTS;
    - ``rewards`` [rows, n] and other numbers [rows], float32, and ``label`` bool [rows];
    - ``taught``: the same layout of those responses alone that a teacher is asked about, where
      that is not all of them;
    - ``data_key``: the data set, for teachers on disk;
    - ``unrelated``: of responses behind prompts that are not theirs, for KTO.
    """

    pad_id: int
    padding_free: bool = False
    taught_from: int = 0  # a teacher is asked about a row's responses from this one on
    grouped: bool = False  # all responses of a row are of one kind, "first"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows."""
        by_row = [self._examples(row) for row in rows]
        examples = [each for group in by_row for each in group]
        batch = lay_out(examples, self.pad_id, padding_free=self.padding_free)
        n = max(len(group) for group in by_row)
        lengths = [
            len(group[i].response) if i < len(group) else 0 for group in by_row for i in range(n)
        ]
        second = [each.role == 1 for each in examples for _ in each.response]
        batch["offsets"] = torch.tensor([0, *accumulate(lengths)])
        batch["valid"] = torch.tensor([[i < len(group) for i in range(n)] for group in by_row])
        batch["second"] = torch.tensor(second)
        counts = [len(rows), len(second) - sum(second), sum(second)]
        batch["counts"] = torch.tensor(counts, dtype=torch.float64)
        if self.taught_from:
            taught = [each for group in by_row for each in group[self.taught_from :]]
            batch["taught"] = lay_out(taught, self.pad_id, padding_free=self.padding_free)
        if "unrelated_ids" in rows[0]:
            pairs = [Example(row["prompt_ids"], row["unrelated_ids"], 0, 0) for row in rows]
            batch["unrelated"] = lay_out(pairs, self.pad_id, padding_free=self.padding_free)
            lengths = [len(each.response) for each in pairs]
            batch["unrelated"]["offsets"] = torch.tensor([0, *accumulate(lengths)])
        if "data_key" in rows[0]:
            batch["data_key"] = rows[0]["data_key"]
            if "taught" in batch:
                batch["taught"]["data_key"] = batch["data_key"]
        return {**batch, **_numbers(rows, n)}

    def _examples(self, row: Mapping[str, Any]) -> list[Example]:
        role = 0 if self.grouped else 1
        first = row["first_cache_row"] - self.taught_from
        return [
            Example(row["prompt_ids"], ids, role if i else 0, first + i)
            for i, ids in enumerate(row["response_ids"])
        ]


def first_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A batch whose loss is that of its first ``rows`` rows; at least one is left.

    Samplers repeat rows to give every rank whole batches, and an evaluation must not count them.
    The models' inputs stay as they are.
    """
    n, all_rows = batch["valid"].shape[1], batch["valid"].shape[0]
    responses = int(batch["valid"][:rows].sum())
    cut = dict(batch)
    tokens = int(batch["offsets"][rows * n])
    cut.update(_first_responses(batch, responses, tokens))
    cut["second"] = batch["second"][:tokens]
    cut["offsets"] = batch["offsets"][: rows * n + 1]
    second = int(cut["second"].sum())
    cut["counts"] = batch["counts"].new_tensor([rows, tokens - second, second])
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:1] == (all_rows,) and name not in _LAYOUT:
            cut[name] = value[:rows]
    if "taught" in batch:
        taught = batch["taught"]
        missing = len(batch["cache_rows"]) - len(taught["cache_rows"])  # in each row as many
        kept = responses - rows * missing // all_rows
        cut["taught"] = {**taught, **_first_responses(taught, kept, second)}
    if "unrelated" in batch:
        offsets = batch["unrelated"]["offsets"][: rows + 1]
        kept = _first_responses(batch["unrelated"], rows, int(offsets[-1]))
        cut["unrelated"] = {**batch["unrelated"], **kept, "offsets": offsets}
    return cut


_LAYOUT = {"input_ids", "attention_mask", "position_ids", "positions", "targets"}
_LAYOUT |= {"offsets", "second", "counts"}


def _first_responses(batch: Mapping[str, Any], responses: int, tokens: int) -> dict[str, Any]:
    return {
        "positions": batch["positions"][:tokens],
        "targets": batch["targets"][:tokens],
        "cache_rows": batch["cache_rows"][:responses],
    }


def _numbers(rows: Sequence[Mapping[str, Any]], n: int) -> dict[str, Tensor]:
    """The other columns of encoded rows, lists filled up with zeros."""
    known = {"prompt_ids", "response_ids", "unrelated_ids", "length", "first_cache_row", "data_key"}
    found = {}
    for name in rows[0].keys() - known:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            values = [value + [0.0] * (n - len(value)) for value in values]
        found[name] = torch.tensor(values)
    return found
