"""``liger_kernel.transformers.fused_linear_cross_entropy``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pad_kernels._checks import check_number, check_reduction
from pad_kernels.compat.liger.transformers.functional import (
    CrossEntropyOutput,
    liger_fused_linear_cross_entropy,
)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of an LM head, with the signature of Liger's class.

    Args:
        ce_weight: [V] floating point, a weight per class; the mean divides by the labels' weights.
        ignore_index: label of tokens that do not count.
        lse_square_scale: coefficient of logsumexp² (z-loss), part of the loss; no class weights.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none".
        softcap: logit soft cap, > 0.
        return_z_loss: return the z-loss too, for logging.
        accum_dtype: None or float32 (float64 for float64 input): sums are never narrower.
        use_token_scaling: multiply each token's loss by its label's probability, a constant.
        return_token_accuracy: return the share of tokens whose label is the greedy token.
        return_predicted_tokens: return the greedy tokens [N], -1 where ignored.

    Shape:
        ``forward(lin_weight [V, H], _input [N, H], target [N], bias [V])`` gives the loss, 0-d or
        [N], float32 (float64 for float64), or with a ``return_`` flag a ``CrossEntropyOutput``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> loss_fn = LigerFusedLinearCrossEntropyLoss()
        >>> loss_fn(torch.zeros(10, 8), torch.zeros(2, 8), torch.tensor([1, -100]))
        tensor(2.3026)
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        check_number("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
        check_reduction(reduction)
        if softcap is not None:
            check_number("softcap", softcap, above=0.0)
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss, see the class."""
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            ce_weight=self.ce_weight,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
            accum_dtype=self.accum_dtype,
            use_token_scaling=self.use_token_scaling,
            return_token_accuracy=self.return_token_accuracy,
            return_predicted_tokens=self.return_predicted_tokens,
        )
