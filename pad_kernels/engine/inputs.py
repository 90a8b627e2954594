"""Per-row inputs: what is wrong with them, and what stands in for rows that do not count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from pad_kernels._checks import fail_value

#: Per-row inputs by the names that callers know them by.
PUBLIC_NAMES = {
    "teacher_ids": "teacher.ids",
    "teacher_logprobs": "teacher.logprobs",
    "advantage_ids": "aligned.ids",
    "advantage_values": "aligned.values",
}
#: Inputs whose ids differ within a row.
DISTINCT = ("teacher_ids", "advantage_ids")
#: How far the probabilities of an offline teacher may exceed 1: those of a float16 cache do.
EXCESS = 0.01


def muted_input(name: str, x: Tensor, muted: Tensor, vocab: int) -> Tensor:
    """An input [rows, k], harmless in rows that count nothing, with ids that can be gathered."""
    if x.dtype == torch.int64:
        spread = torch.arange(x.shape[1], device=x.device)
        return torch.where(muted.unsqueeze(1), spread, x).clamp(0, vocab - 1)
    harmless = -math.log(2 * x.shape[1]) if name == "teacher_logprobs" else 0.0
    return x.masked_fill(muted.unsqueeze(1), harmless)


def check_inputs(vocab: int, inputs: Mapping[str, Tensor], ignore_index: int | None = None) -> None:
    """Raise if a row's label, candidate or offline teacher is not what it should be."""
    for name, x in inputs.items():
        bad = _bad_entries(name, x, vocab)
        if bad is not None and bad.any():
            _complain(name, x[bad], vocab, ignore_index)


def bad_rows(vocab: int, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Rows [N] with an input that is not what it should be; None if nothing is checked."""
    found = None
    for name, x in inputs.items():
        bad = _bad_entries(name, x, vocab)
        if bad is not None:
            found = bad if found is None else found | bad
    return found


def _bad_entries(name: str, x: Tensor, vocab: int) -> Tensor | None:
    """Rows [N] of an input [N, k] that are not what they should be; None if all may be anything."""
    if x.dtype == torch.int64:
        bad = ((x < 0) | (x >= vocab)).any(-1)
        twice = (x.sort(-1).values.diff(dim=-1) == 0).any(-1) if name in DISTINCT else None
        return bad if twice is None else bad | twice
    if name == "teacher_logprobs":
        # Written so that NaN is bad.
        fine = (x <= EXCESS).all(-1) & (x.double().exp().sum(-1) <= 1 + EXCESS)
        return ~fine
    return ~x.isfinite().all(-1) if name == "advantage_values" else None


def _complain(name: str, x: Tensor, vocab: int, ignore_index: int | None) -> NoReturn:
    """Raise about the bad rows of an input."""
    public = PUBLIC_NAMES.get(name, name)
    if x.dtype == torch.int64:
        low, high = (int(end) for end in x.aminmax())
        if low >= 0 and high < vocab:
            fail_value(public, "distinct ids in each row", "an id twice")
        expected = f"token ids in [0, {vocab})"
        if name == "labels" and ignore_index is not None:
            expected += f" or ignore_index {ignore_index}"
        fail_value(public, expected, low if low < 0 else high)
    if name == "advantage_values":
        fail_value(public, "finite log-ratios", "NaN or an infinity")
    if x.isnan().any():
        fail_value(public, "log-probabilities", "NaN")
    if float(x.max()) > EXCESS:
        fail_value(public, "log-probabilities, at most 0", float(x.max()))
    mass = float(x.double().exp().sum(-1).max())
    fail_value(public, "probabilities that sum to at most 1", f"a sum of {mass:g}")
