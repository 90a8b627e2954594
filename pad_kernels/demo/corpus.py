"""The demo's text: English prose that ships with CPython, split by document, and its tokenizer.

Two kinds of it, so that a teacher can know what its student does not:

- the *reference*: `pydoc_data.topics`, about 79 topics of the language reference for `help()`;
- *docstrings* of the standard library, read from its source files, which are not imported.

A paragraph that occurs twice is kept once, and whole topics are held out, so that no held-out
paragraph was trained on.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pad_kernels.demo.settings import Settings

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
NOT_PROSE = {"test", "idlelib", "lib2to3", "turtledemo", "antigravity", "this"}
MIN_WORDS = 8  # shorter paragraphs are headings and captions
MIN_LETTERS = 0.72  # letters and spaces; below this a paragraph is code, a table or a grammar


@dataclass(frozen=True)
class Corpus:
    """Paragraphs of prose: docstrings by module, the reference by topic, topics held out."""

    docstrings: dict[str, list[str]]
    reference: dict[str, list[str]]
    held_out: dict[str, list[str]]

    def training_texts(self) -> list[str]:
        """Every paragraph that may be trained on."""
        return in_order(self.docstrings) + in_order(self.reference)


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
        sources = (file for file in files if "test" not in file.parts)
        text = "\n\n".join(docstring for file in sources for docstring in _docstrings(file))
        if text:
            yield name, text


def _deduplicated(documents: Iterable[tuple[str, str]], seen: set[str]) -> dict[str, list[str]]:
    """Paragraphs by document; one found in several documents stays with the shortest of them."""
    kept: dict[str, list[str]] = {}
    for name, text in sorted(documents, key=lambda item: (len(item[1]), item[0])):
        for paragraph in paragraphs(text):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.setdefault(name, []).append(paragraph)
    return kept


def read_corpus(settings: Settings) -> Corpus:
    """Read the text and hold topics out until `settings.held_out_share` of the reference is."""
    seen: set[str] = set()
    reference = _deduplicated(topics.topics.items(), seen)
    docstrings = _deduplicated(islice(_modules(), settings.modules), seen)
    names = sorted(reference)
    random.Random(settings.seed).shuffle(names)
    total = sum(len(text) for text in in_order(reference))
    held: dict[str, list[str]] = {}
    size = 0
    for name in names:
        length = sum(map(len, reference[name]))
        # A topic that is most of the held-out text would be all that is measured.
        if size < settings.held_out_share * total and length < 0.06 * total:
            held[name] = reference.pop(name)
            size += length
    return Corpus(docstrings, reference, held)


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


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as trainers take it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text between <bos> and <eos>."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    return [[bos, *encoding.ids, eos] for encoding in tokenizer.encode_batch(texts)]


def sentences(texts: Iterable[str]) -> list[str]:
    """Cut paragraphs into pieces that start a sentence, each running to its paragraph's end.

    >>> sentences(["It is so. But see below."])
    ['It is so. But see below.', 'But see below.']
    """
    pieces = []
    for text in texts:
        starts = [0, *(match.end() for match in re.finditer(r"[.:] (?=[A-Z])", text))]
        pieces += [text[start:] for start in starts]
    return pieces


def openings(
    tokenizer: Tokenizer, texts: list[str], settings: Settings, count: int, avoid: str = ""
) -> Tensor:
    """The first tokens of up to `count` different sentences, as prompts [P, prompt_tokens].

    An opening that occurs in the text `avoid` is left out: sentences that differ can begin alike.
    """
    length = settings.prompt_tokens
    found: dict[tuple[int, ...], None] = {}
    for tokens in encode(tokenizer, sentences(texts)):
        if len(tokens) >= length + 8:  # something is left to continue
            opening = tokens[:length]
            if not avoid or tokenizer.decode(opening) not in avoid:
                found[tuple(opening)] = None
    prompts = list(found)
    random.Random(settings.seed).shuffle(prompts)
    return torch.tensor(prompts[:count])
