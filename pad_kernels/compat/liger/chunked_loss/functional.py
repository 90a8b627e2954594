"""The chunked losses as functions: what ``liger_kernel.chunked_loss.functional`` exports."""

from pad_kernels.compat.liger.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
from pad_kernels.compat.liger.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from pad_kernels.compat.liger.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
from pad_kernels.compat.liger.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
from pad_kernels.compat.liger.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from pad_kernels.compat.liger.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

liger_fused_linear_cpo = LigerFusedLinearCPOFunction.apply
liger_fused_linear_dpo = LigerFusedLinearDPOFunction.apply
liger_fused_linear_jsd = LigerFusedLinearJSDFunction.apply
liger_fused_linear_kto = LigerFusedLinearKTOFunction.apply
liger_fused_linear_orpo = LigerFusedLinearORPOFunction.apply
liger_fused_linear_simpo = LigerFusedLinearSimPOFunction.apply
