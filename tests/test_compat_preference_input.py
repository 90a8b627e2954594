"""What the adapters of Liger's preference losses refuse, and which argument they name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pad_kernels.compat.liger import chunked_loss as liger
from pad_kernels.compat.liger.chunked_loss import functional

T, H, V = 5, 8, 37


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss_type": "ipo"}, ValueError, "loss_type"),
        ({"loss_type": "exo_pair"}, ValueError, "label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing"),
        ({"discopop_tau": 0.1}, ValueError, "discopop_tau"),
        ({"beta": 0.0}, ValueError, "beta"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"compiled": 1}, TypeError, "compiled"),
        ({"use_ref_model": "yes"}, TypeError, "use_ref_model"),
        ({"average_log_prob": 0}, TypeError, "average_log_prob"),
        ({"compute_nll_loss": None}, TypeError, "compute_nll_loss"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"_input": torch.zeros(3, T, H)}, ValueError, "target"),
        ({"_input": torch.zeros(6 * T, H)}, ValueError, "_input"),
        ({"target": torch.zeros(6, T)}, TypeError, "target"),
        ({"target": torch.full((6, T), V)}, ValueError, "label"),
        ({"weight": torch.zeros(V, H + 1)}, ValueError, "weight"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias"),
        ({"ref_input": None}, TypeError, "ref_input"),
        ({"ref_weight": None}, TypeError, "ref_weight"),
        ({"ref_input": torch.zeros(6, T + 1, H)}, ValueError, "ref_input"),
    ],
)
def test_bad_input_of_dpo(change: dict[str, Any], error: type, words: str) -> None:
    hidden, target = torch.zeros(6, T, H), torch.zeros(6, T, dtype=torch.int64)
    good = {
        "_input": hidden,
        "weight": torch.zeros(V, H),
        "target": target,
        "ref_input": hidden,
        "ref_weight": torch.zeros(V, H),
    }
    functional.liger_fused_linear_dpo(**good)
    with pytest.raises(error, match=words):
        functional.liger_fused_linear_dpo(**{**good, **change})


def test_other_bad_input() -> None:
    hidden, weight = torch.zeros(3, T, H), torch.zeros(V, H)
    target = torch.zeros(3, T, dtype=torch.int64)
    with pytest.raises(ValueError, match="as many chosen as rejected"):
        liger.LigerFusedLinearCPOLoss()(weight, hidden, target)
    with pytest.raises(ValueError, match="nll_target"):
        liger.LigerFusedLinearORPOLoss()(weight, hidden[:2], target[:2], None, target[:1])
    with pytest.raises(ValueError, match="gamma"):
        liger.LigerFusedLinearSimPOLoss(gamma=-1.0)(weight, hidden[:2], target[:2])
    kto = liger.LigerFusedLinearKTOLoss()
    with pytest.raises(TypeError, match="preference_labels"):
        kto(hidden, weight, target)
    with pytest.raises(TypeError, match="preference_labels"):
        kto(hidden, weight, target, preference_labels=torch.ones(3))
    for kl, error in ((torch.zeros(2), ValueError), ("0", TypeError), (math.inf, ValueError)):
        labels = torch.ones(3, dtype=torch.bool)
        with pytest.raises(error, match="kl"):
            kto(hidden, weight, target, preference_labels=labels, kl=kl)
