"""Causal language models of `transformers` 5.x: their heads, and training without their logits.

Trainers are imported when they are asked for: they need more packages than heads do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pad_kernels.integrations.transformers.check import HeadCheck, HeadMismatch
from pad_kernels.integrations.transformers.head import ModelHead, head_of
from pad_kernels.integrations.transformers.hidden import hidden_states, run_with_head

if TYPE_CHECKING:
    from pad_kernels.integrations.transformers.config import (
        ADPAConfig,
        DCKDConfig,
        DistillationConfig,
        PADConfig,
        PreferenceConfig,
    )
    from pad_kernels.integrations.transformers.offline import CachedTeacher, cache_teacher
    from pad_kernels.integrations.transformers.pad import PADTrainer
    from pad_kernels.integrations.transformers.preference import PreferenceTrainer
    from pad_kernels.integrations.transformers.teachers import ModelTeacher
    from pad_kernels.integrations.transformers.token_distillation import ADPATrainer, DCKDTrainer
    from pad_kernels.integrations.transformers.trainer import DistillationTrainer

_MODULES = {
    "config": ("ADPAConfig", "DCKDConfig", "DistillationConfig", "PADConfig", "PreferenceConfig"),
    "offline": ("CachedTeacher", "cache_teacher"),
    "pad": ("PADTrainer",),
    "preference": ("PreferenceTrainer",),
    "teachers": ("ModelTeacher",),
    "token_distillation": ("ADPATrainer", "DCKDTrainer"),
    "trainer": ("DistillationTrainer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "ADPAConfig",
    "ADPATrainer",
    "CachedTeacher",
    "DCKDConfig",
    "DCKDTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "HeadCheck",
    "HeadMismatch",
    "ModelHead",
    "ModelTeacher",
    "PADConfig",
    "PADTrainer",
    "PreferenceConfig",
    "PreferenceTrainer",
    "cache_teacher",
    "head_of",
    "hidden_states",
    "run_with_head",
]
