"""What is measured: operations × shapes × dtypes, and the tensors of one such case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Op:
    """An operation with several implementations.

    Attributes:
        name: what the command line calls it.
        backward: whether a step includes the backward pass.
        gemms: matrix-product work that no implementation can avoid, in units of N·H·V flops.
        text: one line for tables and plots.
        mean: whether the value is a mean over tokens and not one per token.
        teachers: how many heads besides the student's are read, none with gradients.
    """

    name: str
    backward: bool
    gemms: int
    text: str
    mean: bool = False
    teachers: int = 0


def _against(teachers: int, name: str, text: str) -> Op:
    """A mean over tokens, forward + backward; a teacher adds a product to the student's three."""
    return Op(name, True, 6 + 2 * teachers, f"{text}, forward + backward", True, teachers)


OPS = {
    op.name: op
    for op in (
        Op("cross_entropy", True, 6, "mean cross-entropy, forward + backward", mean=True),
        Op("logprob", True, 6, "per-token log-prob, forward + backward with per-token gradients"),
        Op("score", False, 2, "per-token log-prob under no_grad (a teacher's reward)"),
        _against(1, "forward_kl", "forward KL to a teacher"),
        _against(1, "jsd", "Jensen–Shannon divergence from a teacher"),
        _against(2, "advantage", "expected advantage of one teacher over another"),
        _against(1, "distill", "cross-entropy + forward KL in one call"),
    )
}

# (N tokens, H hidden, V vocabulary): a Llama-2-sized vocabulary with a narrow model, SmolLM's head,
# and Llama 3's head with few tokens, where reading the weight costs as much as the products.
SHAPES = ((512, 512, 32000), (1024, 576, 49152), (256, 2048, 128256))
# Where ops with teachers are measured if nothing is asked for, so that a whole run stays near ten
# minutes: the larger shapes take a minute and more a case.
TEACHER_SHAPES = SHAPES[:1]
QUICK_SHAPES = ((256, 256, 16384),)
# On a GPU: Llama 3 8B's head with a large and a middle batch, and Gemma 2 2B's, whose hidden size
# is small beside its vocabulary.
LLAMA, LLAMA_HALF, GEMMA = (8192, 4096, 128256), (4096, 4096, 128256), (8192, 2304, 256000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype; ``ignored`` is the share of rows without a label."""

    op: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    ignored: float = 0.0

    @property
    def name(self) -> str:
        """``op/NxHxV/dtype``, the string that ``--case`` filters by."""
        return f"{self.op}/{self.shape}/{self.dtype}"

    @property
    def shape(self) -> str:
        """``NxHxV``."""
        return f"{self.tokens}x{self.hidden}x{self.vocab}"

    @property
    def work(self) -> int:
        """N·H·V."""
        return self.tokens * self.hidden * self.vocab


@dataclass
class Inputs:
    """The tensors that every implementation of a case gets.

    Attributes:
        hidden: (N, H), requires grad where the operation has a backward pass.
        weight: (V, H), likewise.
        labels: (N,) int64, ``IGNORE`` where a row has none.
        upstream: (N,) float32 gradient for per-token outputs, () one for a scalar loss.
        teachers: hidden (N, H) and weight (V, H) of each, without gradients. The first resembles
            the student, so that no value of an operation is near 0; the second does not.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor
    teachers: tuple[tuple[Tensor, Tensor], ...] = ()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        self.hidden.grad = None
        self.weight.grad = None


def make_cases(
    ops: list[str] | None = None,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    dtypes: list[str] | None = None,
    everything: bool = False,
) -> list[Case]:
    """The product of operations, shapes and dtypes, shapes outermost.

    Operations with teachers leave out those of ``SHAPES`` that are not in ``TEACHER_SHAPES``.

    Args:
        ops: names from ``OPS``; all by default.
        shapes: (N, H, V) triples.
        dtypes: names from ``DTYPES``; float32 and bfloat16 by default.
        everything: leave nothing out.

    Returns:
        The cases in the order in which they are measured.

    Example:
        >>> [c.name for c in make_cases(["score"], ((4, 2, 8),), ["float32"])]
        ['score/4x2x8/float32']
    """
    return [
        Case(op, *shape, dtype)
        for shape in shapes
        for dtype in dtypes or ("float32", "bfloat16")
        for op in ops or OPS
        if everything or not (OPS[op].teachers and shape in SHAPES[len(TEACHER_SHAPES) :])
    ]


def make_gpu_cases() -> list[Case]:
    """What is measured on a GPU, the most important first; all of them in bfloat16."""
    table = {
        LLAMA: ("cross_entropy", "score", "logprob", "forward_kl", "advantage"),
        GEMMA: ("cross_entropy", "logprob"),
        LLAMA_HALF: ("cross_entropy", "jsd", "distill"),
    }
    return [Case(op, *shape, "bfloat16") for shape, ops in table.items() for op in ops]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random tensors of a case, the same for the same case on the same type of device.

    The logits get a standard deviation of about 2, so that the softmax is neither flat nor one-hot.
    """
    generator = torch.Generator(device).manual_seed(1234)
    drawn: dict[str, Any] = {"generator": generator, "device": device}
    dtype = DTYPES[case.dtype]
    backward = OPS[case.op].backward

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **drawn).to(dtype)

    hidden = normal(case.tokens, case.hidden)
    weight = normal(case.vocab, case.hidden).mul_(2.0 / case.hidden**0.5)
    labels = torch.randint(0, case.vocab, (case.tokens,), **drawn)
    labels[: round(case.ignored * case.tokens)] = IGNORE
    labels = labels[torch.randperm(case.tokens, **drawn)]
    if OPS[case.op].mean:
        upstream = torch.ones((), device=device)
    else:
        upstream = torch.randn(case.tokens, **drawn) / case.tokens
    teachers = []
    for index in range(OPS[case.op].teachers):
        # Half the variance of hidden and weight is shared: the logits correlate with 1/2.
        pair = normal(case.tokens, case.hidden), normal(case.vocab, case.hidden)
        pair[1].mul_(2.0 / case.hidden**0.5)
        if index == 0:
            for own, students in zip(pair, (hidden, weight), strict=True):
                own.add_(students).mul_(0.5**0.5)
        teachers.append(pair)
    hidden.requires_grad_(backward)
    weight.requires_grad_(backward)
    return Inputs(hidden, weight, labels, upstream, tuple(teachers))
