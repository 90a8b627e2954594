"""Gemma-2-style models from `transformers`, and what their hidden states and heads are asked."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import pad_kernels as pk
from pad_kernels.demo.settings import ModelSize, Settings
from pad_kernels.integrations.transformers import head_of, hidden_states

IGNORE = -100


def build(size: ModelSize, settings: Settings, vocab_size: int) -> PreTrainedModel:
    """Make a randomly initialised model; embedding and LM head share their weight, as in Gemma."""
    head_dim = size.hidden // size.heads
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 2),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=512,
        final_logit_softcapping=settings.softcap,
        tie_word_embeddings=True,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(settings.seed)
    return Gemma2ForCausalLM(config)


def hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Last hidden states of token ids [..., L], as [..., L, H]; logits are never made."""
    states = hidden_states(model, input_ids=ids.reshape(-1, ids.shape[-1]))
    return states.reshape(*ids.shape, -1)


def cross_entropy(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss; labels [B, L] are aligned with ids [B, L]."""
    head = head_of(model)
    return pk.linear_cross_entropy(hidden(model, ids), head.weight, labels, **head.options())


def logprob(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Per-token log-probs, shaped like labels [..., L], 0 where ignored."""
    head = head_of(model)
    return pk.linear_logprob(hidden(model, ids), head.weight, labels, **head.options())
