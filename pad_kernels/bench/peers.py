"""What users have today. Every peer is listed; one that cannot run here says why.

The chunked variants that trainers carry inside themselves are re-made here in their spirit, so that
the benchmark needs none of those trainers; the table calls them "-style".
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pad_kernels.bench.cases import IGNORE, OPS, Case, Inputs
from pad_kernels.bench.implementations import Function, Implementation, Unavailable

TORCHTUNE_CHUNKS = 8
TRL_VOCAB_CHUNK = 32768


def _dense_loss(x: Inputs) -> Tensor:
    logits = F.linear(x.hidden, x.weight)
    return F.cross_entropy(logits.float(), x.labels, ignore_index=IGNORE)


def _dense_logprob(x: Inputs) -> Tensor:
    logits = F.linear(x.hidden, x.weight)
    return -F.cross_entropy(logits.float(), x.labels, ignore_index=IGNORE, reduction="none")


def dense(case: Case) -> Function:
    """The careful dense computation: GEMM in the input dtype, softmax and loss in float32."""
    if OPS[case.op].teachers:
        from pad_kernels.bench.teacher_peers import dense_with_teachers

        return dense_with_teachers(case)
    return _dense_loss if case.op == "cross_entropy" else _dense_logprob


def need_compiler() -> None:
    """Raise ``Unavailable`` where torch.compile could not build anything."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise Unavailable("torch.compile needs a C++ compiler")


def compiled_dense(case: Case) -> Function:
    """:func:`dense` through torch.compile, for this shape alone."""
    need_compiler()
    body = torch.compile(dense(case), dynamic=False)
    return lambda x: body(x)


def _torch_linear_cross_entropy(case: Case) -> Function:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    function: Any = F.linear_cross_entropy
    if case.op == "cross_entropy":
        return lambda x: function(x.hidden, x.weight, x.labels, options=options)
    return lambda x: -function(x.hidden, x.weight, x.labels, reduction="none", options=options)


def _cut_cross_entropy(impl: str) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError as error:
            raise Unavailable(
                f"not installed ({error}); pip install 'pad-kernels[peers]'"
            ) from error
        need_compiler()
        if case.op == "cross_entropy":
            return lambda x: linear_cross_entropy(x.hidden, x.weight, x.labels, impl=impl)
        return lambda x: (
            -linear_cross_entropy(x.hidden, x.weight, x.labels, impl=impl, reduction="none")
        )

    return build


def _quack(case: Case) -> Function:
    """Chunks of tokens, all gradients made in the forward pass, as in our early schedule."""
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"not installed ({error}); pip install quack-kernels") from error
    settings = {"ignore_index": IGNORE, "reduction": "mean"}
    return lambda x: chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, **settings)


def _liger_fused(case: Case) -> Function:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Unavailable(f"not installed ({error}); pip install 'pad-kernels[peers]'") from error
    if not torch.cuda.is_available():
        raise Unavailable("a Triton kernel: needs a GPU")
    module = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return lambda x: module(x.weight, x.hidden, x.labels)


def _liger_chunked(case: Case) -> Function:
    """Liger's chunked preference machinery, given the plain negative log-likelihood as its loss."""
    try:
        from liger_kernel.chunked_loss.fused_linear_preference import (
            LigerFusedLinearPreferenceBase as Base,
        )
    except ImportError as error:
        raise Unavailable(f"not installed ({error}); pip install 'pad-kernels[peers]'") from error
    need_compiler()

    class Likelihood(Base):  # type: ignore[misc]
        @staticmethod
        def preference_loss_fn(chosen, rejected, full_target, beta=0.0):  # type: ignore[no-untyped-def]
            return -(chosen.sum() + rejected.sum()) / (full_target != IGNORE).sum()

        @classmethod
        def forward(cls, ctx, hidden, weight, labels):  # type: ignore[no-untyped-def]
            settings = {"compute_nll_loss": False, "average_log_prob": False, "compiled": True}
            return super().forward(cls, ctx, hidden, weight, labels, **settings)

        @staticmethod
        def backward(ctx, *grad_output):  # type: ignore[no-untyped-def]
            return Base.backward(ctx, grad_output)[:3]

    rows = 8  # eight sequences, two at a time: four chunks

    def function(x: Inputs) -> Tensor:
        hidden = x.hidden.view(rows, -1, x.hidden.shape[-1])
        return Likelihood.apply(hidden, x.weight, x.labels.view(rows, -1))[0]

    return function


def _torchtune_style(case: Case) -> Function:
    """A fixed number of token chunks, cross-entropy of each, all of them inside autograd."""

    def function(x: Inputs) -> Tensor:
        total = torch.zeros((), device=x.hidden.device)
        for hidden, labels in zip(
            x.hidden.chunk(TORCHTUNE_CHUNKS), x.labels.chunk(TORCHTUNE_CHUNKS), strict=True
        ):
            logits = F.linear(hidden, x.weight).float()
            total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / (x.labels != IGNORE).sum()

    return function


class _VocabularyChunks(torch.autograd.Function):
    """Online logsumexp over wide vocabulary chunks, recomputed backward, float32 accumulators."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        lse = torch.full(labels.shape, -torch.inf, device=hidden.device)
        picked = torch.zeros(labels.shape, device=hidden.device)
        for start in range(0, weight.shape[0], TRL_VOCAB_CHUNK):
            logits = (hidden @ weight[start : start + TRL_VOCAB_CHUNK].T).float()
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
            local = labels - start
            inside = (local >= 0) & (local < logits.shape[1])
            value = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            picked = torch.where(inside, value, picked)
        ctx.save_for_backward(hidden, weight, labels, lse)
        return torch.where(labels == IGNORE, 0.0, picked - lse)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        scale = torch.where(labels == IGNORE, 0.0, upstream[0])[:, None]
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, device=weight.device)
        for start in range(0, weight.shape[0], TRL_VOCAB_CHUNK):
            chunk = weight[start : start + TRL_VOCAB_CHUNK]
            grad = (hidden @ chunk.T).float().sub_(lse[:, None]).exp_().neg_()
            local = labels - start
            rows = ((local >= 0) & (local < chunk.shape[0])).nonzero()[:, 0]
            grad[rows, local[rows]] += 1.0
            grad = grad.mul_(scale).to(hidden.dtype)
            grad_hidden += grad @ chunk
            grad_weight[start : start + TRL_VOCAB_CHUNK] += grad.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


def _trl_style(case: Case) -> Function:
    return lambda x: _VocabularyChunks.apply(x.hidden, x.weight, x.labels)


def _on_a_gpu() -> list[Implementation]:
    """Those that need one, or have kernels of their own for one."""
    found = [
        Implementation("Cut Cross-Entropy", op, _cut_cross_entropy(impl), note=f"impl={impl!r}")
        for op, impl in (("cross_entropy", "cce"), ("logprob", "cce"), ("score", "cce"))
    ]
    exact = _cut_cross_entropy("cce_exact")
    found.insert(
        1,
        Implementation(
            "Cut Cross-Entropy exact", "cross_entropy", exact, note="impl='cce_exact': no filter"
        ),
    )
    return [*found, Implementation("quack chunked", "cross_entropy", _quack)]


def peers(device: str = "cpu") -> list[Implementation]:
    """Every peer of the operations without teachers, in the order of the table."""
    training = ("cross_entropy", "logprob")
    found = [Implementation("dense eager", op, dense) for op in (*training, "score")]
    if device == "cuda":
        found.append(Implementation("dense torch.compile", "score", compiled_dense, compiled=True))
    for op in training:
        found += [
            Implementation("dense torch.compile", op, compiled_dense, compiled=True),
            Implementation(
                "F.linear_cross_entropy",
                op,
                _torch_linear_cross_entropy,
                largest=1e10,
                note="default options",
            ),
        ]
    if device == "cuda":
        found += _on_a_gpu()
    else:
        # Its kernel needs a GPU; on a CPU it compiles the dense computation with dynamic shapes.
        compiles = _cut_cross_entropy("torch_compile")
        note = "impl='torch_compile'"
        found.append(
            Implementation("Cut Cross-Entropy", "cross_entropy", compiles, compiled=True, note=note)
        )
    found.append(Implementation("Liger fused", "cross_entropy", _liger_fused))
    found.append(
        Implementation(
            "Liger chunked",
            "cross_entropy",
            _liger_chunked,
            compiled=True,
            note="its preference-loss chunking with a likelihood loss",
        )
    )
    found.append(Implementation("torchtune-style chunks", "cross_entropy", _torchtune_style))
    found.append(Implementation("TRL-style chunks", "logprob", _trl_style, gemms=8))
    return found
