"""Does a model keep packed sequences apart?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pad_kernels._checks import fail_value
from pad_kernels.integrations.transformers.hidden import hidden_states
from pad_kernels.integrations.transformers.teachers import evaluating


def check_kept_apart(model: Any, ids: Tensor, precision: torch.dtype | None) -> None:
    """Raise a ValueError unless a model keeps packed sequences apart by their position ids.

    Two short sequences end to end must have the hidden states that each has alone.

    Args:
        model: the model, also wrapped.
        ids: int64 [1, at least 2], tokens to try.
        precision: of its products, where that is not the hidden states' dtype.
    """
    size = min(8, ids.shape[1] // 2)
    tokens = ids[:, : 2 * size]
    places = torch.arange(size, device=ids.device).unsqueeze(0)
    with evaluating(model):
        packed = hidden_states(model, input_ids=tokens, position_ids=places.repeat(1, 2))
        alone = hidden_states(model, input_ids=tokens[:, size:], position_ids=places)
    together = packed[:, size:].double()
    off = float((together - alone.double()).norm() / alone.double().norm())
    if off > torch.finfo(precision or alone.dtype).eps ** 0.5:
        expected = "False: this model does not keep packed sequences apart by their position ids"
        fail_value("padding_free", expected, f"True (hidden states are off by {off:.2g})")
