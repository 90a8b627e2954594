"""The demo's text: English prose that ships with CPython, split by document, and its tokenizer.

`pydoc_data.topics` is the language reference that `help()` prints, about 79 topics. It is too
little for a language model, so the docstrings of the standard library, read from its source files
and never imported, come on top. One *document* is a topic or a top-level module. A paragraph that
occurs twice is kept once, and whole documents are held out, so that no held-out paragraph was
trained on.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pad_kernels.demo.settings import Settings

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
NOT_PROSE = {"test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "antigravity", "this"}
MIN_WORDS = 8  # shorter paragraphs are headings and captions
MIN_LETTERS = 0.72  # letters and spaces; below this a paragraph is code, a table or a grammar


@dataclass(frozen=True)
class Corpus:
    """Paragraphs of prose by document, and which documents are held out."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    def texts(self) -> list[str]:
        """All training paragraphs, in a fixed order."""
        return in_order(self.train)

    def characters(self) -> int:
        """Characters of training text."""
        return sum(len(text) for text in self.texts())


def in_order(documents: dict[str, list[str]]) -> list[str]:
    """The paragraphs of some documents, by the documents' names."""
    return [text for name in sorted(documents) for text in documents[name]]


def paragraphs(text: str) -> Iterator[str]:
    r"""Yield the prose paragraphs of a text, unwrapped to one line each.

    >>> list(paragraphs("Title\n=====\n\nOne line of a paragraph that\nis wrapped over two.\n"))
    ['One line of a paragraph that is wrapped over two.']
    """
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if len(line.split()) < MIN_WORDS or line.startswith(("+--", "$", "|")) or ">>>" in line:
            continue
        letters = sum(character.isalpha() or character == " " for character in line)
        if letters >= MIN_LETTERS * len(line) and line.isascii() and "==" not in line:
            yield line


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics  # not on every PATH of a packager's CPython; the caller explains

    yield from ((f"topic:{name}", text) for name, text in topics.topics.items())


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - NOT_PROSE):
        files = [root / f"{name}.py"] if (root / f"{name}.py").is_file() else []
        files += sorted((root / name).rglob("*.py")) if (root / name).is_dir() else []
        text = "\n\n".join(
            doc for file in files if "test" not in file.parts for doc in _docstrings(file)
        )
        if text:
            yield f"module:{name}", text


def _deduplicated(documents: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Paragraphs by document; one found in several documents stays with the shortest of them."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name, text in sorted(documents, key=lambda item: (len(item[1]), item[0])):
        for paragraph in paragraphs(text):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.setdefault(name, []).append(paragraph)
    return kept


def read_corpus(settings: Settings) -> Corpus:
    """Read the text and hold documents out until `settings.held_out_share` of it is held out."""
    sources = [*_topics(), *(_modules() if settings.use_docstrings else ())]
    kept = _deduplicated(sources)
    names = sorted(kept)
    random.Random(settings.seed).shuffle(names)
    # A document that is a large part of the corpus would be all of the held-out set.
    total = sum(len(text) for name in names for text in kept[name])
    held: dict[str, list[str]] = {}
    size = 0
    for name in names:
        length = sum(map(len, kept[name]))
        if size < settings.held_out_share * total and length < 0.04 * total:
            held[name] = kept[name]
            size += length
    return Corpus({name: kept[name] for name in sorted(kept) if name not in held}, held)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; it may end smaller than `vocab_size` on little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text between <bos> and <eos>."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return [[bos, *encoding.ids, eos] for encoding in tokenizer.encode_batch(texts)]


def openings(
    documents: list[list[int]], settings: Settings, count: int, avoid: set[tuple[int, ...]]
) -> torch.Tensor:
    """The first tokens of up to `count` different long paragraphs, as prompts [P, prompt_tokens].

    Openings in `avoid` are left out: paragraphs that differ later on can begin alike.
    """
    length = settings.prompt_tokens
    found = {
        tuple(tokens[:length]): None
        for tokens in documents
        if len(tokens) >= length + settings.response_tokens // 2
    }
    prompts = [opening for opening in found if opening not in avoid]
    random.Random(settings.seed).shuffle(prompts)
    return torch.tensor(prompts[:count])
