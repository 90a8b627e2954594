"""The dense oracle: full float64 logits, formulas written out anew, derivatives by autograd.

Never chosen automatically. It shares no code with the blocked engine but the names of things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.engine.arguments import Arguments
from pad_kernels.engine.inputs import check_inputs, muted_input
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import Functional


def _log_prob(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.log_softmax(logits[0], -1).gather(1, inputs[getattr(f, "ids")]).t()  # noqa: B009


def _entropy(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    logprob = torch.log_softmax(logits[0], -1)
    # Clamped, so that 0 * -inf is 0 in value and gradient.
    return -(logprob.exp() * logprob.clamp(min=-1e30)).sum(-1).unsqueeze(0)


def _logsumexp(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    # torch.logsumexp's derivative exp(z - lse) loses digits where the logits are large.
    shift = logits[0].detach().amax(-1, keepdim=True).clamp(min=-1e300)
    shifted = (logits[0] - shift).exp().sum(-1).log()
    return (shift.squeeze(-1) + shifted).unsqueeze(0)


def _squared_logsumexp(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    return _logsumexp(f, logits, inputs) ** 2


def _logit_sum(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    return logits[0].sum(-1).unsqueeze(0)


def _mean_ratio(over: Tensor, under: Tensor, weights: Tensor) -> Tensor:
    """Mean of over - under, log-probs; a weight of 0 counts 0 whatever it multiplies."""
    ratio = (over - under).masked_fill(weights == 0, 0.0)
    return torch.where(weights == 0, 0.0, weights * ratio).sum(-1)


def _between(kind: str, alpha: float, log_s: Tensor, log_t: Tensor) -> Tensor:
    """A divergence between distributions, log-probs [rows, outcomes], [rows]."""
    s, t = log_s.exp(), log_t.exp()
    if kind == "tvd":
        return (s - t).abs().sum(-1) / 2
    if kind == "forward_kl":
        return _mean_ratio(log_t, log_s, t)
    if kind == "reverse_kl":
        return _mean_ratio(log_s, log_t, s)
    share = 1 - alpha if kind == "skew_reverse_kl" else alpha  # of the teacher in the mixture
    # Clamped, so that neither 0 * -inf nor the mixture of two zeros is NaN, in its gradient too.
    log_s, log_t = log_s.clamp(min=-1e30), log_t.clamp(min=-1e30)
    log_m = torch.logaddexp(math.log(share) + log_t, math.log1p(-share) + log_s)
    from_t, from_s = (t * (log_t - log_m)).sum(-1), (s * (log_s - log_m)).sum(-1)
    if kind == "jsd":
        return alpha * from_t + (1 - alpha) * from_s
    return from_t if kind == "skew_forward_kl" else from_s


def _distributions(f: Functional, logits: list[Tensor]) -> tuple[Tensor, ...]:
    """Log-probs of the student and of the functional's teachers."""
    return tuple(torch.log_softmax(logits[j], -1) for j in (0, *f.teachers))


def _forward_kl(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    return _between("forward_kl", 0.0, *_distributions(f, logits)).unsqueeze(0)


def _reverse_kl(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    return _between("reverse_kl", 0.0, *_distributions(f, logits)).unsqueeze(0)


def _divergence(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    kind, alpha = getattr(f, "kind"), getattr(f, "alpha")  # noqa: B009
    return _between(kind, alpha, *_distributions(f, logits)).unsqueeze(0)


def _advantage(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    log_s, aligned, reference = _distributions(f, logits)
    return _mean_ratio(aligned, reference, log_s.exp()).unsqueeze(0)


def _topk_advantage(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    s = torch.softmax(logits[0], -1).gather(1, inputs["advantage_ids"])
    return (s * inputs["advantage_values"].double()).sum(1).unsqueeze(0)


def _log_tail(logprob: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability of all other tokens [rows, 1]; -inf without any."""
    others = logprob.scatter(1, ids, -math.inf)
    most = others.detach().amax(1, keepdim=True)
    total = (others - most.clamp(min=-1e30)).exp().sum(1, keepdim=True)
    return torch.where(total > 0, total.clamp(min=1e-300).log() + most, -math.inf)


def _topk_divergence(f: Functional, logits: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    (log_s,), ids = _distributions(f, logits), inputs["teacher_ids"]
    log_t = inputs["teacher_logprobs"].double()
    tail_s = _log_tail(log_s, ids)
    tail_t = (1 - log_t.exp().sum(1, keepdim=True)).clamp(min=0).log()
    if getattr(f, "whole"):  # noqa: B009
        tail_s, tail_t = (torch.full_like(tail_s, -math.inf) for _ in range(2))
    kind, alpha = getattr(f, "kind"), getattr(f, "alpha")  # noqa: B009
    log_s, log_t = torch.cat((log_s.gather(1, ids), tail_s), 1), torch.cat((log_t, tail_t), 1)
    return _between(kind, alpha, log_s, log_t).unsqueeze(0)


ORACLES: dict[str, Callable[[Functional, list[Tensor], Mapping[str, Tensor]], Tensor]] = {
    "LogProb": _log_prob,
    "Entropy": _entropy,
    "LogSumExp": _logsumexp,
    "SquaredLogSumExp": _squared_logsumexp,
    "LogitSum": _logit_sum,
    "ForwardKL": _forward_kl,
    "ReverseKL": _reverse_kl,
    "Divergence": _divergence,
    "Advantage": _advantage,
    "TopKDivergence": _topk_divergence,
    "TopKAdvantage": _topk_advantage,
}


def _dense_logits(recipe: Recipe, given: Arguments) -> list[Tensor]:
    logits = []
    for (h, w, b), head in zip(given.streams(recipe), recipe.heads, strict=True):
        z = h.double() @ w[: recipe.vocab].double().t()
        if b is not None:
            z = z + b[: recipe.vocab].double()
        z = z * head.logit_scale
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        logits.append(z / head.temperature)
    return logits


def _values(recipe: Recipe, given: Arguments) -> tuple[Tensor, Tensor]:
    """Values [outputs, N] in float64 and the student's logits."""
    logits, inputs = _dense_logits(recipe, given), given.inputs(recipe)
    ignored = None
    if recipe.ignore_index is not None and "labels" in inputs:
        ignored = inputs["labels"][:, 0] == recipe.ignore_index
        live = {name: x[~ignored] for name, x in inputs.items()}
        check_inputs(recipe.vocab, live, recipe.ignore_index)
        inputs = {name: muted_input(name, x, ignored, recipe.vocab) for name, x in inputs.items()}
    else:
        check_inputs(recipe.vocab, inputs)
    found = [ORACLES[type(f).__name__](f, logits, inputs) for f in recipe.functionals]
    values = torch.cat(found, 0)
    return (values if ignored is None else torch.where(ignored, 0.0, values)), logits[0]


def forward(recipe: Recipe, given: Arguments) -> tuple[Tensor, Tensor]:
    """Values [outputs, N] and greedy tokens [N]."""
    values, logits = _values(recipe, given)
    greedy = torch.empty(0, dtype=torch.int64, device=values.device)
    if recipe.argmax:
        greedy = logits.argmax(-1)
        labels = given.inputs(recipe).get("labels")
        if recipe.ignore_index is not None and labels is not None:
            greedy = greedy.masked_fill(labels[:, 0] == recipe.ignore_index, -1)
    return values.to(accumulate_dtype(given.hidden.dtype)), greedy


def backward(recipe: Recipe, given: Arguments, grad: Tensor) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias by autograd through the dense computation.

    Autograd is switched off inside an op's body; a fresh thread does not inherit that. Nor does it
    inherit the stream that the inputs were made on.
    """
    stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_backward, recipe, given, grad, stream).result()


def _backward(
    recipe: Recipe, given: Arguments, grad: Tensor, stream: torch.cuda.Stream | None
) -> list[Tensor | None]:
    own = given.hidden, given.weight, given.bias
    leaves = [
        None if x is None else x.detach().double().requires_grad_(need)
        for x, need in zip(own, recipe.needs, strict=True)
    ]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    with torch.cuda.stream(stream), torch.enable_grad():
        values, _ = _values(recipe, replace(given, hidden=hidden, weight=weight, bias=bias))
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        found = list(torch.autograd.grad(values, wanted, grad.double()))
    return [
        found.pop(0).to(x.dtype) if x is not None and need else None
        for x, need in zip(own, recipe.needs, strict=True)
    ]
