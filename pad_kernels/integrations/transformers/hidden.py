"""Hidden states without logits, through the forward of whatever a model is wrapped in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from pad_kernels._checks import fail_type, fail_value
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.integrations.transformers.check import (
    HeadCheck,
    compare,
    probe_rows,
)
from pad_kernels.integrations.transformers.head import (
    ModelHead,
    causal_lm,
    head_linear,
    head_module,
    read_head,
)

Compute = Callable[[Tensor, ModelHead], Any]

#: The checks of models that were run without one.
_CHECKS: WeakKeyDictionary[nn.Module, HeadCheck] = WeakKeyDictionary()


def hidden_states(model: nn.Module, /, *, check: HeadCheck | None = None, **inputs: Any) -> Tensor:
    """The last hidden states of a causal language model; its logits are never made.

    They are what the model hands to its head, final norm and all. Under FSDP the head's weight is
    whole only while the model runs: there, compute the loss in :func:`run_with_head`.

    Args:
        model: a model of `transformers`, also wrapped; it is called as it is.
        check: as in :func:`run_with_head`.
        inputs: what the model's forward takes, besides labels: input_ids [B, T], attention_mask ...

    Returns:
        [B, T, H], in the dtype that the model computes in, with gradient.

    Raises:
        TypeError, ValueError, HeadMismatch: as :func:`run_with_head`.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
        >>> hidden_states(model, input_ids=torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """
    states: Tensor = run_with_head(model, lambda hidden, _: hidden, check=check, **inputs)
    return states


def run_with_head(
    model: nn.Module, compute: Compute, /, *, check: HeadCheck | None = None, **inputs: Any
) -> Any:
    """Call a model, and in the place of its LM head something that never makes the logits.

    The model's own forward runs once, with every wrapper's around it. Where it would call its
    head, ``compute`` is called with the hidden states and the head: shards are gathered there,
    autocast is on, and the result passes through the wrappers as the model's output, so that their
    hooks see it.

    With torch.compile the graph is cut at the head.

    Args:
        model: a causal language model of `transformers`, also inside DistributedDataParallel, FSDP,
            DeepSpeed, PEFT, torch.compile.
        compute: called with hidden states [B, T, H] and a ModelHead; returns a tensor, or a dict,
            list or tuple of tensors (and None).
        check: when to compare the head with the model's own logits; by default a
            :class:`HeadCheck` of the model's own, at its first call and every hundredth.
        inputs: what the model's forward takes, besides labels. ``use_cache`` is False unless given.

    Returns:
        What ``compute`` returned, as the wrappers hand it on.

    Raises:
        TypeError: a head that cannot be read, see :func:`head_of`; a result without tensors.
        ValueError: labels among the inputs; hidden states of other positions than the inputs'; a
            model that is trained with a loss of its own, as a mixture of experts' router has.
        HeadMismatch: the model's own logits are not those of the head.

    Example:
        >>> import torch, pad_kernels as pk
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> def loss(hidden, head):
        ...     return pk.linear_cross_entropy(
        ...         hidden, head.weight, ids, shift=True, **head.options())
        >>> run_with_head(model, loss, input_ids=ids).requires_grad
        True
    """
    if inputs.get("labels") is not None:
        fail_value("labels", "none: compute makes the loss, the model does not", "labels")
    lm = causal_lm(model)
    if "use_cache" in inspect.signature(lm.forward).parameters:
        inputs.setdefault("use_cache", False)
    check = _CHECKS.setdefault(lm, HeadCheck()) if check is None else check
    call = _Call(lm, compute, check, inputs)
    with call.in_place():
        result = model(**inputs)
    check.called()
    return result


class _Call:
    """One call of a model with something else in the place of its head."""

    def __init__(
        self, lm: PreTrainedModel, compute: Compute, check: HeadCheck, inputs: dict[str, Any]
    ) -> None:
        self.lm, self.compute, self.check = lm, compute, check
        self.mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids")
        ids = inputs.get("inputs_embeds") if ids is None else ids
        self.positions = None if ids is None else tuple(ids.shape[:2])
        self.module = head_module(lm)
        self.linear = head_linear(self.module)
        self.head: ModelHead | None = None  # as read where the model is whole
        self.raw: Tensor | None = None  # the sampled rows' products
        self.result: Any = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model's forward returns the result, and its head is a stand-in.

        The stand-in is a module of another class, so that compiled code notices it.
        """
        stand_in = _StandIn(self.module, self)
        places = [
            (parent, name)
            for parent in self.lm.modules()
            for name, child in parent._modules.items()
            if child is self.module
        ]
        for parent, name in places:
            parent._modules[name] = stand_in
        try:
            with _replaced(self.lm, self._forward_of(self.lm.forward)):
                yield
        finally:
            for parent, name in places:
                parent._modules[name] = self.module

    def _forward_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward with the result in the place of its outputs."""

        # Compiled code starts inside the model's own forward.
        @torch.compiler.disable(recursive=False)
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self.head is None:
                fail_type("model", "a model that calls its output embedding", self.lm)
            if torch.is_grad_enabled() and getattr(output, "aux_loss", None) is not None:
                fail_value(
                    "model",
                    "no loss of its own, which would be lost (output_router_logits=False)",
                    f"an aux_loss from {type(self.lm).__name__}",
                )
            if self.raw is not None:
                logits = output["logits"] if hasattr(output, "keys") else output[0]
                compare(type(self.lm).__name__, self.head, self.raw, logits[0])
            return self.result

        return run

    def at_head(self, hidden: Tensor) -> Tensor:
        """Run ``compute`` inside the head's own call; give the model a few logits to go on with.

        Returns:
            [1, R, V], the rows to be compared with, R = 0 if none are.
        """
        if self.head is not None:
            fail_type("model", "a model that calls its head once", self.lm)
        if self.positions not in (None, tuple(hidden.shape[:-1])):
            fail_value(
                "inputs",
                f"hidden states of the {self.positions} positions that go in",
                f"hidden states of shape {tuple(hidden.shape)}",
            )
        own, rows = None, None
        if self.check.due:
            rows = self.check.sample(hidden[..., 0].numel(), self.mask).to(hidden.device)
            with _quiet(hidden):
                own = self.module(hidden.flatten(0, -2)[rows].unsqueeze(0))

        def forward(seen: Tensor) -> Any:
            self.head = read_head(self.lm, self.linear)
            if rows is not None:
                with _quiet(seen):
                    taken = seen.flatten(0, -2)[rows].unsqueeze(0)
                    self.raw = F.linear(taken, self.head.weight, self.head.bias)[0]
            return _checked(self.compute(seen, self.head))

        with _replaced(self.linear, forward):
            self.result = self.module(hidden)
        assert self.head is not None
        width = self.head.weight.shape[0]
        if own is None:
            return hidden.new_empty(1, 0, width)
        own = own.to(accumulate_dtype(own.dtype))
        return torch.cat([own, probe_rows(width, own).unsqueeze(0)], 1)


class _StandIn(nn.Module):
    """Where the head was: what it is given goes to the call that is under way."""

    def __init__(self, module: nn.Module, call: _Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    @torch.compiler.disable
    def forward(self, hidden: Tensor) -> Tensor:
        return self.call.at_head(hidden)

    def __getattr__(self, name: str) -> Any:
        """What models ask of their head besides a call, its weight's dtype for one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module have another forward; one that was set on the instance comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _quiet(like: Tensor) -> Iterator[None]:
    """No gradient, and no weights in autocast's cache that were cast without one.

    Versions of torch that keep those would use them where a gradient is wanted.
    """
    kind = like.device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def _checked(result: Any) -> Any:
    """A result that hooks of DDP and FSDP can look into."""
    leaves = [leaf for leaf in tree_leaves(result) if leaf is not None]
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        fail_type("compute", "a result of tensors (in a dict, list or tuple)", kinds)
    return result
