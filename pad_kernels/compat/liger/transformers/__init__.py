"""The LM-head losses of ``liger_kernel.transformers``, under its names."""

from pad_kernels.compat.liger.transformers.fused_linear_cross_entropy import (
    LigerFusedLinearCrossEntropyLoss,
)
from pad_kernels.compat.liger.transformers.fused_linear_jsd import LigerFusedLinearJSD

__all__ = ["LigerFusedLinearCrossEntropyLoss", "LigerFusedLinearJSD"]
