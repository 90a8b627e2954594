"""The trainers' losses written out over dense logits, and a plain training loop.

Nothing here is shared with the trainers: one sequence at a time, without padding, the model's own
logits in float32, and each published formula in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trainer_toys import logits, logprobs

Row = dict[str, Any]
Loss = Callable[[list[Row]], Tensor]


def train(
    model: Any, rows: list[Row], loss_of: Loss, *, steps: int, batch: int, rate: float
) -> list[float]:
    """Losses of plain gradient descent over the rows in order, again and again."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.5)
    losses = []
    for step in range(steps):
        start = step * batch % len(rows)
        loss = loss_of(rows[start : start + batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def supervised(model: Any, rows: list[Row], column: str = "chosen") -> Tensor:
    return -torch.cat([logprobs(model, row["prompt"], row[column]) for row in rows]).mean()


def ranking_distribution(rewards: Tensor) -> Tensor:
    """Log-probability of each of the n! rankings."""
    found = []
    for order in permutations(range(len(rewards))):
        ranked = rewards[list(order)]
        found.append(sum(r - torch.logsumexp(ranked[i:], 0) for i, r in enumerate(ranked)))
    return torch.stack(found)


def listwise(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    if kind == "ranking":
        ranked = student[teacher.argsort(descending=True)]
        return -sum(r - torch.logsumexp(ranked[i:], 0) for i, r in enumerate(ranked))
    s, t = ranking_distribution(student), ranking_distribution(teacher)
    if kind == "kl":
        return (t.exp() * (t - s)).sum()
    assert kind == "jsd"
    m = torch.logaddexp(s, t) - math.log(2)
    return 0.5 * (s.exp() * (s - m)).sum() + 0.5 * (t.exp() * (t - m)).sum()


def pad(model: Any, beta: float, kind: str = "jsd", teacher: Any = None) -> Loss:
    def loss(rows: list[Row]) -> Tensor:
        found = []
        for row in rows:
            ours = [logprobs(model, row["prompt"], y).mean() for y in row["responses"]]
            if teacher is None:
                theirs = torch.tensor(row["rewards"])
            else:
                with torch.no_grad():
                    means = [logprobs(teacher, row["prompt"], y).mean() for y in row["responses"]]
                    theirs = torch.stack(means)
            found.append(listwise(beta * torch.stack(ours), beta * theirs, kind))
        return torch.stack(found).mean()

    return loss


def forward_kl(model: Any, teacher: Any, rows: list[Row], column: str) -> Tensor:
    """Mean over the tokens of a column, of the vocabulary that both have."""
    found = []
    for row in rows:
        ours, theirs = (logits(each, row["prompt"], row[column]) for each in (model, teacher))
        size = min(ours.shape[1], theirs.shape[1])
        ours, theirs = ours[:, :size], theirs[:, :size].detach()
        p = theirs.softmax(-1)
        found.append((p * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1))
    return torch.cat(found).mean()


def dckd(model: Any, teacher: Any, alpha: float, columns: tuple[str, ...]) -> Loss:
    def loss(rows: list[Row]) -> Tensor:
        divergence = sum(forward_kl(model, teacher, rows, column) for column in columns)
        return supervised(model, rows) + alpha * divergence

    return loss


def adpa(model: Any, aligned: Any, reference: Any, gamma: float, beta: float) -> Loss:
    def loss(rows: list[Row]) -> Tensor:
        found = []
        for row in rows:
            for response in row["responses"]:
                s, d, r = (
                    logits(each, row["prompt"], response).log_softmax(-1)
                    for each in (model, aligned, reference)
                )
                found.append((s.exp() * beta * (d - r).detach()).sum(-1))
        return supervised(model, rows) - gamma * torch.cat(found).mean()

    return loss


def _of(model: Any, rows: list[Row], column: str, mean: bool = False) -> Tensor:
    each = [logprobs(model, row["prompt"], row[column]) for row in rows]
    return torch.stack([x.mean() if mean else x.sum() for x in each])


def dpo(model: Any, reference: Callable[[list[Row], str], Tensor], kind: str = "dpo") -> Loss:
    """DPO, or IPO, which takes means; beta = 0.1."""

    def loss(rows: list[Row]) -> Tensor:
        ratios = []
        for column in ("chosen", "rejected"):
            ratio = _of(model, rows, column) - reference(rows, column)
            if kind == "ipo":
                ratio = ratio / torch.tensor([len(row[column]) for row in rows])
            ratios.append(ratio)
        gap = ratios[0] - ratios[1]
        if kind == "ipo":
            return (gap - 1 / (2 * 0.1)).square().mean()
        return -F.logsigmoid(0.1 * gap).mean()

    return loss


def sums_under(reference: Any) -> Callable[[list[Row], str], Tensor]:
    @torch.no_grad()
    def sums(rows: list[Row], column: str) -> Tensor:
        return _of(reference, rows, column)

    return sums


def simpo(model: Any) -> Loss:
    """beta = 2, gamma = 0.5, the margin after beta."""

    def loss(rows: list[Row]) -> Tensor:
        gap = _of(model, rows, "chosen", True) - _of(model, rows, "rejected", True)
        return -F.logsigmoid(2.0 * gap - 0.5).mean()

    return loss


def orpo(model: Any) -> Loss:
    """beta = 0.1; the NLL is a mean over the batch's chosen tokens."""

    def loss(rows: list[Row]) -> Tensor:
        up, down = _of(model, rows, "chosen", True), _of(model, rows, "rejected", True)
        odds = (up - down) - (torch.log1p(-up.exp()) - torch.log1p(-down.exp()))
        return supervised(model, rows) - 0.1 * F.logsigmoid(odds).mean()

    return loss


def cpo(model: Any) -> Loss:
    """beta = 0.1, NLL weight 0.5."""

    def loss(rows: list[Row]) -> Tensor:
        gap = _of(model, rows, "chosen") - _of(model, rows, "rejected")
        return -F.logsigmoid(0.1 * gap).mean() + 0.5 * supervised(model, rows)

    return loss


def kto(model: Any, reference: Any, every: list[Row]) -> Loss:
    """beta = 0.1; a row's unrelated response is that of the row before it in the data set."""

    def loss(rows: list[Row]) -> Tensor:
        mixed = [
            {"prompt": row["prompt"], "completion": every[every.index(row) - 1]["completion"]}
            for row in rows
        ]
        with torch.no_grad():
            ratio = _of(model, mixed, "completion") - _of(reference, mixed, "completion")
            point = ratio.mean().clamp(min=0)
        ratio = _of(model, rows, "completion") - sums_under(reference)(rows, "completion")
        good = torch.tensor([row["label"] for row in rows])
        signed = torch.where(good, ratio - point, point - ratio)
        return (1 - torch.sigmoid(0.1 * signed)).mean()

    return loss
