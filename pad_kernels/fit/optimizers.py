"""Bytes of an optimizer's state, and of what it makes in passing while it steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

OPTIMIZERS = {
    "adamw": "two states in the parameters' dtype (torch.optim.AdamW, fused)",
    "adamw-8bit": "two bytes and two float32 scales per 256 entries (bitsandbytes); embeddings and "
    "tensors below 4096 entries in float32, as transformers.Trainer asks for",
    "adafactor": "a float32 row and column per matrix (transformers' Adafactor, no momentum)",
    "sgd": "nothing (no momentum)",
}


def state_bytes(optimizer: str, trained: Sequence[Tensor], embeddings: Sequence[Tensor]) -> int:
    """Bytes of the states.

    Args:
        optimizer: a key of OPTIMIZERS.
        trained: the parameters that are trained.
        embeddings: weights of embedding layers.
    """
    full = {id(x) for x in embeddings}
    total = 0
    for parameter in trained:
        entries = parameter.numel()
        if optimizer == "adamw":
            total += 2 * entries * parameter.element_size()
        elif optimizer == "adamw-8bit":
            small = id(parameter) in full or entries < 4096
            total += 8 * entries if small else 2 * (entries + 4 * -(-entries // 256))
        elif optimizer == "adafactor":
            matrix = parameter.dim() > 1
            rest = entries // (parameter.shape[-1] * parameter.shape[-2]) if matrix else 0
            total += 4 * (rest * sum(parameter.shape[-2:]) if matrix else entries)
    return total


def step_bytes(optimizer: str, trained: Sequence[Tensor]) -> int:
    """Bytes beyond states while the optimizer steps, one parameter after the other.

    transformers' Adafactor makes float32 copies of a half-precision gradient and parameter, the
    update and the outer product of its factors: 16 bytes an entry, 8 for float32 parameters. The
    update of the parameter before is still there. The others work in place.
    """
    most, before = 0, 0
    for parameter in trained if optimizer == "adafactor" else ():
        entries = parameter.numel()
        most = max(most, entries * (8 if parameter.element_size() == 4 else 16) + before)
        before = 4 * entries
    return most
