"""Tiny models, data and dense losses for the trainers' tests.

The dense side shares nothing with the trainers: it runs the model's own forward on one sequence at
a time, without padding, takes its logits to float32 and writes each published formula out.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 300
WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def tokenizer(order: int = 1) -> PreTrainedTokenizerFast:
    """One id for each word; order=-1 gives words other ids."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *WORDS[::order]])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


_SHAPE = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # a random model of the usual scale says nothing about anything
}


def llama(seed: int = 0, *, tied: bool = False, hidden: int = 32, vocab: int = VOCAB) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, tie_word_embeddings=tied, **_SHAPE)
    return LlamaForCausalLM(config)


def write_folders() -> None:
    """A student, a teacher and pairs.jsonl in the working directory, as pages begin with."""
    for name, hidden in (("student", 32), ("teacher", 48)):
        llama(3, hidden=hidden).save_pretrained(name)
        tokenizer().save_pretrained(name)
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f"w{i + 2}", "rejected": f"w{i} w{i}"}
        for i in range(16)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def gemma(seed: int = 0, *, hidden: int = 32) -> Any:
    """Soft caps in attention and head, sliding windows, a tied head."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
        **_SHAPE,
    )
    return Gemma2ForCausalLM(config)


def ids(rng: random.Random, low: int = 2, high: int = 9) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high))]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"prompt": ids(rng), "chosen": ids(rng), "rejected": ids(rng, 2, 14)} for _ in range(count)
    ]


def groups(count: int, seed: int = 0, *, scored: bool = True) -> list[dict[str, Any]]:
    """Groups of two to four responses."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        n = rng.choice((2, 3, 4))
        rewards = [rng.uniform(-3, -1) for _ in range(n)]
        rows.append(
            {"prompt": ids(rng), "responses": [ids(rng) for _ in range(n)], "rewards": rewards}
        )
    if not scored:
        for row in rows:
            del row["rewards"]
    return rows


def own(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": ids(rng),
            "chosen": ids(rng),
            "responses": [ids(rng, 2, 14) for _ in range(rng.choice((1, 2)))],
        }
        for _ in range(count)
    ]


def logits(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Logits [T, V] of the positions that predict a response's tokens."""
    sequence = torch.tensor([prompt + response])
    out = model(input_ids=sequence, use_cache=False).logits[0].float()
    return out[len(prompt) - 1 : -1]


def logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Log-prob [T] of each token of a response."""
    table = F.log_softmax(logits(model, prompt, response), -1)
    return table[torch.arange(len(response)), torch.tensor(response)]
