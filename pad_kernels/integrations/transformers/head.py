"""What a causal language model does between its last hidden state and its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

import pad_kernels as pk
from pad_kernels._checks import check_number, fail_type

#: Names under which models keep the cap of their final logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
#: Names under which they keep a factor on their raw logits, and the power that they raise it to.
_FACTORS = {"logit_scale": 1, "logits_scaling": -1}


@dataclass(frozen=True)
class ModelHead:
    """The head of a causal language model: logits are ``softcap * tanh(x * scale / softcap)``.

    Here x is ``hidden @ weight.T + bias``.

    Attributes:
        weight: [V, H], the parameter itself, so that its gradient arrives where it belongs.
        bias: [V] or None.
        softcap: cap of the final logits or None.
        logit_scale: what the raw logits are multiplied with.
        vocab_size: leading entries of ``weight`` that are real where the config says that there are
            fewer than V, else None.
        tied: ``weight`` is the input embedding's.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    vocab_size: int | None
    tied: bool

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states that it takes."""
        return self.weight.shape[1]

    def head(self, hidden: Tensor, *, temperature: float = 1.0) -> pk.Head:
        """The head over hidden states [..., H], as the ops over several heads take it."""
        return pk.Head(hidden, self.weight, temperature=temperature, **self.options())

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the one-head ops, besides ``hidden`` and ``weight``."""
        return {
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "vocab_size": self.vocab_size,
        }


def head_of(model: nn.Module) -> ModelHead:
    """Read the head of a causal language model of `transformers`, whatever it is wrapped in.

    Weight and bias come from the model's output embedding, cap and factor from the names under
    which models keep them. A model that does anything else to its logits is not found out here but
    where it is run: :func:`run_with_head` compares with the model's own logits.

    Under FSDP the weight is whole only while the model runs: use :func:`run_with_head` there.

    Args:
        model: a model, also inside DistributedDataParallel, FSDP, DeepSpeed, PEFT, torch.compile.

    Returns:
        The ModelHead; nothing in it is a copy.

    Raises:
        TypeError: there is no causal language model, or its head is not a plain linear layer: an
            adapter, a quantised layer, a patched one.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
        >>> head = head_of(model)
        >>> head.hidden_size, head.tied, head.options()["softcap"]
        (8, True, None)
    """
    lm = causal_lm(model)
    return read_head(lm, head_linear(head_module(lm)))


def read_head(lm: PreTrainedModel, linear: nn.Linear) -> ModelHead:
    """The head of an unwrapped model whose output embedding is known."""
    config = lm.config.get_text_config()
    scale = 1.0
    for name, power in _FACTORS.items():
        value = _setting(lm, config, name)
        if value is not None:
            scale *= check_number(name, value) ** power
    caps = [value for name in _CAPS if (value := _setting(lm, config, name)) is not None]
    size, rows = getattr(config, "vocab_size", None), linear.weight.shape[0]
    embedding = plain_module(lm.get_input_embeddings())
    return ModelHead(
        weight=linear.weight,
        bias=linear.bias,
        softcap=check_number("softcap", caps[0], above=0.0) if caps else None,
        logit_scale=scale,
        vocab_size=size if size is not None and size < rows else None,
        tied=getattr(embedding, "weight", None) is linear.weight,
    )


def _setting(lm: PreTrainedModel, config: Any, name: str) -> Any:
    """A number that the model keeps itself or reads from its config; None if there is none."""
    value = getattr(lm, name, None)
    return getattr(config, name, None) if value is None else value


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The model of `transformers` inside DDP, FSDP, DeepSpeed, PEFT and torch.compile."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.DataParallel):
            fail_type("model", "one process per device (start it with torchrun)", inner)
        if hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DDP, DeepSpeed, FSDP
            inner = inner.module
        else:
            fail_type("model", "a causal language model of transformers, or one wrapped", inner)
    return inner


def head_module(lm: PreTrainedModel) -> nn.Module:
    """What the model calls to make logits, with anything that is attached to it."""
    module = lm.get_output_embeddings()
    if module is None:
        fail_type("model", "a model with an LM head (get_output_embeddings() is None)", lm)
    return module


def plain_module(module: Any) -> Any:
    """The module that is used where PEFT keeps a trained copy of it (``modules_to_save``)."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return copies[module.active_adapters[0]]


def head_linear(module: nn.Module) -> nn.Linear:
    """The plain linear layer behind a head, by structure, or a TypeError that says what it is.

    The structure is what counts: an adapter that has just been made adds nothing to the logits yet.
    """
    linear = plain_module(module)
    if hasattr(linear, "get_base_layer"):
        fail_type(
            "the LM head",
            "a plain linear layer; leave lm_head out of the adapter's target_modules, or train it "
            "whole (modules_to_save=['lm_head'])",
            f"one with an adapter ({_name(linear)})",
        )
    patched = "forward" in vars(linear)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        fail_type("the LM head", "torch.nn.Linear, not quantised or replaced", _name(linear))
    if patched:
        fail_type("the LM head", "torch.nn.Linear with its own forward", "a patched forward")
    if is_traceable_wrapper_subclass(linear.weight) and not hasattr(linear.weight, "placements"):
        fail_type("the LM head", "a plain weight, not quantised", _name(linear.weight))
    return linear


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
