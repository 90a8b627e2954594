"""Live memory at every instant of a model's own forward and backward, without running it.

The operators of a step see tensors that have shapes but no memory. Each storage that one of them
makes is added up, and taken off again when nobody refers to it any more: what autograd saves,
temporaries and gradients in flight are all in, in the order in which PyTorch would have them.
Every entry of that timeline is affine in the number of sequences, so two traces give all others.

For a Llama block in bfloat16 with flash attention it finds, in bytes a token, H the hidden size,
A = heads × head_dim, K = key-value heads × head_dim, I the intermediate size, what one can count by
hand (after Korthikanti et al., arXiv 2205.05198, for this block and without dropout):

    2 norms     2 (4H + 2H + 2H + 4)    float32 input, bfloat16 normalised and output, 1/rms
    attention   2 (2A + 2K) + 4 heads   rotated q and k, v and the output; a float32 a row
    MLP         2 · 4I                  gate, its activation, up, the product of the two

With checkpointing it is 2H a layer, and the above for the one layer that is done again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

FLASH = "planned"  # transformers looks for a package where a name says flash


class Timeline(TorchDispatchMode):
    """Live bytes after each operator, tensors that were there before left out."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in there:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.bytes.append(self._now)
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size

    def take(self) -> list[int]:
        """The timeline so far, what lives now at its end; the next one begins here."""
        taken = [*self.bytes, self._now]
        self.bytes.clear()
        return taken


class _FlashAttention(torch.autograd.Function):
    """Shapes of flash attention (arXiv 2205.14135): keeps q, k, v, output and a float per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def register_flash() -> None:
    """Make FLASH an attention implementation of transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return _FlashAttention.apply(q, k, v), None

    AttentionInterface.register(FLASH, attention)
    AttentionMaskInterface.register(FLASH, lambda *_, **__: None)


@dataclass(frozen=True)
class Affine:
    """Live bytes over time, each instant affine in the number of sequences B.

    Args:
        first, second: timelines of 2 and of 3 sequences.
    """

    first: list[int]
    second: list[int]

    def peak(self, sequences: int) -> int:
        """Most bytes at any time, with B sequences."""
        more = sequences - 2
        return max(a + more * (b - a) for a, b in zip(self.first, self.second, strict=True))

    def last(self, sequences: int) -> int:
        """Bytes at the end, with B sequences."""
        return self.first[-1] + (sequences - 2) * (self.second[-1] - self.first[-1])


def affine(trace: Callable[[int], list[list[int]]]) -> list[Affine]:
    """Trace phases with 2 and with 3 sequences (operators may treat 1 as a special case).

    Raises:
        RuntimeError: the operators depend on the number of sequences.
    """
    both = [Affine(*pair) for pair in zip(trace(2), trace(3), strict=True)]
    if any(len(phase.first) != len(phase.second) for phase in both):
        raise RuntimeError("its operators depend on the number of sequences")
    return both


def gradients_there(model: nn.Module) -> list[Tensor]:
    """A model's own tensors, each trained parameter's gradient among them.

    Gradients are there, as in the second of several accumulated micro-batches: a new gradient is
    live beside the one that it is added to.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    tensors = [*model.parameters(), *model.buffers()]
    return tensors + [p.grad for p in model.parameters() if p.grad is not None]


def run_body(
    model: Any, there: list[Tensor], size: tuple[int, int], autocast: bool, train: bool
) -> tuple[list[list[int]], Tensor]:
    """Timelines of the decoder without its head, and the hidden states [B, T, H].

    Args:
        model: a causal LM without weights.
        there: tensors that do not count.
        size: sequences B and tokens T.
        autocast: products in bfloat16, whatever the parameters' dtype.
        train: forward and backward, two timelines; else the forward alone, without gradients.
    """
    ids = torch.zeros(size, dtype=torch.long)
    with Timeline(there) as timeline, torch.set_grad_enabled(train):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        phases = [timeline.take()]
        if train:
            hidden.backward(torch.empty_like(hidden))
            phases.append(timeline.take())
    return phases, hidden.detach()
