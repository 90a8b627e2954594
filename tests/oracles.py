"""What the engine is compared with: dense computations written out anew, and the accuracy rule.

``ORACLE`` is the whole thing in float64; float64 inputs are judged by extended.py. ``dense`` is the
careful computation that a PyTorch user would write in the inputs' own dtype: the matrix product in
that dtype, bias, soft cap, softmax and loss in float32 (float64 for float64), gradients by
autograd. Nothing of the engine is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: DESIGN's factors: a value may be twice, a gradient three times as wrong as the dense computation.
VALUES, GRADIENTS = 2, 3


@dataclass
class Dense:
    """A dense LM head: leaves in ``product`` dtype, everything after the product in ``working``."""

    product: torch.dtype
    working: torch.dtype

    def logits(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> Tensor:
        """Logits [N, V] in the working dtype."""
        z = (hidden.reshape(-1, hidden.shape[-1]) @ weight.T).to(self.working)
        if bias is not None:
            z = z + bias.to(self.working)
        z = z * logit_scale
        if softcap is not None:
            z = torch.tanh(z / softcap) * softcap
        return (z / temperature)[:, :vocab_size]

    def leaf(self, x: Tensor | None, grad: bool = True) -> Tensor | None:
        """A tensor of this computation, detached from the one given."""
        if x is None:
            return None
        return x.detach().to(self.product).clone().requires_grad_(grad)


ORACLE = Dense(torch.float64, torch.float64)


def dense(dtype: torch.dtype) -> Dense:
    """The careful computation in ``dtype``."""
    return Dense(dtype, torch.float64 if dtype == torch.float64 else torch.float32)


# --- formulas over logits [N, V], per token ---


def expectation(logprob: Tensor, factor: Tensor) -> Tensor:
    """sum exp(logprob) * factor over the vocabulary, an outcome without probability counting 0."""
    empty = logprob == -torch.inf
    return (
        (logprob.masked_fill(empty, 0.0).exp() * factor.masked_fill(empty, 0.0))
        .masked_fill(empty, 0.0)
        .sum(-1)
    )


def logprob_of(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probs [N, k] at ids [N, k]."""
    return F.log_softmax(z, -1).gather(1, ids)


def entropy(z: Tensor) -> Tensor:
    logprob = F.log_softmax(z, -1)
    return -expectation(logprob, logprob)


def cross_entropy(
    z: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Per-token loss [N]; labels are all in range."""
    logprob = F.log_softmax(z, -1)
    nll = -logprob.gather(1, labels[:, None])[:, 0]
    loss = (1 - label_smoothing) * nll
    if label_smoothing:
        loss = loss - label_smoothing * logprob.mean(-1)
    return loss + z_loss * torch.logsumexp(z, -1) ** 2 if z_loss else loss


def _log_mixture(over: Tensor, under: Tensor, weight: float) -> Tensor:
    """log(weight over + (1 - weight) under), finite where neither has any probability."""
    both = torch.stack((over + math.log(weight), under + math.log(1 - weight)))
    return torch.logsumexp(both.masked_fill(both == -torch.inf, -1e30), 0)


def divergence(kind: str, alpha: float, s: Tensor, t: Tensor) -> Tensor:
    """Between distributions given as log-probs [N, outcomes] of student and teacher."""
    if kind == "forward_kl":
        return expectation(t, t - s)
    if kind == "reverse_kl":
        return expectation(s, s - t)
    if kind == "tvd":
        return (s.exp() - t.exp()).abs().sum(-1) / 2
    if kind == "skew_reverse_kl":
        return expectation(s, s - _log_mixture(t, s, 1 - alpha))
    m = _log_mixture(t, s, alpha)
    if kind == "skew_forward_kl":
        return expectation(t, t - m)
    return alpha * expectation(t, t - m) + (1 - alpha) * expectation(s, s - m)


def between(kind: str, alpha: float, zs: Tensor, zt: Tensor) -> Tensor:
    """Divergence between the softmaxes of logits [N, V]."""
    return divergence(kind, alpha, F.log_softmax(zs, -1), F.log_softmax(zt, -1))


def topk_divergence(f: Any, z: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Over k + 1 outcomes; the student's tail is what is left of 1, or a sum if that is little."""
    student = F.log_softmax(z, -1)
    mass = student.gather(1, ids).exp().sum(1, keepdim=True)
    rest = torch.logsumexp(student.scatter(1, ids, -torch.inf), -1, keepdim=True)
    tail = torch.where(mass < 0.5, torch.log1p(-mass.clamp(max=0.5)), rest)
    # What is left of 1 has as many digits as the inputs allow.
    rest = (1 - logprobs.double().exp().sum(1, keepdim=True)).clamp(min=0)
    teacher = torch.cat((logprobs.to(z.dtype), rest.log().to(z.dtype)), 1)
    return divergence(f.kind, f.alpha, torch.cat((student.gather(1, ids), tail), 1), teacher)


def advantage(zs: Tensor, over: Tensor, under: Tensor) -> Tensor:
    """The student's mean of log(over / under)."""
    return expectation(F.log_softmax(zs, -1), F.log_softmax(over, -1) - F.log_softmax(under, -1))


def topk_advantage(z: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return (F.softmax(z, -1).gather(1, ids) * values.to(z.dtype)).sum(1)


#: name in the registry -> values [outputs, N] from (parameters, logits of every stream, inputs)
FORMULAS: dict[str, Callable[[Any, list[Tensor], Mapping[str, Tensor]], Tensor]] = {
    "LogProb": lambda f, z, x: logprob_of(z[0], x[f.ids]).T,
    "Entropy": lambda f, z, x: entropy(z[0])[None],
    "LogSumExp": lambda f, z, x: torch.logsumexp(z[0], -1)[None],
    "SquaredLogSumExp": lambda f, z, x: torch.logsumexp(z[0], -1)[None] ** 2,
    "LogitSum": lambda f, z, x: z[0].sum(-1)[None],
    "ForwardKL": lambda f, z, x: between("forward_kl", 0, z[0], z[f.teacher])[None],
    "ReverseKL": lambda f, z, x: between("reverse_kl", 0, z[0], z[f.teacher])[None],
    "Divergence": lambda f, z, x: between(f.kind, f.alpha, z[0], z[f.teacher])[None],
    "Advantage": lambda f, z, x: advantage(z[0], z[f.aligned], z[f.reference])[None],
    "TopKDivergence": lambda f, z, x: topk_divergence(
        f, z[0], x["teacher_ids"], x["teacher_logprobs"]
    )[None],
    "TopKAdvantage": lambda f, z, x: topk_advantage(
        z[0], x["advantage_ids"], x["advantage_values"]
    )[None],
}


# --- one head, every op ---


@dataclass
class OneHead:
    """Inputs of a one-head op: tensors, labels, head options, and upstream gradients."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ignore_index: int = -100

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def vocab(self) -> int:
        return self.options.get("vocab_size", self.weight.shape[0])

    def leaves(self) -> list[Tensor]:
        """Fresh leaves (hidden, weight, bias) with the very strides of the inputs."""
        tensors = [self.hidden, self.weight, self.bias]
        return [x.detach().requires_grad_() for x in tensors if x is not None]

    def ours(self, op: Callable[..., Any], *args: Any, **more: Any) -> tuple[list[Tensor], Any]:
        """Call a public op on fresh leaves; returns them and its output."""
        leaves = self.leaves()
        bias = {"bias": leaves[2]} if len(leaves) > 2 else {}
        return leaves, op(*leaves[:2], *args, **bias, **self.options, **more)

    def compute(
        self, how: Dense, values: Callable[[Tensor, Tensor], Tensor], upstream: Tensor
    ) -> list[Tensor]:
        """[values, gradients...] of a dense computation.

        ``values(logits, labels)`` maps the rows that count to [outputs, rows]; ignored rows hold 0.
        ``upstream`` [outputs, N] is the gradient of the values.
        """
        leaves = [how.leaf(x) for x in (self.hidden, self.weight, self.bias)]
        z = how.logits(*leaves, **self.options)
        flat = self.labels.reshape(-1)
        kept = flat != self.ignore_index
        found = torch.zeros(upstream.shape, dtype=how.working)
        if kept.any():
            live = values(z[kept], flat[kept])
            found = found.index_put((torch.arange(len(found))[:, None], kept.nonzero().T), live)
        wanted = [x for x in leaves if x is not None]
        # The zero keeps every leaf in the graph where no row counts.
        total = (torch.where(kept, found * upstream.to(how.working), 0.0)).sum() + 0.0 * sum(
            x.nan_to_num(0.0, 0.0, 0.0).sum() for x in wanted
        )
        return [found.detach(), *torch.autograd.grad(total, wanted)]


# --- the accuracy rule ---


#: A tensor, or its (high, low) parts.
Oracle = Tensor | tuple[Tensor, Tensor]


def _error(found: Tensor, reference: Tensor, low: Tensor, finite: Tensor) -> float:
    difference = (found.double() - reference - low).where(finite, 0.0)
    return float(difference.nan_to_num(0.0, 0.0, 0.0).norm())


def parts_of(oracle: Oracle, like: Tensor) -> tuple[Tensor, Tensor]:
    """An oracle as (high, low) parts of the shape and on the device of ``like``."""
    parts = oracle if isinstance(oracle, tuple) else (oracle, torch.zeros_like(oracle))
    high, low = (x.detach().to(like.device).double().reshape(like.shape) for x in parts)
    return high, low


def assert_sum_accurate(
    ours: Tensor, oracle: Oracle, careful: Tensor, *, dtype: torch.dtype
) -> None:
    """The rule for a sum, given the summands of the oracle and of the careful computation.

    The error of one number may be 0 by luck. What a sum of such summands is off by is the norm of
    their errors.
    """
    high, low = parts_of(oracle, careful)
    finite = high.isfinite()
    if not finite.all():
        assert float(ours) == float(high.sum()), "another infinity than the oracle"
        return
    error = abs(float(ours.double() - high.sum() - low.sum()))
    dense_error = _error(careful, high, low, finite)
    floor = torch.finfo(dtype).eps * abs(float(high.sum()))
    assert error <= VALUES * max(dense_error, floor), (
        f"sum: error {error:.3g} over {VALUES} max(dense {dense_error:.3g}, eps |ref| {floor:.3g})"
    )


def assert_accurate(
    ours: Tensor,
    oracle: Oracle,
    careful: Tensor,
    *,
    k: int,
    dtype: torch.dtype,
    what: str = "value",
) -> None:
    """error(ours) <= k * max(error(careful), eps(dtype) * |oracle|), errors against the oracle.

    By norm, over the entries where the oracle is finite; where it is not, ours must be the same
    infinity. ``dtype`` is the inputs'. An oracle may come as its (high, low) parts.
    """
    high, low = parts_of(oracle, ours)
    ours, careful = ours.detach().double(), careful.detach()
    finite = high.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{what}: finite in other places than the oracle"
    assert torch.equal(ours[~finite], high[~finite]), f"{what}: other infinities than the oracle"
    error = _error(ours, high, low, finite)
    dense_error = _error(careful, high, low, finite)
    floor = torch.finfo(dtype).eps * float(high.where(finite, 0.0).norm())
    assert error <= k * max(dense_error, floor), (
        f"{what}: error {error:.3g} over {k} max(dense {dense_error:.3g}, eps |ref| {floor:.3g})"
    )


def assert_all_accurate(
    ours: Sequence[Tensor],
    oracle: Sequence[Oracle],
    careful: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """The rule for [values, gradients...]; gradients also come in their parameter's dtype.

    A 0-d value is the sum of the oracle's values.
    """
    assert len(ours) == len(oracle) == len(careful)
    names = ["value", "d_hidden", "d_weight", "d_bias"]
    for i, (a, b, c) in enumerate(zip(ours, oracle, careful, strict=True)):
        if i:
            assert a.dtype == dtype, f"{names[i]}: dtype {a.dtype}, expected {dtype}"
        if a.dim() == 0:
            assert_sum_accurate(a, b, c, dtype=dtype)
            continue
        k = GRADIENTS if i else VALUES
        assert_accurate(a, b, c.reshape(a.shape), k=k, dtype=dtype, what=names[i])


def assert_by_norm(got: Tensor, exact: Tensor, dense: Tensor, k: int, least: float) -> None:
    """The accuracy rule for a tensor: k times the dense error, or ``least`` of its size."""
    room = max((dense - exact).norm(), least * exact.norm())
    assert (got - exact).norm() <= k * room
