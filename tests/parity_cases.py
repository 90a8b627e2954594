"""Awkward inputs and the ways to run them, for the parity product."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from extended import Terms, exact
from oracles import ORACLE, OneHead, dense
from torch import Tensor

import pad_kernels as pk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["cpp", "torch_blocked"]

NATIVE_MISSING = pk.available_backends()["cpp"] != "available"


@dataclass(frozen=True)
class Route:
    """A backend, a schedule, and whether blocks are forced to sizes that divide nothing."""

    backend: str
    schedule: str | None
    kept: float = 1.0  # share of the rows that keep their logits
    odd: bool = True

    def plan(self, tokens: int) -> pk.PlanRequest:
        kept_rows = int(tokens * self.kept) if self.schedule == "kept" else None
        token_block, vocab_block = (7, 97) if self.odd else (None, None)
        return pk.PlanRequest(
            self.schedule,
            self.backend,
            token_block=token_block,
            vocab_block=vocab_block,
            kept_rows=kept_rows,
        )

    def __str__(self) -> str:
        share = "" if self.kept == 1.0 else f"{self.kept:g}"
        return f"{self.backend}-{self.schedule}{share}-{'odd' if self.odd else 'planned'}"


TOKEN_ROUTES = [
    *(
        Route(backend, schedule, kept, odd)
        for backend in BACKENDS
        for schedule, kept in (("late", 1.0), ("kept", 1.0), ("kept", 0.5))
        for odd in (True, False)
    ),
    Route("reference", None, odd=False),
]
SUM_ROUTES = [
    *(Route(backend, "early", odd=odd) for backend in BACKENDS for odd in (True, False)),
    *TOKEN_ROUTES,
]


def _scaled(*shape: int, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * spread


def _head(
    n: int,
    h: int,
    v: int,
    *,
    bias: bool = False,
    ignored: float = 0.2,
    spread: float = 2.0,
    **options: Any,
) -> OneHead:
    """Random inputs whose logits have standard deviation ``spread``, a share of rows ignored."""
    labels = torch.randint(options.get("vocab_size", v), (n,))
    labels[torch.rand(n) < ignored] = -100
    return OneHead(
        _scaled(n, h, spread=spread),
        _scaled(v, h) / h**0.5,
        labels,
        _scaled(v) if bias else None,
        options,
    )


def _minus_infinity() -> OneHead:
    """A whole vocabulary chunk, the first entries and single ones without probability."""
    x = _head(24, 123, 507, bias=True)
    assert x.bias is not None
    for entries in (slice(0, 3), slice(97, 200), slice(500, 501)):
        x.bias[entries] = -torch.inf
    x.labels[x.labels >= 0] = torch.randint(200, 500, (int((x.labels >= 0).sum()),))
    return x


def _label_without_probability() -> OneHead:
    x = _minus_infinity()
    x.labels[3], x.labels[4] = 98, 500
    return x


def _integers() -> OneHead:
    """Logits that every dtype holds exactly, full of ties."""
    x = _head(24, 8, 507)
    x.hidden, x.weight = (
        t.sign() * (t.abs() * 1.5).floor().clamp(max=2) for t in (x.hidden, x.weight)
    )
    return x


def _confident(**options: Any) -> OneHead:
    """Labels that have nearly all of the probability: log-probs are 0, not the rest of a sum."""
    x = _head(24, 123, 507, bias=True, spread=40.0, **options)
    z = ORACLE.logits(x.hidden, x.weight, x.bias, **options)
    x.labels = torch.where(x.labels < 0, x.labels, z.argmax(-1))
    return x


CASES: dict[str, Callable[[], OneHead]] = {
    "plain": lambda: _head(24, 123, 507),
    "bias": lambda: _head(24, 123, 507, bias=True),
    "every_option": lambda: _head(
        24, 123, 1000, bias=True, softcap=4.0, logit_scale=1.7, temperature=0.7, vocab_size=961
    ),
    "softcap_saturated": lambda: _head(24, 123, 507, spread=20.0, softcap=3.0),
    "negative_scale": lambda: _head(24, 123, 507, bias=True, logit_scale=-0.6, softcap=8.0),
    "zero_scale": lambda: _head(24, 123, 507, logit_scale=0.0),
    "cold": lambda: _head(24, 123, 507, temperature=0.05),
    "no_tokens": lambda: _head(0, 123, 507, bias=True),
    "one_token": lambda: _head(1, 123, 1000, ignored=0.0),
    "five_tokens": lambda: _head(5, 123, 1000, ignored=0.0),
    "one_feature": lambda: _head(24, 1, 507, bias=True),
    "one_entry": lambda: _head(24, 123, 1, bias=True),
    "all_ignored": lambda: _head(24, 123, 507, bias=True, ignored=2.0),
    "none_ignored": lambda: _head(24, 123, 507, ignored=0.0),
    "minus_infinity": _minus_infinity,
    "label_without_probability": _label_without_probability,
    "huge_logits": lambda: _head(24, 123, 507, spread=3e3),
    "ties": _integers,
    "confident": _confident,
    "confident_scaled": lambda: _confident(logit_scale=1.3, temperature=0.7),
    "confident_capped": lambda: _confident(softcap=200.0, temperature=0.3),
    "vocab_size_one": lambda: _head(24, 123, 507, bias=True, vocab_size=1),
}


#: What the case does to the tensors once they have their dtype: strides, not values.
LAYOUTS: dict[str, Callable[[OneHead], None]] = {}


def layout(change: Callable[[OneHead], None]) -> Callable[[OneHead], None]:
    LAYOUTS[change.__name__] = change
    return change


@layout
def hidden_with_strides(x: OneHead) -> None:
    wide = torch.zeros(*x.hidden.shape, 2, dtype=x.dtype)
    wide[..., 0] = x.hidden
    x.hidden = wide[..., 0]


@layout
def hidden_transposed(x: OneHead) -> None:
    x.hidden = x.hidden.T.contiguous().T


@layout
def hidden_expanded(x: OneHead) -> None:
    x.hidden = x.hidden[:1].expand(x.hidden.shape)


@layout
def hidden_of_three_dimensions(x: OneHead) -> None:
    rows = x.hidden.shape[0]
    x.hidden = x.hidden.reshape(rows // 4, 2, 2, -1).transpose(0, 1)
    x.labels = x.labels.reshape(rows // 4, 2, 2).transpose(0, 1)


@layout
def weight_transposed(x: OneHead) -> None:
    x.weight = x.weight.T.contiguous().T


@layout
def weight_expanded_over_entries(x: OneHead) -> None:
    x.weight = x.weight[:1].expand(x.weight.shape)


@layout
def weight_expanded_over_features(x: OneHead) -> None:
    x.weight = x.weight[:, :1].expand(x.weight.shape)


@layout
def weight_every_other_row(x: OneHead) -> None:
    wide = torch.zeros(x.weight.shape[0], 2, x.weight.shape[1], dtype=x.dtype)
    wide[:, 1] = x.weight
    x.weight = wide[:, 1]


@layout
def weight_in_a_wider_one(x: OneHead) -> None:
    wide = torch.zeros(x.weight.shape[0], x.weight.shape[1] + 5, dtype=x.dtype)
    wide[:, 3:-2] = x.weight
    x.weight = wide[:, 3:-2]


@layout
def weight_strided_both_ways(x: OneHead) -> None:
    wide = torch.zeros(x.weight.shape[0], 3, x.weight.shape[1], 2, dtype=x.dtype)
    wide[:, 1, :, 1] = x.weight
    x.weight = wide[:, 1, :, 1]


@layout
def bias_with_strides(x: OneHead) -> None:
    assert x.bias is not None
    wide = torch.zeros(x.bias.shape[0], 3, dtype=x.dtype)
    wide[:, 1] = x.bias
    x.bias = wide[:, 1]


NAMES = [*CASES, *LAYOUTS]


@functools.cache
def case(name: str, dtype: torch.dtype) -> OneHead:
    """The inputs of that name; the same ones, rounded, for every dtype."""
    torch.manual_seed(zlib.crc32(name.encode()))
    # A soft cap, so that a weight whose entries are all the same has a gradient for hidden.
    x = CASES[name]() if name in CASES else _head(24, 123, 507, bias=True, softcap=6.0)
    x.hidden, x.weight = x.hidden.to(dtype), x.weight.to(dtype)
    x.bias = None if x.bias is None else x.bias.to(dtype)
    if name in LAYOUTS:
        LAYOUTS[name](x)
    return x


@functools.cache
def upstream(outputs: int, tokens: int) -> Tensor:
    """Gradients of values [outputs, tokens], of both signs."""
    torch.manual_seed(outputs * 1000 + tokens)
    return torch.randn(outputs, tokens, dtype=torch.float64)


def expected(
    x: OneHead, values: Callable[[Tensor, Tensor], Tensor], terms: Terms, grad: Tensor
) -> tuple[list[Any], list[Tensor]]:
    """[values, gradients...] of the oracle and of the careful computation.

    Args:
        values: the op over logits and labels of the rows that count.
        terms: the same for extended precision.
        grad: gradient of the values, [outputs, N].
    """
    careful = x.compute(dense(x.dtype), values, grad)
    if x.dtype == torch.float64:
        return exact(x, terms, grad), careful
    return x.compute(ORACLE, values, grad), careful
