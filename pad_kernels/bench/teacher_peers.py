"""What users have today for losses against teachers; like :mod:`pad_kernels.bench.peers`.

As there, "-style" marks what a trainer carries inside itself and is re-made here in its spirit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pad_kernels.bench.cases import IGNORE, OPS, Case, Inputs
from pad_kernels.bench.implementations import Function, Implementation, Unavailable
from pad_kernels.bench.peers import TORCHTUNE_CHUNKS, compiled_dense, dense, need_compiler


def _mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of per-token values [N] over the tokens that have a label."""
    active = labels != IGNORE
    return values.masked_fill(~active, 0.0).sum() / active.sum()


def _logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1)


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Per token, of log-probs [n, V]."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _teachers(x: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [_logprobs(hidden, weight) for hidden, weight in x.teachers]


def _dense_forward_kl(x: Inputs) -> Tensor:
    return _mean(_forward_kl(_logprobs(x.hidden, x.weight), *_teachers(x)), x.labels)


def _dense_jsd(x: Inputs) -> Tensor:
    (teacher,), student = _teachers(x), _logprobs(x.hidden, x.weight)
    mixture = torch.logaddexp(student, teacher) - math.log(2.0)
    both = _forward_kl(mixture, teacher) + _forward_kl(mixture, student)
    return _mean(both / 2, x.labels)


def _dense_advantage(x: Inputs) -> Tensor:
    aligned, reference = _teachers(x)
    advantage = aligned.sub_(reference)
    probs = F.linear(x.hidden, x.weight).float().softmax(-1)
    return _mean((probs * advantage).sum(-1), x.labels)


def _dense_distill(x: Inputs) -> Tensor:
    (teacher,), student = _teachers(x), _logprobs(x.hidden, x.weight)
    divergence = _mean(_forward_kl(student, teacher), x.labels)
    return F.nll_loss(student, x.labels, ignore_index=IGNORE) + divergence


_DENSE: dict[str, Function] = {
    "forward_kl": _dense_forward_kl,
    "jsd": _dense_jsd,
    "advantage": _dense_advantage,
    "distill": _dense_distill,
}


def dense_with_teachers(case: Case) -> Function:
    """All logits of all heads at once: GEMM in the input dtype, softmax and loss in float32."""
    return _DENSE[case.op]


def _torchtune_style(case: Case) -> Function:
    """A fixed number of token chunks, the loss of each, all of them inside autograd.

    The teacher's logits of all tokens come first, as a model's forward pass leaves them. Its
    entropy is part of the value here; torchtune's leaves out that constant.
    """

    def function(x: Inputs) -> Tensor:
        ((teacher_hidden, teacher_weight),) = x.teachers
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher_weight)
        total = torch.zeros((), device=x.hidden.device)
        pieces = (x.hidden, teacher_logits, x.labels)
        for hidden, logits, labels in zip(
            *(piece.chunk(TORCHTUNE_CHUNKS) for piece in pieces), strict=True
        ):
            student = _logprobs(hidden, x.weight)
            divergence = _forward_kl(student, logits.float().log_softmax(-1))
            total = total + divergence.masked_fill(labels == IGNORE, 0.0).sum()
            if case.op == "distill":
                total = total + F.nll_loss(student, labels, ignore_index=IGNORE, reduction="sum")
        return total / (x.labels != IGNORE).sum()

    return function


def _trl_style(case: Case) -> Function:
    """Generalised JSD of whole logits, in the dtype in which the models leave them."""

    def function(x: Inputs) -> Tensor:
        ((teacher_hidden, teacher_weight),) = x.teachers
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_weight).log_softmax(-1)
        student = F.linear(x.hidden, x.weight).log_softmax(-1)
        halves = torch.stack([student, teacher]) - math.log(2.0)
        mixture = halves.logsumexp(0)
        both = [F.kl_div(mixture, p, reduction="none", log_target=True) for p in (teacher, student)]
        active = x.labels != IGNORE
        return (0.5 * both[0] + 0.5 * both[1])[active].sum() / active.sum()

    return function


def _liger_chunked(case: Case) -> Function:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Unavailable(f"not installed ({error}); pip install 'pad-kernels[peers]'") from error
    need_compiler()
    # beta = 0 is its name for the forward KL.
    settings: dict[str, Any] = {
        "weight_hard_loss": float(case.op == "distill"),
        "weight_soft_loss": 1.0,
        "beta": 0.5 if case.op == "jsd" else 0.0,
        "ignore_index": IGNORE,
    }
    module = LigerFusedLinearJSDLoss(**settings)

    def function(x: Inputs) -> Tensor:
        ((hidden, weight),) = x.teachers
        loss: Tensor = module(x.hidden, x.weight, hidden, weight, x.labels)
        return loss

    return function


def peers() -> list[Implementation]:
    """Every peer of the operations with teachers, in the order of the table."""
    found = []
    for op in (op.name for op in OPS.values() if op.teachers):
        found.append(Implementation("dense eager", op, dense))
        found.append(Implementation("dense torch.compile", op, compiled_dense, compiled=True))
        if op in ("jsd", "distill"):
            found.append(
                Implementation(
                    "Liger chunked",
                    op,
                    _liger_chunked,
                    compiled=True,
                    note="LigerFusedLinearJSDLoss, its default chunks of 1024 tokens",
                )
            )
        if op in ("forward_kl", "distill"):
            found.append(Implementation("torchtune-style chunks", op, _torchtune_style))
        if op == "jsd":
            found.append(Implementation("TRL-style dense", op, _trl_style))
    return found
