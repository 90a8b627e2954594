"""Tiny Llama models, their tokenizer, and what a model writes and thinks of responses."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pad_kernels as pk
from examples.miniature.settings import Size
from examples.miniature.world import World
from pad_kernels.integrations.transformers import head_of, hidden_states


def tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token for each word of the vocabulary."""
    words = {word: i for i, word in enumerate(world.vocabulary)}
    base = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def build(size: Size, world: World, seed: int) -> LlamaForCausalLM:
    """A model with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(world.vocabulary),
            hidden_size=size.hidden,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=32,
            initializer_range=0.1,  # the default 0.02 is for widths a hundred times as large
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, world: World, prompts: Tensor, seed: int, temperature: float = 1.0
) -> Tensor:
    """What a model answers to prompts [n]: words [n, length].

    Tokens that are no words are left out of the distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = world.prompt_ids(prompts)
    for _ in range(world.settings.length):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        chances = (logits[:, world.first_word :] / temperature).softmax(-1)
        word = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, world.response_ids(word)], 1)
    return ids[:, 3:] - world.first_word


@torch.no_grad()
def logprob(model: LlamaForCausalLM, world: World, prompts: Tensor, responses: Tensor) -> Tensor:
    """Log-prob [n] of responses [n, length], a sum over words."""
    asked, labels = world.prompt_ids(prompts), world.response_ids(responses)
    hidden = hidden_states(model, input_ids=torch.cat([asked, labels], 1), use_cache=False)
    head = head_of(model)
    token = pk.linear_logprob(hidden[:, 2:-1].contiguous(), head.weight, labels, **head.options())
    return token.sum(1)


def parameters(model: LlamaForCausalLM) -> int:
    """How many a model has."""
    return sum(each.numel() for each in model.parameters())
