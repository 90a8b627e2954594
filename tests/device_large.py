"""Checks that need a device's memory: more than 2³¹ logits at once, teachers that lie on the CPU.

The oracle is the benchmark's: float64, row block by row block, on the same device. So is the dense
computation, in row blocks too, because whole it needs five times as much memory as the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.bench import gate
from pad_kernels.bench.cases import OPS, Case, Inputs, make_inputs
from pad_kernels.bench.implementations import call_ours
from pad_kernels.bench.peers import dense
from pad_kernels.engine import problem

Check = Callable[[], object]
Groups = dict[str, Callable[[], Iterator[tuple[str, Check]]]]

#: N·V is 1.5 % over 2³¹; H is small, because indices are what is checked. V is no power of two.
TOKENS, HIDDEN, VOCAB = 16640, 64, 131001
#: What a step may take beyond its workspace, its inputs and gradients: row statistics, values and
#: upstream gradients [N] of several dtypes, and what cuBLAS keeps.
SLACK = 64 << 20


@dataclass(frozen=True)
class Large:
    """One op on one schedule; with ``whole`` one block holds all of the logits."""

    op: str
    schedule: str
    backend: str
    dtype: str
    whole: bool
    shape: tuple[int, int, int] = (TOKENS, HIDDEN, VOCAB)

    @property
    def case(self) -> Case:
        return Case(self.op, *self.shape, self.dtype)

    @property
    def logits_bytes(self) -> int:
        """Of one stream."""
        return self.shape[0] * self.shape[2] * (4 if self.dtype == "float32" else 2)

    @property
    def plan(self) -> pk.PlanRequest:
        if not self.whole:
            return pk.PlanRequest(self.schedule, self.backend)
        # Room for all streams, a float32 weight gradient and what plain torch row passes take.
        budget = (1 + OPS[self.op].teachers) * self.logits_bytes + (2 << 30)
        kept = self.shape[0] if self.schedule == "kept" else None
        return pk.PlanRequest(
            self.schedule,
            self.backend,
            budget=budget,
            token_block=self.shape[0],
            vocab_block=self.shape[2],
            kept_rows=kept,
        )

    def memory(self) -> int:
        """Bytes the check needs, roughly: logits, float64 references, the oracle's blocks."""
        streams = 1 + OPS[self.op].teachers
        return 2 * streams * self.logits_bytes + (6 << 30)


def _dense_in_blocks(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The careful computation, gradients of the weight added up in float32."""
    function, op, rows = dense(case), OPS[case.op], 512
    values, found_hidden, found_weight = [], [], 0.0
    for start in range(0, case.tokens, rows):
        part = slice(start, start + rows)
        hidden = inputs.hidden.detach()[part].requires_grad_(op.backward)
        weight = inputs.weight.detach().requires_grad_(op.backward)
        teachers = tuple((h[part], w) for h, w in inputs.teachers)
        share = len(hidden) / case.tokens
        upstream = inputs.upstream * share if op.mean else inputs.upstream[part]
        value = function(Inputs(hidden, weight, inputs.labels[part], upstream, teachers))
        values.append(value.detach().float() * share if op.mean else value.detach())
        if op.backward:
            by_hidden, by_weight = torch.autograd.grad(
                value, [hidden, weight], upstream.to(value.dtype)
            )
            found_hidden.append(by_hidden)
            found_weight = found_weight + by_weight.float()
    found = {"value": torch.stack(values).sum() if op.mean else torch.cat(values)}
    if op.backward:
        found["grad_hidden"] = torch.cat(found_hidden)
        found["grad_weight"] = found_weight.to(inputs.weight.dtype)
    return found


@functools.lru_cache(maxsize=1)
def _reference(case: Case, device: torch.device) -> tuple[Inputs, gate.Reference, dict[str, float]]:
    inputs = make_inputs(case, device)
    reference = gate.oracle(case, inputs)
    errors = reference.errors(_dense_in_blocks(case, inputs))
    return inputs, reference, gate.bounds(case, reference, errors)


def check(large: Large, device: torch.device) -> dict[str, Any]:
    """The accuracy rule, the same bits twice, and peak memory within the plan (on a GPU)."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if large.memory() > 0.9 * total:
            pytest.skip(f"needs about {large.memory() >> 30} GiB of {total >> 30}")
        torch.cuda.empty_cache()
    inputs, reference, allowed = _reference(large.case, device)
    plans: list[pk.Plan] = []
    with pytest.MonkeyPatch.context() as patch, torch.device("cpu"):
        make_plan = problem.make_plan

        def remember(*args: Any) -> pk.Plan:
            plans.append(make_plan(*args))
            return plans[-1]

        patch.setattr(problem, "make_plan", remember)
        first, _ = _step(large, inputs, device)
        again, peak = _step(large, inputs, device)
    errors = reference.errors(first)
    wrong = gate.failures(errors, allowed)
    assert not wrong, "; ".join(wrong)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), f"{name}: other bits the second time"
    workspace = max(plan.workspace_bytes for plan in plans)
    if device.type == "cuda":
        assert peak <= workspace + SLACK, f"peak {peak >> 20} MiB, planned {workspace >> 20} MiB"
    return {"peak_mib": peak / 2**20, "workspace_mib": workspace / 2**20, "errors": errors}


def _step(large: Large, inputs: Inputs, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Value and gradients, and on a GPU the bytes of the step beyond the gradients."""
    op, before = OPS[large.op], 0
    inputs.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.set_grad_enabled(op.backward):
        value = call_ours(large.op, large.plan, inputs)
    if op.backward:
        value.backward(inputs.upstream.to(value.dtype))
    found = gate.outputs_of(value.detach(), inputs)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    given = sum(found[n].nbytes for n in ("grad_hidden", "grad_weight") if n in found)
    return found, peak - given


def check_teacher_on_cpu(op: str, plan: str, device: torch.device) -> None:
    """A teacher whose weight is pinned CPU memory gives the results of one on the device."""
    inputs = make_inputs(Case(op, 300, 64, 5003, "bfloat16"), device)
    found = []
    for there in (True, False):
        inputs.clear()
        heads = inputs.teachers
        if not there:
            heads = tuple((h, _pinned(w)) for h, w in heads)
        try:
            value = call_ours(op, plan, replace(inputs, teachers=heads))
        except ValueError as error:
            if not there and "teacher" in str(error):
                pytest.skip(f"not supported: {error}")
            raise
        value.backward()
        assert inputs.hidden.grad is not None and inputs.weight.grad is not None
        found.append([value.detach(), inputs.hidden.grad.clone(), inputs.weight.grad.clone()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5 * float(a.abs().max()) + 1e-7)


def _pinned(weight: Tensor) -> Tensor:
    moved = weight.cpu()
    return moved.pin_memory() if weight.is_cuda else moved


def _large(op: str, backend: str, dtype: str, device: torch.device) -> Iterator[tuple[str, Check]]:
    schedules = ["late", "kept"] if not OPS[op].mean else ["early", "late", "kept"]
    for schedule in schedules if OPS[op].backward else ["late"]:
        for whole in (True, False):
            if schedule == "kept" and not whole:
                continue
            large = Large(op, schedule, backend, dtype, whole)
            name = f"{schedule}{' in one block' if whole else ''}"
            yield name, functools.partial(check, large, device)


def _teachers(backend: str, device: torch.device) -> Iterator[tuple[str, Check]]:
    for op in ("forward_kl", "jsd", "advantage", "distill"):
        for schedule in ("early", "late"):
            plan = f"{schedule}:{backend}"
            yield f"{op} {schedule}", functools.partial(check_teacher_on_cpu, op, plan, device)


def groups(backend: str, device: torch.device) -> Groups:
    """Groups of this file; those over 2³¹ logits on a GPU alone, where they take seconds."""
    found: Groups = {}
    if device.type == "cuda":
        found = {
            f"{backend}/{dtype}/over 2^31/{op}": functools.partial(
                _large, op, backend, dtype, device
            )
            for dtype in ("bfloat16", "float32")
            for op in OPS
            if dtype == "bfloat16" or op in ("cross_entropy", "logprob", "jsd")
        }
    found[f"{backend}/teachers on the CPU"] = functools.partial(_teachers, backend, device)
    return found
