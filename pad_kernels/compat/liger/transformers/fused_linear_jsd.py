"""``liger_kernel.transformers.fused_linear_jsd``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pad_kernels._checks import check_number
from pad_kernels.compat.liger.ops import LigerFusedLinearJSDFunction


class LigerFusedLinearJSD(nn.Module):
    """Generalised JSD between two LM heads, with the signature of Liger's class.

    Mean over tokens of β·KL(teacher‖m) + (1 − β)·KL(student‖m), m = β·teacher + (1 − β)·student
    (GKD, arXiv 2306.13649); KL(teacher‖student) for β = 0 and KL(student‖teacher) for β = 1.

    Args:
        jsd_beta: β in [0, 1]: the ``alpha`` of ``pad_kernels.linear_divergence(kind="jsd")``.
        ignore_index: label of tokens that do not count.
        temperature: divisor of both models' logits, > 0; no factor of its square.
        accum_dtype: None or float32 (float64 for float64 input): sums are never narrower.

    Shape:
        ``forward(student_input [N, H], student_weight [V, H], teacher_input [N, H'],
        teacher_weight [V', H'], shift_labels [N] or None)`` gives a 0-d loss, float32 (float64 for
        float64). What V' has beyond V is padding: probability 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 8), torch.zeros(10, 8)
        >>> LigerFusedLinearJSD()(hidden, weight, hidden, weight)
        tensor(0.)
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0.0)
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, see the class."""
        return LigerFusedLinearJSDFunction.apply(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            jsd_beta=self.jsd_beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            accum_dtype=self.accum_dtype,
        )
