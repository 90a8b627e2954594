"""The oracle of float64 inputs: numpy's extended precision, gradients written out by hand.

A float64 dense computation cannot judge a float64 one. What an op computes is told as ``terms``:
for each output the factors [N] (or numbers) of logprob, lse, lse2 (its square), entropy and sum, or
of further log-probs that are named in ``picks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracles import OneHead
from torch import Tensor

Real = np.longdouble
Terms = Sequence[Mapping[str, Any]]


class Exact(NamedTuple):
    """A number twice as long: high + low."""

    high: Tensor
    low: Tensor

    @staticmethod
    def of(x: np.ndarray) -> Exact:
        high = x.astype(np.float64)
        with np.errstate(invalid="ignore"):
            low = np.where(np.isfinite(high), x - high, 0)
        return Exact(torch.from_numpy(high), torch.from_numpy(low.astype(np.float64)))


def _real(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy().astype(Real)


def exact(
    x: OneHead, terms: Terms, upstream: Tensor, picks: Mapping[str, Tensor] | None = None
) -> list[Exact]:
    """[values [outputs, N], d_hidden, d_weight, d_bias]; ``upstream`` is the values' gradient.

    ``picks`` names token ids [N] whose log-probs are terms too.
    """
    if np.finfo(Real).eps >= np.finfo(np.float64).eps:
        pytest.skip("no extended precision on this machine")
    vocab, flat = x.vocab, x.labels.reshape(-1)
    live = (flat != x.ignore_index).nonzero()[:, 0].cpu().numpy()
    h = _real(x.hidden.reshape(-1, x.hidden.shape[-1]))
    w = _real(x.weight)[:vocab]
    raw = h[live] @ w.T + (0 if x.bias is None else _real(x.bias)[:vocab])
    scale, temperature = (
        Real(x.options.get("logit_scale", 1.0)),
        Real(x.options.get("temperature", 1.0)),
    )
    z, slope = raw * scale, np.full(raw.shape, scale / temperature)
    if (cap := x.options.get("softcap")) is not None:
        t = np.tanh(z / Real(cap))
        z, slope = Real(cap) * t, slope * (1 - t * t)
    z = z / temperature

    ids = {"logprob": flat, **(picks or {})}
    chosen = {name: x.cpu().numpy()[live] for name, x in ids.items()}
    found, dz = _rows(z, chosen, live, terms, _real(upstream))
    values = np.zeros((len(terms), len(flat)), Real)
    values[:, live] = found
    dz = dz * slope
    d_hidden, d_weight = np.zeros(h.shape, Real), np.zeros(x.weight.shape, Real)
    d_hidden[live] = dz @ w
    d_weight[:vocab] = dz.T @ h[live]
    parts = [values, d_hidden, d_weight]
    if x.bias is not None:
        d_bias = np.zeros(x.bias.shape, Real)
        d_bias[:vocab] = dz.sum(0)
        parts.append(d_bias)
    return [Exact.of(p) for p in parts]


def _rows(
    z: np.ndarray,
    ids: Mapping[str, np.ndarray],
    live: np.ndarray,
    terms: Terms,
    upstream: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Values [outputs, rows] and the gradient of their weighted sum by the logits."""
    rows = np.arange(len(z))
    top = z.max(1, keepdims=True) if len(z) else z[:, :1]
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    s = np.exp(z - lse)
    log_s = np.where(s == 0, 0, np.where(np.isfinite(z), z, 0) - lse)
    entropy = -(s * log_s).sum(1, keepdims=True)
    value = {
        "lse": lse[:, 0],
        "lse2": lse[:, 0] ** 2,
        "entropy": entropy[:, 0],
        "sum": z.sum(1),
    }
    by_logits = {
        "lse": s,
        "lse2": 2 * lse * s,
        "entropy": -s * (log_s + entropy),
        "sum": np.ones_like(z),
    }
    for name, tokens in ids.items():
        value[name] = z[rows, tokens] - lse[:, 0]
        by_logits[name] = (np.arange(z.shape[1]) == tokens[:, None]).astype(Real) - s
    found, dz = np.zeros((len(terms), len(z)), Real), np.zeros_like(z)
    for i, output in enumerate(terms):
        for name, factor in output.items():
            number = _real(factor) if isinstance(factor, Tensor) else np.asarray(factor, Real)
            factors = np.broadcast_to(number, upstream.shape[1:])[live]
            # No weight silences even an infinite value.
            found[i] += np.where(factors == 0, 0, value[name]) * factors
            dz += (factors * upstream[i, live])[:, None] * by_logits[name]
    return found, dz
