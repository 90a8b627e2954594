"""Heads of random models, for the ops that compare several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from oracles import ORACLE
from torch import Tensor

import pad_kernels as pk


def head(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, **options: Any
) -> pk.Head:
    """Random, logits with a standard deviation of about 3."""
    hidden, weight = torch.randn(rows, width) * 3, torch.randn(vocab, width) / width**0.5
    return pk.Head(hidden.to(dtype), weight.to(dtype), **options)


def trainable(x: pk.Head) -> pk.Head:
    tensors = {n: getattr(x, n) for n in ("hidden", "weight", "bias")}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if t is not None}
    return replace(x, **leaves)


def gradients(value: Tensor, student: pk.Head) -> list[Tensor]:
    leaves = [x for x in (student.hidden, student.weight, student.bias) if x is not None]
    return list(torch.autograd.grad(value, leaves))


def logits(x: pk.Head) -> Tensor:
    options = (x.softcap, x.logit_scale, x.temperature, x.vocab_size)
    return ORACLE.logits(*(ORACLE.leaf(t, False) for t in (x.hidden, x.weight, x.bias)), *options)
