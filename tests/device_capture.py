"""CUDA graphs: a step that was captured gives the results of other inputs when it is replayed.

Without compaction it does not wait for the device even where it is not captured.

Where there is no CUDA the step is not captured but run again, so that the checks themselves are
tested; ``test_graph_capture.py`` looks for what a capture would forbid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.bench.cases import IGNORE, OPS, Case, Inputs, make_inputs
from pad_kernels.bench.implementations import call_ours

#: A prompt's responses, for the loss over whole responses; 320 tokens are 2 prompts' of 4 x 40.
RESPONSES, LENGTH = 4, 40
SHAPE = (320, 64, 5003)
Check = Callable[[], object]
Tensors = list[Tensor]


@dataclass(frozen=True)
class Recording:
    """A captured step: what it leaves behind, and how it is run again."""

    outputs: Tensors
    replay: Callable[[], None]


def record(step: Callable[[], Tensors], device: torch.device) -> Recording:
    """Capture a step, once what it needs has been compiled and allocated."""
    if device.type != "cuda":
        outputs = step()

        def again() -> None:
            for old, new in zip(outputs, step(), strict=True):
                old.copy_(new)

        return Recording(outputs, again)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return Recording(outputs, graph.replay)


def preference(plan: pk.PlanRequest, x: Inputs) -> Tensor:
    """The listwise loss from hidden states; teacher rewards are whatever is at hand."""
    shape = (-1, RESPONSES, LENGTH)
    rewards = x.hidden.detach()[:, 0].float().view(shape).mean(-1)
    return pk.linear_preference_loss(
        *(x.hidden.view(*shape, x.hidden.shape[1]), x.weight, x.labels.view(shape), rewards),
        beta=1.0,
        ignore_index=IGNORE,
        plan=plan,
    )


def smoothed(plan: pk.PlanRequest, x: Inputs) -> Tensor:
    """A cross-entropy of several terms."""
    return pk.linear_cross_entropy(
        *(x.hidden, x.weight, x.labels),
        label_smoothing=0.1,
        z_loss=1e-3,
        ignore_index=IGNORE,
        plan=plan,
    )


def check(
    op: str, schedule: str, backend: str, device: torch.device, *, pinned: bool = False
) -> None:
    """Replayed on other inputs, with another number of ignored rows, against the same eagerly."""
    losses = {"preference": preference, "smoothed": smoothed}
    known = op in OPS
    case = Case(op if known else "cross_entropy", *SHAPE, "bfloat16", ignored=0.2)
    inputs, other = make_inputs(case, device), make_inputs(replace(case, ignored=0.6), device)
    if pinned:
        inputs.teachers = tuple((h, w.cpu().pin_memory()) for h, w in inputs.teachers)
    wanted = [x for x in (inputs.hidden, inputs.weight) if x.requires_grad]

    def step(compact: bool = False) -> Tensors:
        plan = pk.PlanRequest(schedule, backend, compact=compact)
        with torch.set_grad_enabled(bool(wanted)):
            value = call_ours(op, plan, inputs) if known else losses[op](plan, inputs)
        upstream = inputs.upstream.to(value.dtype)
        gradients = torch.autograd.grad(value, wanted, upstream) if wanted else ()
        return [value.detach(), *gradients]

    recording = record(step, device)
    with torch.no_grad():
        inputs.hidden.copy_(other.hidden.flip(0))
        inputs.weight.mul_(0.7)
        inputs.labels.copy_(other.labels)
        for hidden, _ in inputs.teachers:
            hidden.mul_(1.3)
    recording.replay()
    for found, expected in zip(recording.outputs, step(compact=True), strict=True):
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4 * largest + 1e-7)


def groups(backend: str, device: torch.device) -> dict[str, Callable[[], Iterator]]:
    """One group; what stays on the CPU comes last, as capturing its copies is the most delicate."""

    def checks() -> Iterator[tuple[str, Check]]:
        for op in (*OPS, "smoothed", "preference"):
            one = op == "smoothed" or (op in OPS and OPS[op].mean)
            for schedule in ("early", "late", "kept") if one else ("late", "kept"):
                if op != "score" or schedule == "late":
                    yield (
                        f"{op} {schedule}",
                        functools.partial(check, op, schedule, backend, device),
                    )
        if device.type == "cuda":
            yield (
                "forward_kl late, teacher on the CPU",
                functools.partial(check, "forward_kl", "late", backend, device, pinned=True),
            )

    return {f"{backend}/capture": checks}
