"""The LM-head functions of ``liger_kernel.transformers.functional``, under its names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.compat.liger.ops import (
    LigerFusedLinearCrossEntropyFunction,
    LigerFusedLinearJSDFunction,
)


@dataclass
class CrossEntropyOutput:
    """A loss and what was asked for beside it, which has no gradient."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy of an LM head: the function behind ``LigerFusedLinearCrossEntropyLoss``.

    Args:
        input: hidden states [N, H].
        weight: [V, H].
        target: [N], aligned with ``input``.
        bias: [V].
        ce_weight and the rest: as in
            :class:`pad_kernels.compat.liger.transformers.LigerFusedLinearCrossEntropyLoss`.

    Returns:
        The loss, or a ``CrossEntropyOutput`` if a ``return_`` flag is set.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> target = torch.tensor([1, -100])
        >>> liger_fused_linear_cross_entropy(torch.zeros(2, 8), torch.zeros(10, 8), target)
        tensor(2.3026)
    """
    outputs = LigerFusedLinearCrossEntropyFunction.apply(
        input,
        weight,
        target,
        bias,
        ce_weight,
        ignore_index,
        lse_square_scale,
        label_smoothing,
        reduction,
        softcap,
        return_z_loss,
        accum_dtype,
        use_token_scaling,
        return_token_accuracy,
        return_predicted_tokens,
    )
    if return_z_loss or return_token_accuracy or return_predicted_tokens:
        return CrossEntropyOutput(*outputs)
    return outputs[0]


#: The function behind ``LigerFusedLinearJSD``, with the same arguments.
liger_fused_linear_jsd = LigerFusedLinearJSDFunction.apply
