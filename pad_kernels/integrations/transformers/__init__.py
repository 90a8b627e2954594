"""Causal language models of `transformers` 5.x: their heads, and training without their logits."""

from pad_kernels.integrations.transformers.check import HeadCheck, HeadMismatch
from pad_kernels.integrations.transformers.head import ModelHead, head_of
from pad_kernels.integrations.transformers.hidden import hidden_states, run_with_head

__all__ = [
    "HeadCheck",
    "HeadMismatch",
    "ModelHead",
    "head_of",
    "hidden_states",
    "run_with_head",
]
