"""Rows of preference data sets, in the formats that TRL reads, to token ids."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import datasets

from pad_kernels._checks import fail_type, fail_value
from pad_kernels._version import __version__

logger = logging.getLogger(__name__)
_ENCODED = {"prompt_ids", "response_ids", "first_cache_row"}


@dataclass(frozen=True)
class Format:
    """Which columns a method reads, beside ``prompt``.

    Args:
        responses: columns with one response each.
        many: a column with a list of responses, or None.
        at_least: how many it must have.
        scores: a column with one number for each of these, or None.
        numbers: columns with one number a row.
        flag: a column with a bool, or None.
        taught_from: a teacher is asked about a row's responses from this one on.
        unrelated: add the previous row's response, which is not this prompt's (for KTO).
        instead: another name for a column, used where the first is missing.
        advice: what to do about a column that is missing, by name.
        unwanted: columns that may not be there, by name: what they would contradict.
    """

    responses: tuple[str, ...] = ()
    many: str | None = None
    at_least: int = 1
    scores: str | None = None
    numbers: tuple[str, ...] = ()
    flag: str | None = None
    taught_from: int = 0
    unrelated: bool = False
    instead: Mapping[str, str] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)
    unwanted: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """All of them but the prompt."""
        optional = [name for name in (self.many, self.scores, self.flag) if name is not None]
        return [*self.responses, *optional, *self.numbers]

    def found_in(self, columns: list[str]) -> Format:
        """The same with the other name for each column that is missing under its own."""
        names = [
            self.instead[name] if name not in columns and name in self.instead else name
            for name in self.responses
        ]
        return replace(self, responses=tuple(names))


@dataclass(frozen=True)
class Encoder:
    """Turns a row into ids.

    A text is a string, which the tokenizer turns into ids; a conversation (a list of messages with
    ``role`` and ``content``), for which its chat template does; or a list of token ids, which is
    taken as it is. Prompt and response are tokenised apart, as when the response is generated from
    the prompt, and a response that is a string ends with the end-of-sequence token.
    """

    format: Format
    tokenizer: Any
    limit: int | None
    overlong: str
    where: str  # the data set's name in messages
    version: str = __version__  # rows that another version encoded are not taken from disk

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Encode one row.

        Returns:
            ``prompt_ids``, ``response_ids`` (a list of lists), ``length``, all tokens of the row as
            it is laid out, for samplers; the numbers and the flag under their
            own names, the scores as ``rewards``, and ``kept``: False for an overlong row to drop.

        Raises:
            ValueError: a value that is not what its column must have, with column and row.
        """
        texts = [(name, row[name]) for name in self.format.responses]
        if self.format.many is not None:
            several = row[self.format.many]
            if not isinstance(several, list) or len(several) < self.format.at_least:
                expected = f"a list of at least {self.format.at_least} responses"
                self.refuse(self.format.many, index, expected, several)
            texts += [(self.format.many, each) for each in several]
        prompt = row["prompt"] if "prompt" in row else self._common_prompt(texts, index)
        if "prompt" not in row:
            texts = [(name, text[len(prompt) :]) for name, text in texts]
        prompt_ids = self.prompt(prompt, index)
        responses = [self._response(name, text, prompt, prompt_ids, index) for name, text in texts]
        encoded: dict[str, Any] = {"prompt_ids": prompt_ids, "response_ids": responses}
        longest = max(range(len(responses)), key=lambda i: len(responses[i]))
        encoded["kept"] = self._fits(
            texts[longest][0], len(prompt_ids), len(responses[longest]), index
        )
        encoded["length"] = len(prompt_ids) * len(responses) + sum(map(len, responses))
        for name in self.format.numbers:
            encoded[name] = self._number(name, row[name], index)
        if self.format.scores is not None:
            encoded["rewards"] = self._scores(row[self.format.scores], len(responses), index)
        if self.format.flag is not None:
            flag = row[self.format.flag]
            if not isinstance(flag, bool):
                self.refuse(self.format.flag, index, "True or False", flag)
            encoded[self.format.flag] = flag
        return encoded

    def refuse(self, column: str, index: int, expected: str, got: Any) -> None:
        """Raise the error of a value, naming where it stands."""
        shown = repr(got)
        fail_value(
            f"{self.where}, column {column!r}, row {index}",
            expected,
            shown if len(shown) <= 80 else shown[:77] + "...",
        )

    def _common_prompt(self, texts: list[tuple[str, Any]], index: int) -> list[Any]:
        """What the conversations of a row without a prompt have in common."""
        for name, text in texts:
            if not _is_conversation(text) or len(text) < 2:
                expected = "a conversation that begins with the prompt, since there is no column"
                self.refuse(name, index, f"{expected} 'prompt'", text)
        first = texts[0][1]
        longest = min(len(text) for _, text in texts) - 1
        same = 0
        while same < longest and all(text[same] == first[same] for _, text in texts):
            same += 1
        if same == 0:
            self.refuse(texts[0][0], index, "conversations with a common beginning", first)
        return first[:same]

    def prompt(self, prompt: Any, index: int) -> list[int]:
        """Ids of a prompt; ``index`` is its row, for messages."""
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
            end = self.tokenizer.eos_token
            # Some tokenizers end every text; a response is to follow this one.
            if ids and ids[-1] == self.tokenizer.eos_token_id and not prompt.endswith(end):
                ids.pop()
        elif _is_ids(prompt):
            ids = self._checked(prompt, "prompt", index)
        elif _is_conversation(prompt):
            if prompt[-1]["role"] == "assistant":
                self.refuse("prompt", index, "a conversation that the user ends", prompt)
            ids = self._templated(prompt, add_generation_prompt=True)
        else:
            ids = []
        if not ids:
            self.refuse("prompt", index, "a text, a conversation or ids, not empty", prompt)
        return ids

    def _response(
        self, column: str, text: Any, prompt: Any, prompt_ids: list[int], index: int
    ) -> list[int]:
        if isinstance(text, str) and text and not _is_conversation(prompt):
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            if end is None:
                fail_value("processing_class", "a tokenizer with an eos_token", "none")
            return ids if ids and ids[-1] == end else [*ids, end]
        if _is_ids(text):
            return self._checked(text, column, index)
        if _is_conversation(text) and _is_conversation(prompt):
            ids = self._templated([*prompt, *text], add_generation_prompt=False)
            if ids[: len(prompt_ids)] != prompt_ids:
                expected = "a chat template that only adds to the prompt when a response follows"
                self.refuse(column, index, expected, text)
            if len(ids) > len(prompt_ids) and all(message["content"] for message in text):
                return ids[len(prompt_ids) :]
        kind = "a conversation" if _is_conversation(prompt) else "a text"
        self.refuse(column, index, f"{kind} or ids, not empty, as the prompt is", text)
        raise AssertionError

    def _templated(self, messages: list[Any], *, add_generation_prompt: bool) -> list[int]:
        if not self.tokenizer.chat_template:
            expected = "a tokenizer with a chat_template, since the data are conversations"
            fail_value("processing_class", expected, "one without")
        return list(
            self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        )

    def _checked(self, ids: list[int], column: str, index: int) -> list[int]:
        if not all(0 <= i < len(self.tokenizer) for i in ids):
            self.refuse(column, index, f"ids from 0 to {len(self.tokenizer) - 1}", ids)
        return list(ids)

    def _fits(self, column: str, prompt: int, response: int, index: int) -> bool:
        if self.limit is None or prompt + response <= self.limit:
            return True
        if self.overlong == "error":
            expected = f"at most {self.limit} tokens (max_length or the model's context; "
            expected += 'overlong="drop" leaves such rows out)'
            self.refuse(column, index, expected, f"{prompt} of the prompt + {response}")
        return False

    def _number(self, column: str, value: Any, index: int) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value):
            self.refuse(column, index, "a finite number", value)
        return float(value)

    def _scores(self, values: Any, count: int, index: int) -> list[float]:
        column = self.format.scores
        assert column is not None
        if not isinstance(values, list) or len(values) != count:
            self.refuse(column, index, f"{count} numbers, one for each response", values)
        return [self._number(column, value, index) for value in values]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in value)
    )


def encode(
    dataset: Any,
    format: Format,
    tokenizer: Any,
    *,
    limit: int | None,
    overlong: str = "error",
    num_proc: int | None = None,
    where: str = "train_dataset",
) -> datasets.Dataset:
    """Tokenise a data set, all of it now, so that a bad row is found before training begins.

    Args:
        dataset: a `datasets.Dataset`, or a sequence of dicts.
        format: the columns to read.
        tokenizer: of the student.
        limit: most tokens of prompt and response.
        overlong: see :class:`DistillationConfig`.
        num_proc: processes.
        where: the data set's name in messages.

    Returns:
        A data set with the columns that :class:`Encoder` makes and ``first_cache_row``, how many
        responses a teacher is asked about in the rows before.

    Raises:
        TypeError: not a data set with a length.
        ValueError: a column that is missing, or a value that is not what is expected, with its row.
    """
    rows = _rows(dataset, where)
    if set(rows.column_names) >= _ENCODED:
        return rows
    format = format.found_in(rows.column_names)
    _check_columns(rows.column_names, format, where)
    encoder = Encoder(format, tokenizer, limit, overlong, where)
    encoded = rows.map(
        encoder,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        desc=f"Tokenizing {where}",
    )
    if not all(encoded["kept"]):
        total = len(encoded)
        encoded = encoded.filter(lambda kept: kept, input_columns="kept")
        logger.warning(
            "%s: %d of %d rows are left out, longer than %d tokens",
            where,
            total - len(encoded),
            total,
            limit,
        )
    if not len(encoded):
        fail_value(where, f"a row of at most {limit} tokens", "none")
    encoded = encoded.remove_columns("kept")
    if format.unrelated:
        if len(encoded) < 2:
            fail_value(where, "at least two rows, whose prompts and responses KTO mixes", 1)
        encoded = encoded.map(_Unrelated(encoded, limit), with_indices=True)
    counts = [len(each) - format.taught_from for each in encoded["response_ids"]]
    return encoded.add_column("first_cache_row", [0, *accumulate(counts)][:-1])


def _rows(dataset: Any, where: str) -> datasets.Dataset:
    if isinstance(dataset, datasets.Dataset):
        rows = dataset
    elif isinstance(dataset, Sequence) and not isinstance(dataset, str):
        rows = datasets.Dataset.from_list(list(dataset))
    else:
        fail_type(where, "a datasets.Dataset (not a stream) or a list of dicts", dataset)
    if not len(rows):
        fail_value(where, "at least one row", "none")
    return rows


def _check_columns(columns: list[str], format: Format, where: str) -> None:
    for name in format.columns:
        if name not in columns:
            advice = f" ({format.advice[name]})" if name in format.advice else ""
            fail_value(where, f"a column {name!r}{advice}", f"columns {columns}")
    for name, other in format.unwanted.items():
        if name in columns:
            fail_value(where, f"no column {name!r} beside {other}: leave one out", "both")


def fingerprint(encoded: datasets.Dataset) -> str:
    """SHA-256 of the tokens of an encoded data set, in their order."""
    digest = hashlib.sha256()
    for name in ("prompt_ids", "response_ids"):
        for chunk in encoded.with_format("arrow").iter(1000):
            column = chunk[name].combine_chunks()
            while hasattr(column, "flatten") and hasattr(column, "value_lengths"):
                digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                column = column.flatten()
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def context(model: Any) -> int | None:
    """Longest sequence of a model, if it has one."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class _Unrelated:
    """Puts the previous row's response behind this row's prompt, as far as it fits."""

    rows: datasets.Dataset
    limit: int | None

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        ids = self.rows[index - 1]["response_ids"][0]
        room = len(ids) if self.limit is None else self.limit - len(row["prompt_ids"])
        return {"unrelated_ids": ids[:room]}
