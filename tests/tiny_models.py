"""Tiny causal language models of each family, with heads that are hard to overlook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 150

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

#: family -> (name of the config's class, of the model's, what the config says besides the shape)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SHAPE),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", _SHAPE | {"tie_word_embeddings": True}),
    # Danube's checkpoints are Mistral models with a sliding window, Danube-3's Llama models.
    "mistral": ("MistralConfig", "MistralForCausalLM", _SHAPE | {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SHAPE | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _SHAPE | {"head_dim": 8, "final_logit_softcapping": 5.0},
    ),
    "gemma2-untied": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _SHAPE | {"head_dim": 8, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _SHAPE | {"head_dim": 8, "final_logit_softcapping": 7.0},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", _SHAPE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SHAPE),
    "cohere": ("CohereConfig", "CohereForCausalLM", _SHAPE | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", _SHAPE | {"logit_scale": 3.0}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _SHAPE | {"logits_scaling": 8.0}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SHAPE),
    "gpt-neox-tied": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        _SHAPE | {"tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _SHAPE | {"num_local_experts": 2, "experts_implementation": "eager"},  # takes float64
    ),
    # It asks its head for the weight's dtype.
    "mamba": ("MambaConfig", "MambaForCausalLM", _MAMBA),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        # Its third layer is the first with attention.
        _SHAPE | {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 5.0},
    ),
}


def build(family: str, *, seed: int = 0, loud: float = 30.0, **settings: Any) -> Any:
    """A randomly initialised model, in eval mode.

    Args:
        family: of FAMILIES.
        seed: of its weights.
        loud: factor on the head's weight, which makes caps saturate; a bias gets large entries.
        settings: more for the config.
    """
    config_name, model_name, said = FAMILIES[family]
    config = getattr(transformers, config_name)(**(said | settings))
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(loud)
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


def batch(rows: int = 3, length: int = 9, *, seed: int = 1) -> dict[str, Tensor]:
    """Token ids [rows, length] and an attention mask with padding at the end of some."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The next token at each position [rows, length], -100 where there is none."""
    ids = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


def dense_logprob(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of labels as everybody computes them, 0 where ignored."""
    taken = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0.0, taken)


def gradients(model: nn.Module, loss_of: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    model.zero_grad()
    loss_of().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
