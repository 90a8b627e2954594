"""Cross-entropy with a weight per class, from per-token log-probs and normalisers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pad_kernels as pk
from pad_kernels._checks import FLOATS, check_tensor
from pad_kernels._dtypes import accumulate_dtype

# Logits that a block of the weighted sum holds at a time: 16 MiB in float32.
_BLOCK = 1 << 22


def check_class_weights(name: str, class_weight: Tensor, weight: Tensor) -> None:
    """Check one weight per row of the head, without gradient."""
    shape = weight.shape[:1]
    check_tensor(name, class_weight, dtypes=FLOATS, shape=shape, device=weight.device)


def label_weights(class_weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Each label's weight, like ``labels``; 0 where ignored."""
    counted = labels != ignore_index
    # Out-of-range labels are reported by the op, which sees them next.
    safe = torch.where(counted, labels, 0).clamp(0, class_weight.shape[0] - 1).to(torch.int64)
    return torch.where(counted, class_weight.detach()[safe], 0.0)


def _block_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensor, softcap: float | None
) -> Tensor:
    logits = (hidden @ weight.t()).to(factors.dtype)
    if bias is not None:
        logits = logits + bias.to(factors.dtype)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits @ factors


def weighted_logit_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensor, softcap: float | None
) -> Tensor:
    """Σ_v factors_v · logit_v of each row, [N]: a block of the vocabulary at a time, recomputed."""
    rows = max(1, _BLOCK // max(1, hidden.shape[0]))
    blocks = weight.split(rows)
    biases = [None] * len(blocks) if bias is None else bias.split(rows)
    total = torch.zeros(hidden.shape[0], dtype=factors.dtype, device=hidden.device)
    for w, b, f in zip(blocks, biases, factors.split(rows), strict=True):
        total = total + checkpoint(_block_sum, hidden, w, b, f, softcap, use_reentrant=False)
    return total


def class_weighted_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    class_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Per-token cross-entropy with class weights, and the log normalisers, both like ``labels``.

    With class weights c and p = softmax: −(1−ε) c_y log p_y − (ε/V) Σ_v c_v log p_v, as
    ``torch.nn.functional.cross_entropy`` has it; 0 where ignored.

    Args:
        hidden: [..., H].
        weight: [V, H].
        labels: [...] integer.
        class_weight: [V] floating point.
        bias: [V].
        softcap: logit soft cap.
        label_smoothing: ε in [0, 1].
        ignore_index: label of rows that do not count.
    """
    stats = pk.linear_token_stats(
        hidden, weight, labels, bias=bias, softcap=softcap, ignore_index=ignore_index
    )
    dtype = accumulate_dtype(hidden.dtype)
    factors = class_weight.detach().to(dtype)
    losses = -(1.0 - label_smoothing) * label_weights(factors, labels, ignore_index) * stats.logprob
    if label_smoothing:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = weighted_logit_sum(flat, weight, bias, factors, softcap).reshape(labels.shape)
        smooth = factors.sum() * stats.logsumexp - logits
        counted = labels != ignore_index
        share = label_smoothing / weight.shape[0]
        losses = losses + torch.where(counted, share * smooth, 0.0)
    return losses, stats.logsumexp
