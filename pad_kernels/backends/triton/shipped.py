"""Representative sets of functionals as the launches that an op would make, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pad_kernels.backends.base import RawBlock
from pad_kernels.backends.triton.launch import Device, Launch
from pad_kernels.backends.triton.passes import Passes
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.plan import PlanRequest
from pad_kernels.engine.problem import Problem, Stream
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals import (
    Advantage,
    Divergence,
    Entropy,
    ForwardKL,
    Functional,
    LogitGradient,
    LogitSum,
    LogProb,
    LogSumExp,
    ReverseKL,
    SquaredLogSumExp,
    TopKDivergence,
)
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import Picked, empty_stats
from pad_kernels.heads import HeadOptions

_PLAIN = HeadOptions()
_CAPPED = HeadOptions(softcap=30.0, logit_scale=0.9, temperature=0.7)


@dataclass(frozen=True)
class Example:
    """What an op asks of the row passes.

    Args:
        functionals: of the op.
        head: of every stream.
        biased: whether every stream has a bias.
        argmax: whether greedy tokens are wanted.
        filtered: whether gradient tiles are filtered.
    """

    functionals: tuple[Functional, ...]
    head: HeadOptions = _PLAIN
    biased: bool = False
    argmax: bool = False
    filtered: bool = False


_SMOOTHED = (LogProb(), LogSumExp(), LogitSum(), SquaredLogSumExp())

EXAMPLES = {
    "logprob": Example((LogProb(),)),
    "stats": Example((LogProb(), LogSumExp(), Entropy()), argmax=True),
    "cross_entropy": Example(_SMOOTHED),
    "cross_entropy_capped": Example(_SMOOTHED, _CAPPED, biased=True),
    "cross_entropy_filtered": Example((LogProb(),), filtered=True),
    "forward_kl": Example((ForwardKL(),)),
    "reverse_kl": Example((ReverseKL(),), HeadOptions(temperature=0.7)),
    "jsd": Example((Divergence("jsd", 0.5),)),
    "skew_forward_kl": Example((Divergence("skew_forward_kl", 0.1),)),
    "skew_reverse_kl": Example((Divergence("skew_reverse_kl", 0.1),), _CAPPED),
    "tvd": Example((Divergence("tvd"),)),
    "advantage": Example((Advantage(),)),
    "topk_teacher": Example((TopKDivergence(),)),
    "distill": Example((LogProb(), ForwardKL(), Advantage(2, 3), Entropy())),
    "distill_jsd": Example((LogProb(), Divergence("jsd", 0.5), Advantage(2, 3)), _CAPPED),
}
_IDS = {"labels": 1, "teacher_ids": 64, "teacher_logprobs": 64}


def launches(
    example: Example,
    dtype: torch.dtype,
    capability: int,
    rows: int = 4096,
    cols: int = 32064,
    pitch: int | None = None,
) -> Iterator[Launch]:
    """Every launch for a block of logits [rows, cols]: statistics, second sweep, gradient.

    Its rows are ``pitch`` entries apart; None: as many as they have.
    """
    streams = 1 + max((j for f in example.functionals for j in f.teachers), default=0)
    bias = torch.empty(cols, device="meta") if example.biased else None
    hidden, weight = torch.empty(rows, 16, device="meta"), torch.empty(cols, 16, device="meta")
    inputs = {
        name: torch.empty(
            (rows, k),
            dtype=torch.float32 if name.endswith("logprobs") else torch.int64,
            device="meta",
        )
        for name, k in _IDS.items()
    }
    recipe = Recipe(
        functionals=example.functionals,
        heads=(example.head,) * streams,
        biased=(example.biased,) * streams,
        input_names=tuple(inputs),
        vocab=cols,
        ignore_index=None,
        gemm=dtype,
        needs=(True, True, example.biased),
        argmax=example.argmax,
        request=PlanRequest(),
    )
    heads = [Stream(hidden, weight, bias, example.head) for _ in range(streams)]
    problem = Problem(recipe, heads, rows, None, rows, [], inputs, weight, None)
    stats = empty_stats(recipe.measured(), rows, inputs, torch.device("meta"))
    room = torch.empty(rows, pitch or cols, dtype=dtype, device="meta")
    logits = dict.fromkeys(range(streams), room[:, :cols])
    passes = Passes(RawBlock(problem, stats, logits, 0), Device(capability, 132))
    wanted = [s for s in recipe.measured() if not isinstance(s, Picked | Outcomes)]
    yield from passes.statistics(wanted)
    terms = LogitGradient()
    for functional in example.functionals:
        grad = torch.empty(functional.outputs(inputs), rows, device="meta")
        terms = terms + functional.gradient(grad, stats)
    for statistic in recipe.statistics:
        if isinstance(statistic, Outcomes):
            yield passes.outcomes(statistic)[0]
    tiles = [-(-size // FILTER_TILE) for size in (rows, cols)]
    peaks = torch.empty(tiles, dtype=torch.int32, device="meta")
    yield passes.gradient(terms.settled(stats), logits[0], peaks if example.filtered else None)
