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
ROWS = 128


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


def oracle(case: Case, inputs: Inputs) -> Reference:
    """Float64 values and gradients, written out by hand and row block by row block.

    Per token log p = z_y − logsumexp(z); its gradient with respect to the logits, for an upstream
    gradient c, is c·(1[v = y] − softmax(z)_v). Mean cross-entropy is c = −1/count, summed.
    """
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    labels, active = inputs.labels, inputs.labels != IGNORE
    if case.op == "cross_entropy":
        coefficient = active.double() / -active.sum()
    else:
        coefficient = inputs.upstream.double() * active
    logprob = torch.zeros(labels.shape, dtype=torch.float64, device=hidden.device)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, hidden.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        picks = labels[rows].clamp(min=0)[:, None]
        z = hidden[rows] @ weight.T
        z -= z.logsumexp(-1, keepdim=True)
        logprob[rows] = z.gather(1, picks)[:, 0] * active[rows]
        if OPS[case.op].backward:
            c = coefficient[rows, None]
            grad = z.exp_().mul_(-c).scatter_add_(1, picks, c)
            grad_hidden[rows] = grad @ weight
            grad_weight.addmm_(grad.T, hidden[rows])
    value = (logprob * coefficient).sum() if case.op == "cross_entropy" else logprob
    tensors = {"value": value}
    if OPS[case.op].backward:
        tensors |= {"grad_hidden": grad_hidden, "grad_weight": grad_weight}
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
