"""Heads of `transformers` models: read by structure, equal to the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny_models as tiny

import pad_kernels as pk
from pad_kernels.integrations.transformers import (
    HeadCheck,
    ModelHead,
    head_of,
    hidden_states,
    run_with_head,
)

pytestmark = pytest.mark.usefixtures("one_thread")

#: What is to be read: soft cap, factor, bias, tied. Families that are not named: all plain, untied.
READ: dict[str, tuple[float | None, float, bool, bool]] = {
    "llama-tied": (None, 1.0, False, True),
    "qwen2": (None, 1.0, False, True),
    "gemma2": (5.0, 1.0, False, True),
    "gemma2-untied": (5.0, 1.0, False, False),
    "gemma3": (7.0, 1.0, False, True),
    "phi": (None, 1.0, True, False),
    "cohere": (None, 0.25, False, True),
    "cohere2": (None, 3.0, False, True),
    "granite": (None, 0.125, False, False),
    "gpt2": (None, 1.0, False, True),
    "gpt-neox-tied": (None, 1.0, False, True),
    "mamba": (None, 1.0, False, True),
    "recurrent-gemma": (5.0, 1.0, False, True),
}


def our_logprob(hidden: Tensor, head: ModelHead, labels: Tensor) -> Tensor:
    return pk.linear_logprob(hidden, head.weight, labels, **head.options())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_read(family: str) -> None:
    model = tiny.build(family)
    head = head_of(model)
    softcap, scale, biased, tied = READ.get(family, (None, 1.0, False, False))
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == biased
    assert (head.softcap, head.logit_scale, head.tied) == (softcap, scale, tied)
    assert (head.hidden_size, head.vocab_size) == (32, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_and_gradients_are_the_models_own(family: str, dtype: torch.dtype) -> None:
    model = tiny.build(family).to(dtype)
    inputs, weights = tiny.batch(), torch.rand(3, 9, dtype=dtype)
    labels = tiny.labels_of(inputs)
    values: dict[str, Tensor] = {}

    def dense() -> Tensor:
        values["dense"] = tiny.dense_logprob(model(**inputs).logits, labels)
        return (values["dense"] * weights).sum()

    def ours() -> Tensor:
        hidden = hidden_states(model, **inputs)
        values["ours"] = our_logprob(hidden, head_of(model), labels)
        return (values["ours"] * weights).sum()

    expected, found = tiny.gradients(model, dense), tiny.gradients(model, ours)
    # Mamba's logits are float32 whatever the model is.
    bound = 1e-5 if values["dense"].dtype == torch.float32 else 1e-12
    assert (values["ours"] - values["dense"]).abs().max() <= bound * values["dense"].abs().max()
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= bound * gradient.norm() + 1e-30, name


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_each_option_matters(family: str) -> None:
    """Otherwise the parity test would pass without it."""
    model, inputs = tiny.build(family), tiny.batch()
    labels, hidden, head = tiny.labels_of(inputs), hidden_states(model, **inputs), head_of(model)
    plain = pk.linear_logprob(hidden, head.weight, labels)
    assert (plain - our_logprob(hidden, head, labels)).abs().max() > 0.5


def test_a_head_as_the_ops_over_several_heads_take_it() -> None:
    model, inputs = tiny.build("gemma2"), tiny.batch()
    labels, hidden = tiny.labels_of(inputs), hidden_states(model, **inputs)
    given = head_of(model).head(hidden, temperature=2.0)
    assert (given.softcap, given.temperature) == (5.0, 2.0)
    loss = pk.linear_distill(given, labels, ce_weight=1.0, reduction="sum").loss
    dense = tiny.dense_logprob(model(**inputs).logits / 2.0, labels)
    torch.testing.assert_close(loss, -dense.sum(), rtol=1e-5, atol=1e-5)


def test_a_config_that_knows_a_smaller_vocabulary() -> None:
    """Rows of the weight beyond it are padding."""
    model, inputs = tiny.build("llama"), tiny.batch()
    model.config.vocab_size = tiny.VOCAB - 7
    inputs["input_ids"] %= tiny.VOCAB - 7
    labels, hidden, head = tiny.labels_of(inputs), hidden_states(model, **inputs), head_of(model)
    assert head.vocab_size == tiny.VOCAB - 7
    dense = tiny.dense_logprob(model(**inputs).logits[..., : tiny.VOCAB - 7], labels)
    torch.testing.assert_close(our_logprob(hidden, head, labels), dense, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary() -> None:
    model = tiny.build("gemma2")
    model.resize_token_embeddings(200, pad_to_multiple_of=64, mean_resizing=False)
    head = head_of(model)
    assert head.weight.shape[0] == 256 and head.tied
    hidden_states(model, check=HeadCheck(), **tiny.batch())


class FourBit(nn.Linear):
    """As quantised layers are made: a linear layer with a forward of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).round()


def test_heads_that_are_refused_by_name() -> None:
    model = tiny.build("llama")
    model.lm_head = FourBit(32, tiny.VOCAB)
    with pytest.raises(TypeError, match=r"not quantised or replaced, got .*FourBit"):
        head_of(model)
    model.lm_head = nn.Sequential(nn.Linear(32, tiny.VOCAB))
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear.*got .*Sequential"):
        hidden_states(model, **tiny.batch())
    model = tiny.build("llama")
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(TypeError, match="a patched forward"):
        head_of(model)
    with pytest.raises(TypeError, match=r"get_output_embeddings\(\) is None"):
        head_of(model.model)
    with pytest.raises(TypeError, match=r"model: expected a causal language model.*got Linear"):
        head_of(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="torchrun"):
        head_of(nn.DataParallel(model))


class Packed(Tensor):
    """A tensor subclass, as torch's quantised weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Packed:
        return Packed(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].inner)
        raise NotImplementedError(func)


def test_a_quantised_weight_is_refused() -> None:
    model = tiny.build("llama")
    model.lm_head.weight = nn.Parameter(Packed(torch.ones(tiny.VOCAB, 32)), requires_grad=False)
    with pytest.raises(TypeError, match=r"a plain weight, not quantised, got .*Packed"):
        head_of(model)


def test_inputs_that_are_refused() -> None:
    model, inputs = tiny.build("llama"), tiny.batch()
    with pytest.raises(ValueError, match="labels: expected none"):
        hidden_states(model, labels=inputs["input_ids"], **inputs)
    with pytest.raises(ValueError, match=r"hidden states of the \(3, 9\) positions"):
        hidden_states(model, logits_to_keep=2, **inputs)
    with pytest.raises(TypeError, match=r"compute: expected a result of tensors.*got float"):
        run_with_head(model, lambda hidden, head: 1.0, **inputs)
    with pytest.raises(TypeError, match="got nothing"):
        run_with_head(model, lambda hidden, head: None, **inputs)
