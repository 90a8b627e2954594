"""Exact listwise losses and gradients in plain torch: the twin of ``csrc/listwise.h``.

Every function takes rewards of groups that all have n responses, float64, and returns the loss of
each group and its gradient with respect to the student's rewards. Sets of responses are bit masks.
Formulas and their sources: docs/math.md.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Elements of one temporary: 1 MiB of float64, so that a block's arithmetic stays in cache.
_BLOCK = 1 << 17
#: Sets in a block, whatever the number of groups: keeps one group at n = 16 far below 4 MiB.
_BLOCK_SETS = 1 << 10


def solve(kind: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [groups] and gradient [groups, n] of one kind."""
    solvers: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "kl": kl,
        "reverse_kl": reverse_kl,
        "jsd": functools.partial(jsd, released=False),
        "jsd_released": functools.partial(jsd, released=True),
        "ranking": ranking,
        "top1": top1,
    }
    return solvers[kind](student, teacher)


def top1(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL between the distributions of the response ranked first (ListNet's top-one model)."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    t = log_t.exp()
    return (t * (log_t - log_s)).sum(-1), log_s.exp() - t


def ranking(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """−log P_student of the teacher's ranking; equal teacher rewards rank by index."""
    n = teacher.shape[-1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=teacher.device).tril(-1)
    here, there = teacher[:, :, None], teacher[:, None, :]
    place = ((there > here) | ((there == here) & earlier)).sum(-1)
    order = place.argsort(-1)
    s = student.gather(-1, order)
    left = s.flip(-1).logcumsumexp(-1).flip(-1)  # log-sum-exp of what is still to be ranked
    grad = (s + (-left).logcumsumexp(-1)).exp() - 1.0
    return (left - s).sum(-1), torch.empty_like(grad).scatter_(-1, order, grad)


def _subset_lse(x: Tensor) -> Tensor:
    """Log-sum-exp over every subset, [2^n, groups]; −inf for the empty one.

    Groups are the last dimension of every table over sets: what a set needs of another is then one
    contiguous row, and picking the sets that lack response i is a view.
    """
    n, groups = x.shape
    table = x.new_full((1 << n, groups), -math.inf)
    for i in range(n):
        half = 1 << i
        torch.logaddexp(table[:half], x[i], out=table[half : 2 * half])
    return table


def _with(table: Tensor, i: int) -> Tensor:
    """View of the rows whose set contains response i."""
    return table.view(-1, 2, 1 << i, table.shape[-1])[:, 1]


def _without(table: Tensor, i: int) -> Tensor:
    """View of the rows that ``_with`` leaves out, in the same order but for response i."""
    return table.view(-1, 2, 1 << i, table.shape[-1])[:, 0]


def _levels(n: int, groups: int, device: torch.device) -> list[list[Tensor]]:
    """The sets of 2, 3, ... n − 1 members, each level in blocks of bounded size."""
    sets = torch.arange(1 << n, device=device)
    key = sets.clone()
    for i in range(n):
        key += ((sets >> i) & 1) << n
    levels = key.argsort().split([math.comb(n, k) for k in range(n + 1)])
    block = max(1, min(_BLOCK_SETS, _BLOCK // max(1, groups * n)))
    return [list(level.split(block)) for level in levels[2:n]]


def _choices(sets: Tensor, n: int, members: bool) -> Tensor:
    """Indices of the members (or of the others) of sets that are all of one size, [sets, size]."""
    bits = (sets[:, None] >> torch.arange(n, device=sets.device)) & 1
    return (bits == int(members)).nonzero()[:, 1].view(len(sets), -1)


def _flow(x: Tensor, lse: Tensor) -> Tensor:
    """Probability that each set is, at some point, what is left to rank, [2^n, groups].

    Pulled from the larger sets, level by level, so that no two terms write one entry: the sum is
    the same in every run.
    """
    n, groups = x.shape
    flow = torch.zeros_like(lse)
    flow[-1] = 1.0
    for level in reversed(_levels(n, groups, x.device)):
        for sets in level:
            other = _choices(sets, n, members=False)
            larger = sets[:, None] | (1 << other)
            flow[sets] = (x[other] - lse[larger]).exp_().mul_(flow[larger]).sum(1)
    return flow


def kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P_teacher‖P_student), summed over the sets that are left to rank: n·2ⁿ steps."""
    s, t = student.T.contiguous(), teacher.T.contiguous()
    lse_s, lse_t = _subset_lse(s), _subset_lse(t)
    flow = _flow(t, lse_t)
    loss, grad = torch.zeros_like(s[0]), torch.zeros_like(s)
    for i in range(len(s)):
        log_s, log_t = s[i] - _with(lse_s, i), t[i] - _with(lse_t, i)
        met = _with(flow, i)
        chosen = met * log_t.exp()
        loss += log_t.sub_(log_s).mul_(chosen).sum((0, 1))
        grad[i] = log_s.exp_().mul_(met).sub_(chosen).sum((0, 1))
    return loss, grad.T


def _to_go(x: Tensor, y: Tensor, lse_x: Tensor, lse_y: Tensor) -> Tensor:
    """KL(P_x‖P_y) of ranking what is left, for every set, [2^n, groups]."""
    n, groups = x.shape
    value = torch.zeros_like(lse_x)
    full = torch.full((1,), (1 << n) - 1, device=x.device)
    for level in [*_levels(n, groups, x.device), [full]]:
        for sets in level:
            items = _choices(sets, n, members=True)
            log_x = x[items] - lse_x[sets, None]
            ahead = (
                (log_x - y[items]).add_(lse_y[sets, None]).add_(value[sets[:, None] ^ (1 << items)])
            )
            value[sets] = log_x.exp_().mul_(ahead).sum(1)
    return value


def reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P_student‖P_teacher) by the value-to-go recursion; the gradient by the flow back."""
    s, t = student.T.contiguous(), teacher.T.contiguous()
    lse_s, lse_t = _subset_lse(s), _subset_lse(t)
    value = _to_go(s, t, lse_s, lse_t)
    flow = _flow(s, lse_s)
    grad = torch.zeros_like(s)
    for i in range(len(s)):
        log_s = s[i] - _with(lse_s, i)
        ahead = (log_s - t[i]).add_(_with(lse_t, i)).add_(_without(value, i)).sub_(_with(value, i))
        grad[i] = log_s.exp_().mul_(_with(flow, i)).mul_(ahead).sum((0, 1))
    return value[-1].clone(), grad.T


@functools.lru_cache(maxsize=16)
def _half_orders(n: int, first: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orders of the first or last half of a ranking, for each split of n responses in two.

    Returns:
        The response chosen and the set it is chosen from, both [splits, orders, length]; the last
        half's first set is the split itself.
    """
    full = (1 << n) - 1
    chosen, left = [], []
    for last in itertools.combinations(range(n), n // 2):
        members = [i for i in range(n) if i not in last] if first else list(last)
        start = full if first else sum(1 << i for i in last)
        for order in itertools.permutations(members):
            gone = [sum(1 << i for i in order[:k]) for k in range(len(order))]
            chosen.append(order)
            left.append([start ^ g for g in gone])
    shape = (math.comb(n, n // 2), -1, len(chosen[0]))
    return (
        torch.tensor(chosen, device=device).view(shape),
        torch.tensor(left, device=device).view(shape),
    )


def _half_logprob(x: Tensor, lse: Tensor, half: tuple[Tensor, Tensor]) -> Tensor:
    """Log-probability of each half ranking, [splits, orders, groups]."""
    chosen, left = half
    return (x[chosen] - lse[left]).sum(2)


def _leaf_terms(log_p: Tensor, log_q: Tensor, released: bool) -> tuple[Tensor, Tensor]:
    """What each ranking adds to the loss, and what multiplies ∇log P_student there."""
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2.0))
    if not released:
        weight = log_p.exp().mul_(log_p - log_m).mul_(0.5)
        return log_q.exp().mul_(log_q - log_m).mul_(0.5).add_(weight), weight
    gap = log_m - 0.5 * (log_p + log_q)
    mean = log_m.exp_()
    return mean * gap, log_p.exp().mul_(gap).sub_(mean).mul_(0.5)


def _add_visits(visits: Tensor, half: tuple[Tensor, Tensor], weight: Tensor) -> None:
    """Add the weight of the rankings that meet each set to ``visits`` [2^n, groups].

    At one position all sets have one size and are met equally often, so sorting by set turns the
    sum into a gather: no atomics on any device.
    """
    left, flat = half[1].flatten(0, 1), weight.flatten(0, 1)
    for position in range(left.shape[1]):
        met = left[:, position]
        distinct = met.unique()
        order = (met * len(met) + torch.arange(len(met), device=met.device)).argsort()
        visits[distinct] = flat[order.view(len(distinct), -1)].sum(1)


def jsd(student: Tensor, teacher: Tensor, *, released: bool) -> tuple[Tensor, Tensor]:
    """Jensen–Shannon divergence over the n! rankings, without an array of n! elements.

    A ranking is an order of its first half and one of its second, and a half's log-probability
    depends on the other only through which responses are in it. So for each way to split the
    responses the two halves' orders meet in a small table (24 × 24 at n = 8), a bounded batch of
    splits at a time.
    A ranking's weight w adds w·(1 − Σ softmax_R(s)) to the gradient, R the sets that it meets.
    """
    s, t = student.T.contiguous(), teacher.T.contiguous()
    n, groups = s.shape
    lse_s, lse_t = _subset_lse(s), _subset_lse(t)
    first, last = _half_orders(n, True, s.device), _half_orders(n, False, s.device)
    first_s, last_s = _half_logprob(s, lse_s, first), _half_logprob(s, lse_s, last)
    first_t, last_t = _half_logprob(t, lse_t, first), _half_logprob(t, lse_t, last)
    weight_first, weight_last = torch.empty_like(first_s), torch.empty_like(last_s)
    loss = torch.zeros_like(s[0])
    table = first_s.shape[1] * last_s.shape[1] * groups
    step = max(1, _BLOCK // 4 // max(1, table))
    for start in range(0, len(first_s), step):
        part = slice(start, start + step)
        log_p = first_s[part, :, None] + last_s[part, None]
        log_q = first_t[part, :, None] + last_t[part, None]
        value, weight = _leaf_terms(log_p, log_q, released)
        loss += value.sum((0, 1, 2))
        weight_first[part], weight_last[part] = weight.sum(2), weight.sum(1)
    visits = torch.zeros_like(lse_s)
    _add_visits(visits, first, weight_first)
    _add_visits(visits, last, weight_last)
    through = [(_with(visits, i) * (s[i] - _with(lse_s, i)).exp_()).sum((0, 1)) for i in range(n)]
    return loss, visits[-1, :, None] - torch.stack(through, -1)
