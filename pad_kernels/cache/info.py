"""Whose outputs a cache holds, and the check that they are the ones a trainer wants."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from pad_kernels._checks import check_choice, check_integer, check_tensor, fail_type, fail_value
from pad_kernels.heads import Head, HeadOptions

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
KINDS = ("teacher", "advantage", "hidden")


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary: every token with its id, in whatever order they come.

    Args:
        tokenizer: a mapping from token (str or bytes) to id, or an object whose ``get_vocab()``
            returns one (transformers, tokenizers); or a str such as ``tokenizer.to_str()``, which
            is hashed as it is and so also covers merges, normalisation and padding settings.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: ``tokenizer`` is none of these.

    Example:
        >>> from pad_kernels.cache import tokenizer_hash
        >>> tokenizer_hash({"a": 0, "b": 1}) == tokenizer_hash({"b": 1, "a": 0})
        True
        >>> tokenizer_hash({"a": 0, "b": 1}) == tokenizer_hash({"a": 1, "b": 0})
        False
    """
    if isinstance(tokenizer, str):
        return hashlib.sha256(tokenizer.encode()).hexdigest()
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer
    if not isinstance(vocabulary, Mapping):
        fail_type("tokenizer", "a mapping from token to id, a str, or get_vocab()", tokenizer)
    digest = hashlib.sha256()
    # A token is preceded by its length: no two vocabularies make the same stream of bytes.
    entries = [(check_integer("a token's id", i), _bytes(t)) for t, i in vocabulary.items()]
    for index, token in sorted(entries):
        digest.update(b"%d %d " % (index, len(token)) + token)
    return digest.hexdigest()


def _bytes(token: Any) -> bytes:
    if isinstance(token, str):
        return token.encode("utf-8", "surrogatepass")
    return token if isinstance(token, bytes) else fail_type("a token", "str or bytes", token)


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds. Reader and writer compare every field, and refuse what differs.

    Args:
        model: name of the teacher, or of the aligned model, with its revision where it has one.
        tokenizer_hash: see :func:`tokenizer_hash`.
        vocab_size: number of real entries of the vocabulary, without a weight's padding.
        k: tokens kept per position; for "hidden" the width of the hidden states.
        kind: "teacher": the k likeliest tokens and their log-probabilities;
            "advantage": the aligned model's k likeliest tokens and log pi_aligned / pi_reference;
            "hidden": the teacher's last hidden states, to be used with its head.
        reference: name of the reference model, for "advantage" and only there.
        dataset: whatever tells this dataset, its order and its tokens from others; may be "".
        dtype: what values are stored as: "float32", "float64", or "float16", which rounds a value
            by up to 2**-11 of itself (3e-8 where that is more) and refuses those beyond 65504;
            for hidden states also "bfloat16".
        softcap, logit_scale, temperature: options of the (aligned) head.
        reference_softcap, reference_logit_scale, reference_temperature: of the reference's head.

    Raises:
        TypeError, ValueError: a field of the wrong kind or range.

    Example:
        >>> from pad_kernels.cache import CacheInfo, tokenizer_hash
        >>> CacheInfo("org/teacher", tokenizer_hash({"a": 0, "b": 1}), vocab_size=2, k=1).kind
        'teacher'
    """

    model: str
    tokenizer_hash: str
    vocab_size: int
    k: int
    kind: str = "teacher"
    reference: str = ""
    dataset: str = ""
    dtype: str = "float32"
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    reference_softcap: float | None = None
    reference_logit_scale: float = 1.0
    reference_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer_hash", "reference", "dataset"):
            if not isinstance(getattr(self, name), str):
                fail_type(name, "a string", getattr(self, name))
        check_integer("vocab_size", self.vocab_size, at_least=1)
        check_choice("kind", self.kind, KINDS)
        dtypes = [d for d in DTYPES if d != "bfloat16" or self.kind == "hidden"]
        check_choice("dtype", self.dtype, dtypes)
        if check_integer("k", self.k, at_least=1) > self.vocab_size and self.kind != "hidden":
            fail_value("k", f"at most vocab_size = {self.vocab_size}", self.k)
        for name in ("model", "tokenizer_hash"):
            if not getattr(self, name):
                fail_value(name, "a string that is not empty", "''")
        if bool(self.reference) != (self.kind == "advantage"):
            expected = "the reference model's name" if self.kind == "advantage" else "''"
            fail_value("reference", f"{expected} with kind={self.kind!r}", repr(self.reference))
        self._options("")
        if self._options("reference_") != HeadOptions() and self.kind != "advantage":
            fail_value("reference_*", "no head options without a reference", "some")

    def _options(self, prefix: str) -> HeadOptions:
        softcap, scale, temperature = (getattr(self, prefix + f.name) for f in fields(HeadOptions))
        return HeadOptions.checked(softcap, scale, temperature, prefix)

    def check(self, expected: CacheInfo, where: str) -> None:
        """Raise a ValueError that names the first field in which this is not what is expected."""
        if not isinstance(expected, CacheInfo):
            fail_type("info", "a CacheInfo", expected)
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found != wanted:
                fail_value(field.name, repr(wanted), f"{found!r} in the cache {where}")

    def check_head(self, name: str, head: Head, prefix: str = "") -> None:
        """Refuse a head whose vocabulary or options are not those of this info."""
        if not isinstance(head, Head):
            fail_type(name, "a pad_kernels.Head", head)
        check_tensor(f"{name}.hidden", head.hidden, ndim=2)
        size = len(head.weight) if head.vocab_size is None else head.vocab_size
        if size != self.vocab_size:
            fail_value(f"{name}.vocab_size", f"{self.vocab_size} as in info", size)
        for field in fields(HeadOptions):
            found, wanted = getattr(head, field.name), getattr(self, prefix + field.name)
            if found != wanted:
                fail_value(f"{name}.{field.name}", f"{wanted!r} as in info", repr(found))
