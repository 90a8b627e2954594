"""The planner: pure, within the budget, never a whole N x V beyond 512 rows, honest about flops."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import pad_kernels as pk
from pad_kernels.engine import planner
from pad_kernels.engine.devices import DEVICES
from pad_kernels.engine.plan import Shape
from pad_kernels.engine.planner import CPU_BUDGET, WHOLE_ROWS, default_budget, make_plan

BOTH, FROZEN, NONE = (True, True, False), (True, False, False), (False, False, False)
GIB = 1 << 30


def shape(n: int, h: int, v: int, dtype: torch.dtype = torch.float32, **other: object) -> Shape:
    gemm = torch.float32 if dtype == torch.float16 else dtype
    given = {
        "tokens": n,
        "vocab": v,
        "hidden": (h,),
        "input": dtype,
        "weight": dtype,
        "gemm": gemm,
        "needs": BOTH,
        "reduced": True,
        "sweeps": 1,
        "backend": "cpp",
    }
    return Shape(**{**given, **other})  # type: ignore[arg-type]


SIZES = [
    (1, 1, 1),
    (17, 8, 33),
    (512, 64, 1000),  # the last that may be whole
    (513, 64, 1000),
    (4096, 512, 65536),
    (1024, 576, 49152),
    (256, 2048, 128256),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EVERY = [
    shape(*size, dtype, needs=needs, reduced=reduced, sweeps=sweeps, hidden=(size[1],) * sweeps)
    for size, dtype, needs, reduced, sweeps in itertools.product(
        SIZES, DTYPES, (BOTH, FROZEN, (False, True, True), NONE), (True, False), (1, 2)
    )
]


def least(given: Shape, request: pk.PlanRequest = pk.PlanRequest()) -> int:  # noqa: B008
    """The smallest budget, as the error names it."""
    with pytest.raises(ValueError, match="plan: expected a workspace budget of at least") as caught:
        make_plan(given, dataclasses.replace(request, budget=1))
    return int(str(caught.value).split("at least ")[1].split(" bytes")[0])


def test_same_question_same_answer() -> None:
    for given in EVERY[::7]:
        request = pk.PlanRequest(budget=2 * least(given))
        first = make_plan(given, request)
        planner.make_plan.cache_clear()
        assert make_plan(given, request) == first
        assert hash(make_plan(given, request)) == hash(first)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.token_block = 3  # type: ignore[misc]


def test_budget_is_kept_and_the_smallest_is_named() -> None:
    for given in EVERY:
        smallest = least(given)
        for budget in (smallest, smallest + 1, 3 * smallest):
            plan = make_plan(given, pk.PlanRequest(budget=budget))
            assert plan.workspace_bytes <= budget, (given, plan)
        with pytest.raises(ValueError, match=f"at least {smallest} bytes, got {smallest - 1}"):
            make_plan(given, pk.PlanRequest(budget=smallest - 1))
        # More room never makes for a slower plan.
        roomy = make_plan(given, pk.PlanRequest(budget=100 * smallest))
        assert roomy.seconds <= plan.seconds


def test_no_rows_need_nothing() -> None:
    for schedule in ("early", "late", "kept"):
        plan = make_plan(shape(0, 8, 11), pk.PlanRequest(schedule))
        assert plan.flops == 0
        assert plan.workspace_bytes <= 8 * 11 * 8


def test_default_budget_is_below_256_mib_on_a_cpu() -> None:
    assert CPU_BUDGET < 256 << 20
    assert default_budget(0) == CPU_BUDGET
    for given in EVERY:
        try:
            plan = make_plan(given, pk.PlanRequest())
        except ValueError as error:
            # A token block of a two-sweep functional, or an accumulator, can be larger than that.
            assert "at least" in str(error)
            assert least(given) > CPU_BUDGET
        else:
            assert plan.workspace_bytes <= CPU_BUDGET


def test_never_all_logits_beyond_512_rows() -> None:
    for given in EVERY:
        plan = make_plan(given, pk.PlanRequest(budget=64 * GIB))
        by_tokens = min(plan.token_block, given.tokens) * given.vocab
        by_entries = given.tokens * min(plan.vocab_block, given.vocab)
        over_tokens = plan.gradient_over == "tokens" or (not any(given.needs) and plan.token_block)
        held = by_tokens if over_tokens else max(by_tokens, by_entries)
        if given.tokens > WHOLE_ROWS and given.vocab > 64:
            assert held < given.tokens * given.vocab, plan
            assert plan.kept_rows < given.tokens
        elif given.sweeps == 1 and any(given.needs):
            # With room for everything there is no reason to go block by block.
            assert held == given.tokens * given.vocab or plan.kept_rows == given.tokens, plan


def test_a_named_kept_plan_may_hold_all_rows() -> None:
    given = shape(1000, 16, 2000, reduced=False)
    assert make_plan(given, pk.PlanRequest("kept", budget=GIB)).kept_rows == 1000
    assert make_plan(given, pk.PlanRequest("kept", budget=GIB, kept_rows=300)).kept_rows == 300
    unnamed = make_plan(given, pk.PlanRequest(budget=GIB))
    assert unnamed.schedule == "kept"
    assert 0 < unnamed.kept_rows < 1000


def test_blocks_are_sane() -> None:
    for given in EVERY:
        plan = make_plan(given, pk.PlanRequest(budget=2 * least(given)))
        assert 0 <= plan.token_block <= given.tokens
        assert 1 <= plan.vocab_block <= given.vocab
        assert 0 <= plan.kept_rows <= given.tokens
        assert plan.backend == given.backend
        assert plan.gemm == given.gemm
        assert plan.accumulate == (torch.float64 if given.input == torch.float64 else torch.float32)


def test_flops_of_each_schedule() -> None:
    n, h, v = 4096, 64, 8192
    unit = n * h * v

    def flops(schedule: str, needs: tuple[bool, bool, bool], **request: int) -> int:
        given = shape(n, h, v, needs=needs, reduced=schedule == "early")
        wanted = pk.PlanRequest(schedule, budget=GIB, **request)  # type: ignore[arg-type]
        return make_plan(given, wanted).flops

    blocked = {"token_block": 256}
    assert flops("early", BOTH, **blocked) == 6 * unit
    assert flops("early", FROZEN, **blocked) == 4 * unit
    assert flops("late", BOTH) == 8 * unit
    assert flops("late", FROZEN) == 6 * unit
    assert flops("late", NONE) == 2 * unit
    assert flops("kept", BOTH, kept_rows=n) == 6 * unit
    assert flops("kept", BOTH, kept_rows=n // 2) == 7 * unit
    assert flops("kept", BOTH, kept_rows=0) == 8 * unit


def test_flops_with_a_teacher() -> None:
    n, h, v = 600, 32, 4096
    given = shape(n, h, v, hidden=(h, 2 * h), sweeps=2)
    unit = n * v * h
    early = make_plan(given, pk.PlanRequest("early", budget=GIB, token_block=64))
    assert early.flops == (6 + 2 * 2) * unit
    late = make_plan(given, pk.PlanRequest("late", budget=GIB))
    assert late.flops == (8 + 2 * 4) * unit


def test_half_precision_counts_its_accumulator() -> None:
    given = shape(4096, 1024, 8192, torch.bfloat16)
    plan = make_plan(given, pk.PlanRequest("early", token_block=512))
    assert plan.weight_accumulator
    assert plan.workspace_bytes > 8192 * 1024 * 4
    assert not make_plan(given, pk.PlanRequest("late")).weight_accumulator
    # With no room for it, early goes over the vocabulary: what the budget of 64 MiB needs.
    large = shape(4096, 512, 65536, torch.bfloat16)
    small = make_plan(large, pk.PlanRequest("early", budget=64 << 20))
    assert (small.gradient_over, small.weight_accumulator) == ("vocabulary", False)


@pytest.mark.parametrize("reduced", [True, False])
def test_unasked_the_schedule_is_the_cheapest(reduced: bool) -> None:
    given = shape(1024, 576, 49152, reduced=reduced)
    found = make_plan(given, pk.PlanRequest())
    # A kept plan that is asked for may hold all rows, one that is not may not.
    named = [
        make_plan(given, pk.PlanRequest("late")),
        make_plan(given, pk.PlanRequest("kept", kept_rows=1024 * 7 // 8)),
    ]
    if reduced:
        named.append(make_plan(given, pk.PlanRequest("early")))
        assert found.schedule == "early"
    assert found.seconds == min(p.seconds for p in named)


def test_early_is_for_one_number() -> None:
    with pytest.raises(ValueError, match="plan: expected late or kept"):
        make_plan(shape(8, 8, 8, reduced=False), pk.PlanRequest("early"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_is_planned_without_one(dtype: torch.dtype) -> None:
    given = shape(8192, 4096, 128256, dtype, device="h100", device_bytes=80 * GIB)
    plan = make_plan(dataclasses.replace(given, backend="torch_blocked"), pk.PlanRequest())
    assert plan.workspace_bytes <= default_budget(80 * GIB) <= 80 * GIB // 8
    assert default_budget(80 * GIB) > 4 * CPU_BUDGET


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_explain_plans_for_a_device_that_is_not_here(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, weight = (
        torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for rows in (2048, 128256)
    )
    plan = pk.explain(hidden, weight, device=device)
    floor = plan.flops / DEVICES[device].rate(torch.bfloat16)
    assert floor < plan.seconds < (2 if device != "cpu" else 4) * floor
    assert plan.workspace_bytes <= default_budget(DEVICES[device].memory)
    assert f"predicted for {device}" in capsys.readouterr().out
    if device != "cpu":
        assert plan.backend == "triton"


def test_scoring_on_a_gpu_takes_little_memory() -> None:
    """Statistics that never see logits in memory: rows by rows, and room for their parts."""
    hidden, weight = (
        torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (8192, 128256)
    )
    for gemm in (torch.bfloat16, torch.float16):
        plan = pk.explain(hidden.to(gemm), weight.to(gemm), per_token=True, device="h200")
        assert plan.gemm == gemm and plan.workspace_bytes < 64 << 20
        assert plan.seconds < 1.02 * plan.flops / DEVICES["h200"].rate(gemm)
        small = pk.PlanRequest(budget=plan.workspace_bytes // 4)
        less = pk.explain(hidden.to(gemm), weight.to(gemm), device="h200", plan=small)
        assert less.workspace_bytes <= plan.workspace_bytes // 4
    # What kernels cannot read is multiplied in chunks of logits.
    narrow = pk.explain(hidden[:, :4088], weight[:, :4088], per_token=True, device="h200")
    assert narrow.token_block == 0 and narrow.seconds > plan.seconds


# --- the request ---


def test_a_plan_is_its_own_request() -> None:
    for given in EVERY[::5]:
        plan = make_plan(given, pk.PlanRequest(budget=3 * least(given)))
        again = make_plan(given, pk.PlanRequest.of(plan))
        # What is not asked for is rounded once: the same blocks, no more memory.
        assert dataclasses.replace(again, reason=plan.reason) == plan


def test_a_plan_without_token_blocks_serves_an_op_that_has_them() -> None:
    """Statistics of two sweeps go token block by token block, those of one need not."""
    given = shape(40, 8, 700, needs=FROZEN, reduced=False, backend="torch_blocked")
    plan = make_plan(given, pk.PlanRequest("late"))
    assert plan.token_block == 0
    plan = dataclasses.replace(plan, workspace_bytes=32 << 20)  # two streams take more
    student = pk.Head(torch.randn(40, 8, requires_grad=True), torch.randn(700, 8))
    teacher = pk.Head(torch.randn(40, 8), torch.randn(700, 8))
    found = pk.linear_divergence(student, teacher, kind="jsd", reduction="none", plan=plan)
    assert (found > 0).all()


def test_reading_plan_arguments() -> None:
    of = pk.PlanRequest.of
    assert of(None) == pk.PlanRequest()
    assert of("late") == pk.PlanRequest("late")
    assert of("cpp") == pk.PlanRequest(None, "cpp")
    assert (
        of("kept:torch_blocked")
        == of("torch_blocked:kept")
        == pk.PlanRequest("kept", "torch_blocked")
    )
    assert of(pk.PlanRequest("late", budget=5)) == pk.PlanRequest("late", budget=5)


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ("soon", "plan"),
        ("late:early", "plan"),
        ("", "plan"),
        (3, "plan"),
        (pk.PlanRequest("soon"), "plan.schedule"),
        (pk.PlanRequest(schedule=3), "plan.schedule"),  # type: ignore[arg-type]
        (pk.PlanRequest(backend="gpu"), "plan.backend"),
        (pk.PlanRequest(budget=0), "plan.budget"),
        (pk.PlanRequest(budget=1.5), "plan.budget"),  # type: ignore[arg-type]
        (pk.PlanRequest(filter=-0.1), "plan.filter"),
        (pk.PlanRequest(filter=1.0), "plan.filter"),
        (pk.PlanRequest(filter=float("nan")), "plan.filter"),
        (pk.PlanRequest(token_block=0), "plan.token_block"),
        (pk.PlanRequest(vocab_block=-1), "plan.vocab_block"),
        (pk.PlanRequest(kept_rows=-1), "plan.kept_rows"),
        (pk.PlanRequest(kept_rows=True), "plan.kept_rows"),
    ],
)
def test_requests_are_checked(plan: object, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        pk.PlanRequest.of(plan)  # type: ignore[arg-type]


def test_limits_nest_and_are_restored() -> None:
    def budget(plan: object = None) -> int | None:
        return pk.PlanRequest.of(plan).budget  # type: ignore[arg-type]

    assert budget() is None
    with pk.workspace_limit(1000):
        assert budget() == 1000
        with pk.workspace_limit(500):
            assert budget() == 500
        with pytest.raises(KeyError), pk.workspace_limit(700):
            raise KeyError
        assert budget() == 1000
        # A limit bounds what a caller asks for as well.
        assert budget(pk.PlanRequest(budget=2000)) == 1000
        assert budget(pk.PlanRequest(budget=200)) == 200
    assert budget() is None


def test_limits_of_threads_need_not_end_in_turn() -> None:
    first, second = pk.workspace_limit(1000), pk.workspace_limit(500)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert pk.PlanRequest.of(None).budget == 500
    second.__exit__(None, None, None)
    assert pk.PlanRequest.of(None).budget is None


# --- explain ---


def test_explain_prints_and_returns_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = torch.empty(4096, 512, device="meta", requires_grad=True)
    weight = torch.empty(65536, 512, device="meta", requires_grad=True)
    plan = pk.explain(hidden, weight, per_token=True, plan="kept:torch_blocked")
    text = capsys.readouterr().out
    assert plan.reason in text
    assert f"{plan.kept_rows} rows kept" in text
    assert "4096 tokens x 65536 entries" in text
    dense = 6 * 4096 * 512 * 65536
    assert f"{plan.flops / 1e9:.1f} GFLOP; dense {dense / 1e9:.1f} GFLOP" in text
    assert f"{plan.workspace_bytes / 2**20:.1f} MiB of 240.0 MiB allowed" in text
    assert 6 * 4096 * 512 * 65536 < plan.flops < 8 * 4096 * 512 * 65536


def test_explain_of_the_accumulator_and_the_filter(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = torch.empty(4096, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(65536, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    request = pk.PlanRequest("early", "torch_blocked", filter=1e-4, token_block=512)
    assert pk.explain(hidden, weight, plan=request).weight_accumulator
    text = capsys.readouterr().out
    assert "16.0 MiB to add up the weight gradient" in text
    assert "filter" in text


def test_a_plan_can_be_passed_back(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = torch.randn(700, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=True)
    labels = torch.randint(3000, (700,))
    with pk.workspace_limit(2 << 20):
        plan = pk.explain(hidden, weight, plan="late")
        pk.linear_cross_entropy(hidden, weight, labels, plan=plan).backward()
    again = pk.explain(hidden, weight, plan=plan)
    assert again == plan
    capsys.readouterr()
