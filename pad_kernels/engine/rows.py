"""Which rows count, and which streams and functionals each of them wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.engine.inputs import bad_rows, check_inputs
from pad_kernels.engine.recipe import Recipe


@dataclass(frozen=True)
class Part:
    """Live rows start to stop, which all use the same streams and functionals."""

    start: int
    stop: int
    streams: tuple[int, ...]
    functionals: tuple[int, ...]  # places in the recipe


@dataclass
class Rows:
    """The rows that count; the fields are those of :class:`~pad_kernels.engine.problem.Problem`."""

    live: Tensor | None
    parts: list[Part]
    muted: Tensor | None = None
    broken: Tensor | None = None


def choose_rows(
    recipe: Recipe, inputs: Mapping[str, Tensor], tokens: int, coefficients: Tensor | None
) -> Rows:
    """The rows that count, those that use the same teachers side by side; inputs checked.

    One copy to the host tells how many rows there are of each sort and whether an input is wrong.
    While a CUDA graph is captured there can be none, and on a GPU there is none without compaction:
    then every row runs with every teacher.
    """
    everything = (1 << len(recipe.heads)) - 2
    wanted = _teachers_wanted(recipe, inputs, tokens, coefficients)
    if recipe.ignore_index is not None and "labels" in inputs:
        counted = inputs["labels"][:, 0] != recipe.ignore_index
        wanted = torch.where(counted, everything if wanted is None else wanted, -1)
    bad = bad_rows(recipe.vocab, inputs)
    if bad is not None and wanted is not None:
        bad = bad & (wanted >= 0)
    whole = [_part(recipe, 0, tokens, everything)] if tokens else []
    muted = None if wanted is None else wanted < 0
    tensors = [*inputs.values()] if coefficients is None else [coefficients]
    if (on_gpu(*tensors) and not recipe.request.compact) or capturing(*tensors):
        return Rows(None, whole, muted, None if bad is None else bad.any())
    codes = range(-1, everything + 1)
    counts = _to_host(wanted, codes, bad)
    if bad is not None and counts.pop():
        check_inputs(
            recipe.vocab, {name: x[bad] for name, x in inputs.items()}, recipe.ignore_index
        )
    if wanted is None or not recipe.request.compact:
        return Rows(None, whole, muted)
    parts, done = [], 0
    for code, count in list(zip(codes, counts, strict=True))[1:]:
        if count:
            parts.append(_part(recipe, done, done + count, code))
            done += count
    if done == tokens and len(parts) == 1:
        return Rows(None, parts)
    order = wanted.sort(stable=True).indices
    return Rows(order[tokens - done :], parts)


def _to_host(wanted: Tensor | None, codes: range, bad: Tensor | None) -> list[int]:
    """How many rows have each code, then how many are bad, in one copy."""
    found = []
    if wanted is not None:
        every = torch.arange(codes.start, codes.stop, device=wanted.device)
        found.append((wanted.unsqueeze(1) == every).sum(0))
    if bad is not None:
        found.append(bad.sum().unsqueeze(0))
    return torch.cat(found).tolist() if found else []


def on_gpu(*tensors: Tensor) -> bool:
    """Whether reading a number back would wait for a device."""
    return any(x.is_cuda for x in tensors)


def capturing(*tensors: Tensor) -> bool:
    """Whether the op is recorded in a CUDA graph, where nothing can be read back."""
    return on_gpu(*tensors) and torch.cuda.is_current_stream_capturing()


def _teachers_wanted(
    recipe: Recipe, inputs: Mapping[str, Tensor], tokens: int, coefficients: Tensor | None
) -> Tensor | None:
    """A bit for each teacher that a row's weights ask for, [N]; -1 for a row without weights."""
    if coefficients is None:
        return None
    used = torch.full((tokens,), -1, device=coefficients.device)
    done = 0
    for functional in recipe.functionals:
        count = functional.outputs(inputs)
        own = (coefficients[done : done + count] != 0).any(0)
        bits = sum(1 << j for j in functional.teachers)
        used = torch.where(own, used.clamp(min=0) | bits, used)
        done += count
    return used


def _part(recipe: Recipe, start: int, stop: int, code: int) -> Part:
    """The rows whose weights ask for the teachers of ``code``, and what is computed for them."""
    streams = tuple(j for j in range(len(recipe.heads)) if j == 0 or code >> j & 1)
    found = [i for i, f in enumerate(recipe.functionals) if set(f.teachers) <= set(streams)]
    return Part(start, stop, streams, tuple(found))
