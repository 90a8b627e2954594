"""Rewards of groups, and listwise losses enumerated independently of the library's."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def rewards(groups, n, spread=1.5, dtype=torch.float64):
    return (torch.randn(groups, n, dtype=torch.float64) * spread).to(dtype)


def ranking_probability(x: Tensor, orders) -> Tensor:
    """Probability of each ranking in ``orders`` [..., n]."""
    orders = torch.tensor(orders)
    probability = torch.ones(orders.shape[:-1], dtype=x.dtype)
    for place in range(orders.shape[-1]):
        probability = probability * torch.softmax(x[orders[..., place:]], -1)[..., 0]
    return probability


def oracle(kind: str, s: Tensor, t: Tensor) -> Tensor:
    """Loss of one group, differentiable in s."""
    n = len(s)
    if kind == "ranking":
        best = sorted(range(n), key=lambda i: (-t[i].item(), i))
        return -ranking_probability(s, best).log()
    if kind == "top1":
        p, q = torch.softmax(s, 0), torch.softmax(t, 0)
        return (q * (q / p).log()).sum()
    orders = list(itertools.permutations(range(n)))
    p, q = ranking_probability(s, orders), ranking_probability(t, orders)
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    return {
        "kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: (kl(p, m) + kl(q, m)) / 2,
        "jsd_released": lambda: (kl(m, p) + kl(m, q)) / 2,
    }[kind]()


def value_and_grad(function, s):
    s = s.detach().clone().requires_grad_()
    value = function(s)
    (grad,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), grad


def expected(kind, s, t):
    return value_and_grad(
        lambda x: torch.stack([oracle(kind, *g) for g in zip(x, t, strict=True)]), s
    )


def close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)
