"""The preference and distillation losses of ``liger_kernel.chunked_loss``, under its names."""

from pad_kernels.compat.liger.chunked_loss.cpo_loss import LigerFusedLinearCPOLoss
from pad_kernels.compat.liger.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss
from pad_kernels.compat.liger.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
from pad_kernels.compat.liger.chunked_loss.kto_loss import LigerFusedLinearKTOLoss
from pad_kernels.compat.liger.chunked_loss.orpo_loss import LigerFusedLinearORPOLoss
from pad_kernels.compat.liger.chunked_loss.simpo_loss import LigerFusedLinearSimPOLoss

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
