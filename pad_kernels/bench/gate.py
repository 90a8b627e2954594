"""The accuracy gate: what is not accurate is not timed.

An error, by norm against a float64 oracle, may be at most k times the larger of the same-dtype
dense computation's own error and eps(dtype)·‖reference‖; k is 2 for values and 3 for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.bench.cases import DTYPES, IGNORE, OPS, Case, Inputs

FACTORS = {"value": 2.0, "grad_hidden": 3.0, "grad_weight": 3.0}
# Float64 logits of a head, and vocabulary entries of a float64 weight, that exist at a time.
CELLS, BLOCK = 2**23, 16384


@dataclass
class Reference:
    """Float64 results of a case by name: ``value`` and, with a backward pass, the two gradients."""

    tensors: dict[str, Tensor]

    def errors(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Norm of the difference by name, computed in pieces to stay small."""
        return {name: _distance(outputs[name], ref) for name, ref in self.tensors.items()}


def _distance(value: Tensor, reference: Tensor) -> float:
    if value.dim() == 0:
        return abs(value.double() - reference).item()
    pieces = zip(value.split(4096), reference.split(4096), strict=True)
    squares = [(piece.double() - ref).square().sum() for piece, ref in pieces]
    return torch.stack(squares).sum().sqrt().item()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Float64 logits; only a block of the weight is float64 at a time."""
    return torch.cat([hidden @ block.double().T for block in weight.split(BLOCK)], dim=1)


def per_token(op: str, z: Tensor, picks: Tensor, teachers: list[Tensor]) -> Tensor:
    """Values of an operation before any mean, as their definitions have them.

    With s and t the softmaxes of a student and its teacher: forward KL is Σ t log(t/s); the
    Jensen-Shannon divergence ½ Σ t log(t/m) + ½ Σ s log(s/m), m = ½(s + t); the expected advantage
    of a teacher t over a teacher r is Σ s log(t/r).

    Args:
        op: a name from ``OPS``.
        z: [n, V] float64 logits of the student.
        picks: [n] int64 labels in [0, V).
        teachers: [n, V] float64 logits of each.

    Returns:
        [n].
    """
    s, references = z.log_softmax(-1), [t.log_softmax(-1) for t in teachers]
    logprob = s.gather(1, picks[:, None])[:, 0]
    if not references:
        return -logprob if op == "cross_entropy" else logprob
    t = references[0]
    if op == "advantage":
        return (s.exp() * (t - references[1])).sum(-1)
    if op == "jsd":
        m = torch.log(0.5 * s.exp() + 0.5 * t.exp())
        return 0.5 * (t.exp() * (t - m)).sum(-1) + 0.5 * (s.exp() * (s - m)).sum(-1)
    divergence = (t.exp() * (t - s)).sum(-1)
    return divergence if op == "forward_kl" else divergence - logprob


def oracle(case: Case, inputs: Inputs) -> Reference:
    """Float64 values and gradients, row block by row block.

    Autograd sees only the step from logits to values, of :func:`per_token`; the products around it
    are written out, and no weight is float64 as a whole.
    """
    op, weight, active = OPS[case.op], inputs.weight.detach(), inputs.labels != IGNORE
    hidden = inputs.hidden.detach().double()
    coefficient = active / active.sum() if op.mean else inputs.upstream * active
    values = torch.zeros(case.tokens, dtype=torch.float64, device=hidden.device)
    tensors = {"value": values}
    if op.backward:
        tensors |= {"grad_hidden": torch.zeros_like(hidden)}
        tensors |= {"grad_weight": torch.zeros_like(weight, dtype=torch.float64)}
    step = max(1, CELLS // case.vocab)
    for start in range(0, case.tokens, step):
        rows = slice(start, start + step)
        z = _logits(hidden[rows], weight).requires_grad_(op.backward)
        teachers = [_logits(h[rows].double(), w) for h, w in inputs.teachers]
        found = per_token(case.op, z, inputs.labels[rows].clamp(min=0), teachers)
        values[rows] = found.detach() * active[rows]
        if op.backward:
            (grad,) = torch.autograd.grad(found, z, coefficient[rows].double())
            for a in range(0, case.vocab, BLOCK):
                part = grad[:, a : a + BLOCK]
                tensors["grad_hidden"][rows] += part @ weight[a : a + BLOCK].double()
                tensors["grad_weight"][a : a + BLOCK].addmm_(part.T, hidden[rows])
    if op.mean:
        tensors["value"] = values.sum() / active.sum()
    return Reference(tensors)


def outputs_of(value: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """What a step left behind, by the oracle's names."""
    found = {"value": value}
    if inputs.hidden.grad is not None and inputs.weight.grad is not None:
        found |= {"grad_hidden": inputs.hidden.grad, "grad_weight": inputs.weight.grad}
    return found


def bounds(case: Case, reference: Reference, dense_errors: dict[str, float]) -> dict[str, float]:
    """The largest error that passes, by name."""
    eps = torch.finfo(DTYPES[case.dtype]).eps
    return {
        name: FACTORS[name] * max(dense_errors[name], eps * ref.norm().item())
        for name, ref in reference.tensors.items()
    }


def failures(errors: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """One sentence per name whose error is over its bound; NaN is over every bound."""
    return [
        f"{name}: error {error:.3g}, allowed {allowed[name]:.3g}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
