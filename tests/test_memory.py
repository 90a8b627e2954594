"""The promise about memory, held to in three ways.

Nothing of N x V elements is created (the op bodies run under a dispatch mode, which cannot see
inside ops); the audited allocator stays within the plan's figure and the plan within the budget;
and the resident memory of a fresh process agrees.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpu_backends import BACKENDS
from engine_probe import Probe, Watch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine import problem, run
from pad_kernels.engine.planner import CPU_BUDGET
from pad_kernels.engine.workspace import account

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 1 << 20
OPS = {"cross_entropy": pk.linear_cross_entropy, "logprob": pk.linear_logprob}


@pytest.fixture(autouse=True)
def _audited() -> Iterator[None]:
    """Workspace starts as NaN, and all of it is given back."""
    account.poison, before = True, account.current
    yield
    account.poison = False
    assert account.current == before


def make(n: int, h: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    weight = torch.randn(v, h).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    labels[torch.rand(n) < 0.1] = -100
    return hidden, weight, labels


def upstream(value: Tensor) -> Tensor:
    """A gradient for what an op body returned as its value."""
    return torch.randn(value.shape, dtype=value.dtype)


# --- nothing of N x V elements ---


@pytest.mark.parametrize(
    ("op", "plan", "schedule"),
    [
        ("cross_entropy", None, "early"),
        ("cross_entropy", "late", "late"),
        ("cross_entropy", "kept", "kept"),
        ("logprob", None, "kept"),
        ("logprob", "late", "late"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch, op: str, plan: str | None, schedule: str, dtype: torch.dtype
) -> None:
    n, h, v = 2048, 16, 65536
    hidden, weight, labels = make(n, h, v, dtype)
    probe = Probe.install(monkeypatch)
    with Watch() as watch:
        OPS[op](hidden, weight, labels, plan=plan)
        gradients = probe.backward(upstream(probe.outputs[0]))
    assert probe.plans[0].schedule == schedule
    # It did see the work: some block of logits, and as much multiplied as was planned.
    assert n < watch.largest < n * v
    live = int((labels != -100).sum())
    assert watch.flops >= 6 * live * v * h
    assert all(g.isfinite().all() for g in gradients[:2])


def test_the_probe_sees_dense_logits() -> None:
    hidden, weight, _ = make(64, 8, 100, torch.float32)
    with Watch() as watch, torch.no_grad():
        torch.log_softmax(hidden @ weight.T, -1)
    assert watch.largest == 64 * 100
    assert watch.flops == 2 * 64 * 8 * 100


@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [(torch.float32, "early"), (torch.float32, "late"), (torch.bfloat16, "late")],
    ids=str,
)
def test_rows_of_another_dtype_pass_in_pieces(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, schedule: str
) -> None:
    """Left-out rows make gathers of hidden states, under autocast of another dtype."""
    hidden, weight, labels = make(3000, 512, 64, dtype)
    probe = Probe.install(monkeypatch)
    plan = pk.PlanRequest(schedule, token_block=3000 if schedule == "early" else None)
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        pk.linear_cross_entropy(hidden, weight, labels, plan=plan)
        probe.backward(torch.tensor(1.0))
    assert 1 << 19 < watch.copied <= 1 << 20


# --- the audited allocator ---

SHAPES = [
    (1, 3, 1),  # one row, one entry
    (40, 16, 1000),  # fits whole
    (600, 8, 1500),  # more than 512 rows: never whole
    (130, 64, 2000),  # the weight-gradient accumulator is worth a few blocks of logits
]
ROUTES = [
    *(("cpp", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    # Its buffers are the same; its temporaries are not the allocator's.
    *(("torch_blocked", dtype) for dtype in (torch.float32, torch.float16)),
]


def smallest_budget(run: object) -> int:
    """The figure in the message of a budget that is too small."""
    with pk.workspace_limit(1), pytest.raises(ValueError, match="plan: expected a workspace") as e:
        run()  # type: ignore[operator]
    return int(str(e.value).split("at least ")[1].split(" bytes")[0])


@pytest.mark.parametrize("schedule", [None, "early", "late", "kept"])
@pytest.mark.parametrize(("backend", "dtype"), [r for r in ROUTES if r[0] in BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_allocator_stays_within_plan_and_plan_within_budget(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backend: str,
    schedule: str | None,
) -> None:
    hidden, weight, labels = make(*shape, dtype)
    plan = backend if schedule is None else f"{schedule}:{backend}"
    probe = Probe.install(monkeypatch)
    for op in OPS.values():
        if schedule == "early" and op is pk.linear_logprob:
            continue

        def step(op: object = op) -> None:
            op(hidden, weight, labels, plan=plan)  # type: ignore[operator]
            probe.backward(upstream(probe.outputs[0]))

        least = smallest_budget(step)
        for budget in (least, least + least // 3, CPU_BUDGET):
            probe.plans.clear()
            account.reset()
            with pk.workspace_limit(budget):
                step()
                assert account.current == 0
            assert len({(p.schedule, p.workspace_bytes) for p in probe.plans}) == 1
            assert 0 < account.high_water <= probe.plans[0].workspace_bytes <= budget
        with pk.workspace_limit(least - 1), pytest.raises(ValueError, match=str(least)):
            step()


@pytest.mark.usefixtures("multiply_float16")
@pytest.mark.parametrize("schedule", [None, "early", "late", "kept"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_allocator_where_float16_is_multiplied(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], schedule: str | None
) -> None:
    test_allocator_stays_within_plan_and_plan_within_budget(
        monkeypatch, shape, torch.float16, "torch_blocked", schedule
    )


@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
@pytest.mark.parametrize("what", ["strided weight", "autocast", "filter"])
def test_allocator_with_copies(monkeypatch: pytest.MonkeyPatch, what: str, schedule: str) -> None:
    """Weights that are copied chunk by chunk, and the filter's extra sums."""
    hidden, weight, labels = make(150, 24, 1500, torch.float32)
    if what == "strided weight":
        weight = torch.randn(1500, 48)[:, ::2].detach().requires_grad_()
    plan = pk.PlanRequest(schedule, filter=1e-3 if what == "filter" else 0.0)
    probe = Probe.install(monkeypatch)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            pk.linear_cross_entropy(hidden, weight, labels, plan=plan)
        probe.backward(torch.tensor(1.0))

    least = smallest_budget(step)
    for budget in (least, 2 * least, CPU_BUDGET):
        probe.plans.clear()
        account.reset()
        with pk.workspace_limit(budget):
            step()
        assert 0 < account.high_water <= probe.plans[0].workspace_bytes <= budget


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
def test_rows_of_logits_apart(monkeypatch: pytest.MonkeyPatch, schedule: str, backend: str) -> None:
    """Rows begin where a GPU likes it: the same numbers, NaN between them, in as many bytes."""
    hidden, weight, labels = make(40, 24, 507, torch.float32)
    blocks = {"token_block": 16} if schedule == "early" else {"vocab_block": 200}
    kept = 8 if schedule == "kept" else None
    plan = pk.PlanRequest(schedule, backend, kept_rows=kept, **blocks)
    probe = Probe.install(monkeypatch)
    found = []
    for memory in (0, 1 << 40):
        for module in (problem, run):
            monkeypatch.setattr(module, "total_memory", lambda device, memory=memory: memory)
        probe.plans.clear()
        account.reset()
        pk.linear_cross_entropy(hidden, weight, labels, plan=plan)
        gradients = probe.backward(torch.tensor(1.0))
        found.append([x.clone() for x in (probe.outputs[0], *gradients)])
        assert 0 < account.high_water <= probe.plans[0].workspace_bytes
    for near, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, near, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_account_is_settled_after_an_error(backend: str) -> None:
    hidden, weight, labels = make(20, 8, 50, torch.float32)
    labels[3] = 50
    with pytest.raises(ValueError, match="labels"):
        pk.linear_cross_entropy(hidden, weight, labels, plan=backend)
    assert account.current == 0


# --- saved for backward ---


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_late_saves_the_inputs_and_a_few_numbers_per_row(op: str, dtype: torch.dtype) -> None:
    n, h, v = 600, 32, 4000
    hidden, weight, labels = make(n, h, v, dtype)
    given = {x.untyped_storage().data_ptr() for x in (hidden, weight, labels)}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = OPS[op](hidden, weight, labels, plan="late")
    assert value.requires_grad
    # Labels aligned anew, coefficients, and three statistics.
    assert 0 < sum(saved.values()) <= 8 * 8 * n


# --- resident memory of a fresh process ---

FULL = {"h": 512, "v": 65536}


def peak(**case: object) -> int:
    script = Path(__file__).with_name("peak_memory.py")
    found = subprocess.run(
        [sys.executable, str(script), json.dumps(case)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


on_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)


@on_linux
@pytest.mark.memory
@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [
        ("late", "float32"),
        ("late", "bfloat16"),
        ("late", "float16"),
        ("early", "float32"),
        ("early", "bfloat16"),
    ],
)
def test_resident_memory_within_a_limit(schedule: str, dtype: str) -> None:
    """Half precision logits would be 128 MiB, and so would be a float32 copy of the weight."""
    allowed, rows = 96 * MIB, 1024
    if (schedule, dtype) == ("early", "bfloat16"):
        allowed, rows = allowed + FULL["v"] * FULL["h"] * 4, 4096  # more than four blocks
    op = "logprob" if schedule == "late" else "cross_entropy"
    found = peak(op=op, dtype=dtype, plan=schedule, limit=64 * MIB, n=rows, **FULL)
    # At least a few of the 64 MiB are used, or nothing was measured.
    assert 16 * MIB < found <= allowed, f"{found / MIB:.1f} MiB"


@on_linux
@pytest.mark.memory
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_memory_by_default(op: str, dtype: str) -> None:
    # N x V float32 numbers are 1 GiB here.
    found = peak(op=op, dtype=dtype, plan=None, limit=None, n=4096, h=64, v=65536)
    assert 16 * MIB < found <= 256 * MIB + 16 * MIB, f"{found / MIB:.1f} MiB"


@on_linux
@pytest.mark.memory
@pytest.mark.slow
def test_resident_memory_of_a_larger_op_after_a_smaller_one() -> None:
    """Workspace that is kept for the next op counts as that op's."""
    case = {"op": "cross_entropy", "dtype": "float32", "plan": None, "limit": None}
    found = peak(**case, n=4096, h=64, v=65536, earlier=[150 * MIB, 150 * MIB])
    assert found <= 256 * MIB + 16 * MIB, f"{found / MIB:.1f} MiB"
