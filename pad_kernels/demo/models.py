"""Gemma-2-style models from `transformers`, and what the losses need from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import pad_kernels as pk
from pad_kernels.demo.settings import ModelSize, Settings

IGNORE = -100


def build(
    size: ModelSize, settings: Settings, *, vocab_size: int | None = None
) -> Gemma2ForCausalLM:
    """Make a randomly initialised model; embedding and LM head share their weight, as in Gemma."""
    head_dim = size.hidden // size.heads
    config = Gemma2Config(
        vocab_size=vocab_size or settings.vocab_size,
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


class LanguageModel:
    """A causal model cut in two: the body that makes hidden states, and its LM head.

    The body is called as `model.model(...)`, so `transformers` never makes logits; the head goes
    to `pad_kernels` as a weight and its options, wherever the config has put that weight.
    """

    def __init__(self, model: Gemma2ForCausalLM, vocab_size: int) -> None:
        self.model = model
        self.weight: Tensor = model.get_output_embeddings().weight
        self.head = {"softcap": model.config.final_logit_softcapping, "vocab_size": vocab_size}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters to train, a tied weight once."""
        return self.model.parameters()

    def body_matrices(self) -> list[torch.nn.Parameter]:
        """The weight matrices between the embedding and the LM head."""
        ends = {id(self.weight), id(self.model.get_input_embeddings().weight)}
        return [each for each in self.parameters() if each.dim() == 2 and id(each) not in ends]

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states of token ids [..., L], as [..., L, H]."""
        flat = ids.reshape(-1, ids.shape[-1])
        states = self.model.model(input_ids=flat, use_cache=False).last_hidden_state
        return states.reshape(*ids.shape, -1)

    def cross_entropy(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean next-token loss; labels [B, L] are aligned with ids [B, L]."""
        return pk.linear_cross_entropy(self.hidden(ids), self.weight, labels, **self.head)

    def logprob(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Per-token log-probs, shaped like labels [..., L], 0 where ignored."""
        return pk.linear_logprob(self.hidden(ids), self.weight, labels, **self.head)

    def next_token_logits(self, states: Tensor) -> Tensor:
        """Logits [B, V] of one position, states [B, H]: sampling needs them, a loss does not."""
        logits = states @ self.weight[: self.head["vocab_size"]].T
        return self.head["softcap"] * torch.tanh(logits / self.head["softcap"])
