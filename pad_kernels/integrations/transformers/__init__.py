"""Causal language models of `transformers` 5.x: their heads, and training without their logits."""

from pad_kernels.integrations.transformers.check import HeadCheck, HeadMismatch
from pad_kernels.integrations.transformers.config import (
    ADPAConfig,
    DCKDConfig,
    DistillationConfig,
    PADConfig,
    PreferenceConfig,
)
from pad_kernels.integrations.transformers.head import ModelHead, head_of
from pad_kernels.integrations.transformers.hidden import hidden_states, run_with_head
from pad_kernels.integrations.transformers.offline import CachedTeacher, cache_teacher
from pad_kernels.integrations.transformers.pad import PADTrainer
from pad_kernels.integrations.transformers.preference import PreferenceTrainer
from pad_kernels.integrations.transformers.teachers import ModelTeacher
from pad_kernels.integrations.transformers.token_distillation import ADPATrainer, DCKDTrainer
from pad_kernels.integrations.transformers.trainer import DistillationTrainer

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
