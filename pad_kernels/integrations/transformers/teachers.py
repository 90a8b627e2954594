"""Who a student learns from: models beside it, and their outputs on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels._checks import fail_type, fail_value
from pad_kernels.integrations.transformers.check import HeadCheck
from pad_kernels.integrations.transformers.collate import flat_hidden, model_inputs
from pad_kernels.integrations.transformers.head import (
    ModelHead,
    causal_lm,
    head_linear,
    head_module,
    head_of,
)
from pad_kernels.integrations.transformers.hidden import hidden_states


class Teacher(Protocol):
    """Says what it knows about a batch's responses."""

    @property
    def kind(self) -> str:
        """What it returns: "head", a whole distribution, or offline "teacher" or "advantage"."""

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without padding."""

    def attach(self, name: str, tokenizer: Any, device: torch.device) -> None:
        """Refuse another tokenizer, and move to the device."""

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """A head or an offline teacher over the batch's N tokens."""


@runtime_checkable
class OfflineTeacher(Protocol):
    """One whose outputs are of certain data sets."""

    def check_data(self, where: str, key: str) -> None:
        """Refuse a data set with another fingerprint."""


def check_same_tokenizer(name: str, teacher: Any, student: Any) -> None:
    """Raise a ValueError unless both tokenizers give every token the same id."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    token = min(
        (each for each in theirs.keys() | ours.keys() if theirs.get(each) != ours.get(each)),
        key=lambda each: (ours.get(each, len(ours)), each),
    )
    fail_value(
        name,
        "a teacher with the student's tokenizer, since their distributions are compared entry by "
        f"entry of the vocabulary: {token!r} has id {ours.get(token)} in the student's",
        f"id {theirs.get(token)}",
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients or dropout; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class ModelTeacher:
    """A causal language model that runs beside the student, never trained.

    Args:
        model: on any device; it is moved to the student's.
        processing_class: its tokenizer, which must be the student's.
        head_on_cpu: leave the LM head's weight on the CPU, from where its pieces are sent while
            they are needed. The model must not tie it to its embedding.
    """

    kind = "head"

    def __init__(self, model: Any, processing_class: Any, *, head_on_cpu: bool = False) -> None:
        if not isinstance(model, nn.Module):
            fail_type("model", "a causal language model", model)
        self.model = model.eval().requires_grad_(False)
        self.processing_class = processing_class
        self._head_on_cpu = head_on_cpu
        self._check: HeadCheck | None = None
        if head_on_cpu and self.head().tied:
            fail_value("head_on_cpu", "False for a head that is the embedding too", True)

    def head(self) -> ModelHead:
        """Its head."""
        return head_of(self.model)

    @property
    def vocab_size(self) -> int:
        """Entries of its vocabulary."""
        return effective_size(self.head())

    def attach(self, name: str, tokenizer: Any, device: torch.device) -> None:
        """Refuse another tokenizer, and move to the device."""
        check_same_tokenizer(name, self.processing_class, tokenizer)
        if not self._head_on_cpu:
            self.model.to(device)
            return
        if self._check is None:  # the model can only run its own head while it is whole
            with torch.no_grad():
                home = next(self.model.parameters()).device
                hidden_states(self.model, input_ids=torch.tensor([[0, 1]], device=home))
            self._check = _NoCheck()
        linear = head_linear(head_module(causal_lm(self.model)))
        own = {n: each.data.cpu() for n, each in linear.named_parameters(recurse=False)}
        for each in own:
            setattr(linear, each, None)
        self.model.to(device)
        for each, value in own.items():
            value = value.pin_memory() if device.type == "cuda" else value
            setattr(linear, each, nn.Parameter(value, requires_grad=False))

    def __call__(self, batch: Mapping[str, Any]) -> pk.Head:
        """The model's head over the batch's N tokens."""
        with torch.no_grad():
            hidden = hidden_states(self.model, check=self._check, **model_inputs(batch))
            return self.head().head(flat_hidden(hidden, batch))


class _NoCheck(HeadCheck):
    """For a model whose own head cannot run where its hidden states are."""

    due = False  # type: ignore[assignment]


def effective_size(head: ModelHead) -> int:
    """Entries of a head's vocabulary, without padding."""
    return head.weight.shape[0] if head.vocab_size is None else head.vocab_size


def head_logprob(head: pk.Head, labels: Tensor) -> Tensor:
    """Log-prob [N] of each label under a head."""
    return pk.linear_logprob(
        head.hidden,
        head.weight,
        labels,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=head.temperature,
        vocab_size=head.vocab_size,
    )


def limited(output: Any, vocab_size: int | None) -> Any:
    """A head that stops at the vocabulary both models have; other outputs as they are."""
    if vocab_size is None or not isinstance(output, pk.Head):
        return output
    return replace(output, vocab_size=vocab_size)
