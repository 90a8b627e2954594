"""The losses over an LM head of Liger-Kernel, in its module layout.

``liger_kernel.transformers`` and ``liger_kernel.chunked_loss`` become
``pad_kernels.compat.liger.transformers`` and ``pad_kernels.compat.liger.chunked_loss``; every class
is also here.
"""

from pad_kernels.compat.liger.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from pad_kernels.compat.liger.transformers import (
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSD,
)

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
