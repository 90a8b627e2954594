"""What a caller may ask of a plan, what a plan depends on, and the plan itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pad_kernels._checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    fail_type,
    fail_value,
)

SCHEDULES = ("early", "late", "kept")
BACKENDS = ("reference", "torch_blocked", "cpp", "triton", "cuda")

#: Entries: a multiple of them is a multiple of 16 bytes in every dtype.
ALIGNED = 16

#: Of the ``workspace_limit`` blocks that are open, in the order they were entered: a list each, so
#: that those of several threads, which need not end in turn, are told apart.
_limits: list[list[int]] = []


def padded(cols: int) -> int:
    """The next multiple of 16 bytes, in entries of any dtype."""
    return -(-cols // ALIGNED) * ALIGNED


def row_pitch(cols: int, device_bytes: int) -> int:
    """Entries from one row of a block of logits to the next.

    Every row begins at a multiple of 16 bytes on a GPU, so that products and row passes read more
    than one entry at a time whatever the size of the vocabulary.

    Args:
        device_bytes: a GPU's total memory, 0 for a CPU.
    """
    return padded(cols) if device_bytes else cols


@contextmanager
def workspace_limit(limit: int) -> Iterator[None]:
    """Bound the workspace of every op called inside the ``with`` block, by whatever thread.

    Args:
        limit: bytes. An op that cannot do with so little raises and names the smallest limit.

    Example:
        >>> import torch, pad_kernels as pk
        >>> with pk.workspace_limit(64 << 20):
        ...     loss = pk.linear_cross_entropy(
        ...         torch.randn(4, 8), torch.randn(11, 8), torch.tensor([1, 2, 3, 4]))
    """
    own = [check_integer("limit", limit, at_least=1)]
    _limits.append(own)
    try:
        yield
    finally:
        _limits[:] = [x for x in _limits if x is not own]


@dataclass(frozen=True)
class PlanRequest:
    """What a caller asks of a plan; None leaves the choice to the planner.

    Args:
        schedule: "early", "late" or "kept".
        backend: "cpp", "triton", "cuda", "torch_blocked" or "reference"; a named backend never
            falls back.
        budget: workspace in bytes.
        filter: skip tiles of the logit gradient whose largest entry is below this fraction of the
            largest per-token weight; 0 is exact. Each entry of the logit gradient is then
            off by at most ``filter`` times that weight.
        token_block: rows of a token block, where the schedule has them.
        vocab_block: entries of a vocabulary chunk, likewise.
        kept_rows: rows that keep their logits between forward and backward, if it is "kept".
        compact: leave out rows that do not count (ignored labels, weights of 0) and a teacher's
            rows that have no use for it. False computes them all, so that nobody waits for a GPU
            to tell them apart: a wrong label there makes the output NaN instead of an error. A CUDA
            graph is captured that way in any case.
    """

    schedule: str | None = None
    backend: str | None = None
    budget: int | None = None
    filter: float = 0.0
    token_block: int | None = None
    vocab_block: int | None = None
    kept_rows: int | None = None
    compact: bool = True

    @staticmethod
    def of(plan: PlanLike) -> PlanRequest:
        """Read what the public ``plan=`` argument accepts, with the limit in force."""
        if plan is None:
            request = PlanRequest()
        elif isinstance(plan, str):
            request = PlanRequest._parse(plan)
        elif isinstance(plan, Plan):
            request = plan.request()
        elif isinstance(plan, PlanRequest):
            request = plan._checked()
        else:
            fail_type("plan", "None, a string, a PlanRequest or a Plan", plan)
        if _limits:
            limit = _limits[-1][0]
            budget = limit if request.budget is None else min(request.budget, limit)
            request = replace(request, budget=budget)
        return request

    def refuse_early(self) -> None:
        """Raise if an early plan is asked for where the output is not one number."""
        if self.schedule == "early":
            fail_value("plan", "late or kept for per-token outputs", "'early'")

    @staticmethod
    def _parse(text: str) -> PlanRequest:
        schedule, backend = None, None
        for word in text.split(":"):
            if word in SCHEDULES and schedule is None:
                schedule = word
            elif word in BACKENDS and backend is None:
                backend = word
            else:
                known = f"a schedule {SCHEDULES}, a backend {BACKENDS}, or 'schedule:backend'"
                fail_value("plan", known, repr(text))
        return PlanRequest(schedule, backend)

    def _checked(self) -> PlanRequest:
        """The same in Python's own numbers, as recipes are written."""
        if self.schedule is not None:
            check_choice("plan.schedule", self.schedule, SCHEDULES)
        if self.backend is not None:
            check_choice("plan.backend", self.backend, BACKENDS)
        least = {"budget": 1, "token_block": 1, "vocab_block": 1, "kept_rows": 0}
        sizes: dict[str, Any] = {
            name: check_integer(f"plan.{name}", getattr(self, name), at_least=at_least)
            for name, at_least in least.items()
            if getattr(self, name) is not None
        }
        check_flag("plan.compact", self.compact)
        share = check_number("plan.filter", self.filter, at_least=0.0, below=1.0)
        return replace(self, filter=share, **sizes)


@dataclass(frozen=True)
class Shape:
    """All that a plan depends on besides the request.

    ``reduced`` says that the op's output is one number. ``copied_weights`` that some weight cannot
    enter a matrix product as it lies (another dtype, odd strides) and is copied chunk by chunk.
    ``fused`` that statistics are taken without logits in memory: it says how long a plan takes, not
    how much memory, so that an operand that kernels cannot read after all costs no more of it.
    """

    tokens: int
    vocab: int
    hidden: tuple[int, ...]
    input: torch.dtype
    weight: torch.dtype
    gemm: torch.dtype
    needs: tuple[bool, bool, bool]
    reduced: bool
    sweeps: int
    backend: str
    device: str = "cpu"  # an entry of engine.devices.DEVICES
    device_bytes: int = 0
    copied_weights: bool = False
    fused: bool = False

    @property
    def streams(self) -> int:
        """Student and teachers."""
        return len(self.hidden)

    @property
    def unit(self) -> int:
        """Half the flops of one matrix product over every stream: N H V summed."""
        return self.tokens * self.vocab * sum(self.hidden)


@dataclass(frozen=True)
class Plan:
    """How an op will run. Print it, or pass it back as ``plan=``.

    Args:
        schedule: "early", "late" or "kept".
        backend: who does the row passes.
        token_block: rows of a token block (early, kept, two-sweep statistics, and statistics alone
            where they are fused with their products); 0 for all.
        vocab_block: entries of a vocabulary chunk (late, and gradients that run over chunks).
        kept_rows: rows whose logits stay between forward and backward.
        gradient_over: "tokens" (block by block, early) or "vocabulary" (chunk by chunk, no
            weight-gradient accumulator).
        weight_accumulator: whether a float32 [V, H] accumulator is part of the workspace.
        gemm: dtype of the matrix products' operands.
        accumulate: dtype of statistics and accumulators.
        filter, compact: see PlanRequest.
        ordered: whether gradients see the vocabulary by mean logit, so that what the filter leaves
            out lies together.
        workspace_bytes: most workspace in use at any time, kept logits included.
        flops: of the matrix products, forward and backward.
        seconds: predicted time of the matrix products and of the memory traffic around them.
        reason: one sentence.
    """

    schedule: str
    backend: str
    token_block: int
    vocab_block: int
    kept_rows: int
    gradient_over: str
    weight_accumulator: bool
    gemm: torch.dtype
    accumulate: torch.dtype
    filter: float
    compact: bool
    ordered: bool
    workspace_bytes: int
    flops: int
    seconds: float
    reason: str

    def request(self) -> PlanRequest:
        """The request that gives this plan again."""
        return PlanRequest(
            self.schedule,
            self.backend,
            self.workspace_bytes,
            self.filter,
            self.token_block or None,  # 0 is all rows, of an op that may have two sweeps
            self.vocab_block,
            self.kept_rows,
            self.compact,
        )


#: What the public ``plan=`` argument accepts.
PlanLike = PlanRequest | Plan | str | None
