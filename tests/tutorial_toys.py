"""Tiny chat models in folders, as somebody has them who begins a tutorial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trainer_toys import llama
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges: any text has tokens, and any tokens are a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["Explain what this is in two sentences."] * 9, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = TEMPLATE
    return found


def save(model: Any, folder: Path) -> None:
    model.config.max_position_embeddings = 8192
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)


def fill(folder: Path) -> None:
    """A student, a wider teacher and a judge, all random but sure of themselves."""
    size = len(chat_tokenizer())  # a random model would write the tokens of a padded head, too
    save(llama(0, hidden=32, vocab=size), folder / "student")
    save(llama(1, hidden=48, vocab=size), folder / "teacher")
    config = llama(2, vocab=size).config
    config.num_labels = 1
    torch.manual_seed(2)
    save(LlamaForSequenceClassification(config), folder / "judge")
