"""What a device can do, and what is measured against that alone: row passes and listwise losses.

Everything is timed in repeats of several calls, because one call of a GPU is too short to time
from outside; figures are medians over the repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pad_kernels.bench.timing import clock

#: Repeats, and calls in each.
REPEATS, CALLS = 7, 20
#: Edge of the square matrices, bytes of the copied block, and rows and columns of logits.
PRODUCT, COPY, LOGITS = 8192, 4 << 30, (4096, 128256)
#: Kind, responses in a group; 64 groups make a batch.
LISTWISE = (("jsd", 8), ("kl", 12))
GROUPS = 64

Figures = dict[str, Any]


def seconds(action: Callable[[], object], device: torch.device, calls: int = CALLS) -> float:
    """Median seconds of one call, after warming up."""

    def several() -> None:
        for _ in range(calls):
            action()

    several()
    return statistics.median(clock(several, device) for _ in range(REPEATS)) / calls


def product_rate(device: torch.device, dtype: torch.dtype, edge: int = PRODUCT) -> float:
    """Flops a second of a square matrix product of random numbers."""
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * edge**3 / seconds(lambda: torch.mm(a, b.t(), out=out), device)


def copy_rate(device: torch.device, nbytes: int = COPY) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.empty(nbytes // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * nbytes / seconds(lambda: target.copy_(source), device)


def row_passes(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int] = LOGITS
) -> Figures:
    """Bytes a second of a backend's passes over a block of logits.

    Statistics read the block, once for maximum and sum and once more with the mean logit that
    entropies need; the gradient of a log-prob reads it and writes in place.
    """
    from pad_kernels.backends.base import RawBlock
    from pad_kernels.backends.choice import get_backend, resolve_backend
    from pad_kernels.engine.arguments import Arguments
    from pad_kernels.engine.call import Call
    from pad_kernels.engine.problem import build_problem
    from pad_kernels.functionals import LogProb
    from pad_kernels.functionals.base import LogitGradient
    from pad_kernels.functionals.statistics import Moment, Normalizer, Statistic, empty_stats
    from pad_kernels.heads import Head

    rows, cols = shape
    hidden, weight = (torch.randn(n, 8, device=device).to(dtype) for n in shape)
    labels = torch.randint(cols, (rows, 1), device=device)
    call = Call(Head(hidden, weight), inputs={"labels": labels}, plan=f"late:{backend}")
    recipe = resolve_backend(call.recipe([LogProb()]), device)
    problem = build_problem(recipe, Arguments(hidden, weight, None, [labels], []))
    kernels, logits = get_backend(backend), torch.randn(shape, device=device).mul_(2).to(dtype)
    sums: list[Statistic] = [Normalizer(0)]
    both: list[Statistic] = [Normalizer(0), Moment(0, (1.0,))]

    def measure(wanted: list[Statistic]) -> None:
        stats = empty_stats(wanted, rows, problem.inputs, device)
        kernels.measure(RawBlock(problem, stats, {0: logits}, 0), wanted)

    stats = empty_stats(sums, rows, problem.inputs, device)
    block = RawBlock(problem, stats, {0: logits}, 0)
    kernels.measure(block, sums)
    ones = torch.ones(rows, dtype=problem.accumulate, device=device)
    wanted = LogitGradient(student=-ones, sparse=[(labels, ones[:, None])])
    out = torch.empty_like(logits)

    def gradient() -> None:
        kernels.gradient(block, wanted, out, None)

    passes: dict[str, tuple[int, Callable[[], None]]] = {
        "statistics": (1, lambda: measure(sums)),
        "statistics + entropy": (1, lambda: measure(both)),
        "gradient": (2, gradient),
    }
    return {
        name: blocks * logits.nbytes / seconds(action, device, 5)
        for name, (blocks, action) in passes.items()
    }


def listwise(kind: str, responses: int, device: torch.device, groups: int = GROUPS) -> Figures:
    """Microseconds of a listwise loss, forward and backward: eager, and as a replayed CUDA graph.

    The graph has no overhead of Python or launches between its kernels: it is the device's time.
    """
    import pad_kernels as pk

    student, teacher = torch.randn(2, groups, responses, device=device).unbind(0)
    student = student.clone().requires_grad_()

    def step() -> Tensor:
        loss = pk.listwise_preference_loss(student, teacher, kind=kind)
        return torch.autograd.grad(loss, student)[0]

    found: Figures = {"eager_us": 1e6 * seconds(step, device)}
    if device.type != "cuda":
        return found | {"graph": "no CUDA graphs on this device"}
    # Libraries and allocations settle on the stream that is captured from.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = step()
    except Exception as error:  # whatever stands in the way of a capture is the result
        return found | {"graph": f"{type(error).__name__}: {error}"[:300]}
    graph.replay()
    off = float((captured - step()).abs().max())
    return found | {"graph_us": 1e6 * seconds(graph.replay, device, 100), "graph_error": off}
