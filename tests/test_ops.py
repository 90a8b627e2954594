"""The ``torch.library`` ops as PyTorch sees them: opcheck, compiled code, autocast, no_grad.

What autograd may and may not do with them is in test_autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_probe import Probe, Watch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine import call, candidates, mixture, ops, scaling
from pad_kernels.engine import topk as topk_module
from pad_kernels.sequence import listwise_op, rewards

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 12, 5, 23


def make(dtype: torch.dtype = torch.float32, grad: bool = True) -> dict[str, Tensor]:
    labels = torch.randint(V - 3, (N,))  # the last three may be padding
    labels[3] = -100
    return {
        "hidden": torch.randn(N, H, dtype=dtype).requires_grad_(grad),
        "weight": torch.randn(V, H, dtype=dtype).requires_grad_(grad),
        "labels": labels,
    }


# --- opcheck ---

Calls = list[tuple[Any, tuple[Any, ...]]]
#: Only these have a derivative; the others are called with tensors that do not require grad.
DIFFERENTIABLE = ("token_outputs", "weighted_sum", "listwise_preference", "candidate_logits")
#: The backward of early float16 always changes in place what the forward returned beside the loss;
#: the last utility compares those tensors too, and would see them before and after.
IN_PLACE = ("test_schema", "test_autograd_registration", "test_faketensor")
#: Modules that hold an op under its own name, where the code that calls it looks it up.
HOLDERS = [ops, scaling, candidates, topk_module, listwise_op, rewards]


class _Recorder:
    """Stands in for an op, notes its arguments, and calls it."""

    def __init__(self, op: Any, calls: Calls) -> None:
        self.op, self.calls = op, calls

    def __call__(self, *args: Any) -> Any:
        # Gradients in the making are changed in place: keep what they were.
        kept = [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in args]
        self.calls.append((self.op._opoverload, tuple(kept)))
        return self.op(*args)


def record(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call of one of our ops from here on, with its arguments."""
    calls: Calls = []
    users = [*HOLDERS, pk.api, mixture, pk.sequence.plackett_luce]
    for holder in HOLDERS:
        for name, op in list(vars(holder).items()):
            if isinstance(op, torch._library.custom_ops.CustomOpDef):
                stand_in = _Recorder(op, calls)
                for user in users:
                    if vars(user).get(name) is op:
                        monkeypatch.setattr(user, name, stand_in)
    return calls


def backward(loss: Tensor, **options: Any) -> None:
    loss.sum().backward(**options)


def _given(plan: str) -> dict[str, Tensor]:
    """Inputs; no rows are ignored for kept plans, whose room for such rows is never written."""
    given = make()
    return {**given, "labels": given["labels"].clamp(min=0)} if plan == "kept" else given


def _cross_entropy(plan: str, **options: Any) -> Callable[[], None]:
    return lambda: backward(pk.linear_cross_entropy(**_given(plan), plan=plan, **options) * 2.0)


def _logprob(plan: str, **options: Any) -> Callable[[], None]:
    return lambda: backward(pk.linear_logprob(**_given(plan), plan=plan, **options))


def _second_derivative() -> None:
    given = make()
    loss = pk.linear_cross_entropy(**given, plan="early")
    torch.autograd.grad(loss, given["hidden"], create_graph=True)


def _listwise(kind: str, **options: Any) -> Callable[[], None]:
    def run() -> None:
        student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
        backward(pk.listwise_preference_loss(student, teacher, kind=kind, **options))

    return run


def _renormalized() -> None:
    x = make()
    ids = torch.stack([torch.randperm(V)[:3] for _ in range(N)])
    teacher = pk.TopKTeacher(ids, torch.full((N, 3), -1.5), "renormalize")
    student = pk.Head(x["hidden"], x["weight"])
    backward(pk.linear_divergence(student, teacher, labels=x["labels"]))


CASES: dict[str, Callable[[], None]] = {
    "renormalized": _renormalized,
    **{f"cross_entropy-{s}": _cross_entropy(s) for s in ("early", "late", "kept", "reference")},
    "cross_entropy-torch": _cross_entropy("early:torch_blocked", label_smoothing=0.1, z_loss=0.1),
    "cross_entropy-bias": _cross_entropy("early", bias=torch.randn(V, requires_grad=True)),
    "cross_entropy-frozen": lambda: backward(
        pk.linear_cross_entropy(**{**make(), "weight": torch.randn(V, H)})
    ),
    "cross_entropy-half": lambda: backward(
        pk.linear_cross_entropy(**make(torch.float16), plan="early")
    ),
    "cross_entropy-no-grad": lambda: [pk.linear_cross_entropy(**make(grad=False)), None][1],
    **{f"logprob-{s}": _logprob(s) for s in ("late", "kept", "reference", "late:torch_blocked")},
    "logprob-bias": _logprob("kept", bias=torch.randn(V, requires_grad=True), softcap=5.0),
    "logprob-padded": _logprob("late", vocab_size=V - 3, temperature=2.0),
    "token_stats": lambda: backward(pk.linear_token_stats(**_given("kept")).entropy),
    "topk": lambda: [pk.linear_topk(make()["hidden"], make()["weight"], 4), None][1],
    "options": lambda: backward(
        pk.option_logprobs(make()["hidden"], make()["weight"], torch.tensor([3, 1, 7]))
    ),
    "second-derivative": _second_derivative,
    **{f"listwise-{kind}": _listwise(kind) for kind in ("jsd", "kl", "reverse_kl", "ranking")},
    "listwise-sampled": _listwise("jsd", samples=8, seed=3),
    "listwise-subsets": _listwise("kl", subset_size=2, valid=torch.arange(12).view(3, 4) % 5 != 3),
    "packed-rewards": lambda: [
        pk.sequence_reward(torch.randn(6), cu_seqlens=torch.tensor([0, 2, 6])),
        None,
    ][1],
}
_covered: set[str] = set()


def _detached(x: Any) -> Any:
    if isinstance(x, list):
        return [_detached(y) for y in x]
    return x.detach() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("case", CASES)
def test_opcheck(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    calls = record(monkeypatch)
    CASES[case]()
    assert calls
    monkeypatch.undo()
    for op, args in calls:
        _covered.add(op.name().split(".")[0])
        if op.name().split("::")[1] not in DIFFERENTIABLE:
            args = tuple(_detached(x) for x in args)
        options = {"test_utils": IN_PLACE} if case == "cross_entropy-half" else {}
        torch.library.opcheck(op, args, **options)


#: Ops over CUDA kernels; test_cuda_sequences.py checks them, with the kernels compiled for a CPU.
_ELSEWHERE = {
    f"pad_kernels::token_{name}{part}"
    for name in ("rewards", "listwise")
    for part in ("", "_gradient")
}


def test_every_op_has_a_case() -> None:
    """Runs after test_opcheck; a new op without a case above fails here."""
    if len(_covered) == 0:
        pytest.skip("test_opcheck did not run")
    known = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("pad_kernels::")}
    assert _covered | _ELSEWHERE == known


# --- compiled code ---


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _preference(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    groups = hidden.shape[0] // 4
    rewards_ = torch.arange(4.0).expand(groups // 2, 4).contiguous()
    # [groups * n, T, H] with T = 2
    rows = hidden[: groups // 2 * 8].reshape(-1, 2, H)
    labels = labels[: groups // 2 * 8].reshape(-1, 2)
    return pk.linear_preference_loss(rows, weight, labels, rewards_, beta=1.0, **options)


ONE_HEAD: dict[str, Callable[..., Any]] = {
    "linear_logprob": pk.linear_logprob,
    "linear_token_stats": lambda *a, **k: torch.stack(pk.linear_token_stats(*a, **k)[:3]),
    "linear_cross_entropy": pk.linear_cross_entropy,
    "linear_cross_entropy_none": lambda *a, **k: pk.linear_cross_entropy(*a, **k, reduction="none"),
    "linear_cross_entropy_late": lambda *a, **k: pk.linear_cross_entropy(*a, **k, plan="late"),
    "linear_topk": lambda h, w, y, **k: pk.linear_topk(h, w, 3, **k).logprobs,
    "option_logprobs": lambda h, w, y, **k: pk.option_logprobs(h, w, y.clamp(min=0)[:3], **k),
    "linear_preference_loss": _preference,
}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ONE_HEAD)
def test_compiled_equals_eager(name: str) -> None:
    def run(function: Callable[..., Tensor], n: int) -> list[Tensor]:
        torch.manual_seed(n)
        hidden = torch.randn(n, H, requires_grad=True)
        weight = torch.randn(V, H, requires_grad=True)
        labels = torch.randint(V, (n,))
        labels[1] = -100
        value = function(hidden, weight, labels, softcap=8.0)
        found = [value.detach()]
        if value.requires_grad:
            found += torch.autograd.grad((value * value).sum(), (hidden, weight))
        return found

    compiled = torch.compile(ONE_HEAD[name], fullgraph=True, backend="aot_eager")
    # The second size recompiles with a symbolic one, the third must do with that.
    for n in (16, 24, 32):
        for one, other in zip(run(compiled, n), run(ONE_HEAD[name], n), strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor_with_its_surroundings() -> None:
    def step(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return pk.linear_cross_entropy(torch.tanh(x) * 2, weight, labels, z_loss=1e-3) * 3

    given = make()
    expected = torch.autograd.grad(step(*given.values()), (given["hidden"], given["weight"]))
    loss = torch.compile(step, fullgraph=True)(*given.values())
    found = torch.autograd.grad(loss, (given["hidden"], given["weight"]))
    torch.testing.assert_close(found, expected)


# --- autocast ---


@pytest.mark.parametrize("plan", ["early", "late", "kept", "late:torch_blocked"])
def test_autocast_casts_the_products_only(plan: str) -> None:
    given = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pk.linear_cross_entropy(**given, plan=plan)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (given["hidden"], given["weight"]))
    assert [g.dtype for g in found] == [torch.float32] * 2

    rounded = [given[n].detach().bfloat16().float().requires_grad_() for n in ("hidden", "weight")]
    exact = pk.linear_cross_entropy(*rounded, given["labels"])
    # It is the rounded operands' loss but for the rounding of the logits, and not the exact one.
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert loss != pk.linear_cross_entropy(**given)
    for one, other in zip(found, torch.autograd.grad(exact, rounded), strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


def test_autocast_takes_a_bfloat16_hidden_with_a_float32_weight() -> None:
    """What a transformer under autocast hands to its head."""
    given = make()
    given["hidden"] = given["hidden"].detach().bfloat16().requires_grad_()
    with pytest.raises(TypeError, match=r"^weight: expected hidden's dtype"):
        pk.linear_cross_entropy(**given)
    with torch.autocast("cpu", torch.bfloat16):
        pk.linear_cross_entropy(**given).backward()
    assert given["hidden"].grad.dtype == torch.bfloat16
    assert given["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("plan", ["early", "late", "reference"])
def test_autocast_is_off_inside_the_ops(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    seen: list[bool] = []

    def spy(function: Any) -> Any:
        def look(*args: Any, **options: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return function(*args, **options)

        return look

    monkeypatch.setattr(ops, "build_problem", spy(ops.build_problem))
    for name in ("forward", "backward"):
        monkeypatch.setattr(ops.reference, name, spy(getattr(ops.reference, name)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = pk.linear_cross_entropy(**make(), plan=plan)
        assert torch.is_autocast_enabled("cpu")
        loss.backward()
    assert seen
    assert not any(seen)


def test_float64_is_not_cast_by_autocast() -> None:
    given = make(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pk.linear_logprob(**given), pk.linear_logprob(**given))
        cast = pk.linear_logprob(**given)
    assert cast.dtype == torch.float64
    assert torch.equal(cast, pk.linear_logprob(**given))


# --- no gradient, no gradient's work ---


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("op", "plan"),
    [
        *((pk.linear_cross_entropy, plan) for plan in (None, "early", "late", "kept")),
        *((pk.linear_token_stats, plan) for plan in (None, "late", "kept")),
    ],
)
def test_nobody_makes_gradients_that_nobody_wants(
    monkeypatch: pytest.MonkeyPatch, mode: Any, plan: str | None, op: Any
) -> None:
    given = make()
    expected = op(**given)
    with mode():
        found = op(**given, plan=plan)
    for one, other in zip(torch.atleast_1d(found), torch.atleast_1d(expected), strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other.detach())
    probe = Probe.install(monkeypatch)
    with Watch() as watch, torch.no_grad():
        op(**given, plan=plan)
    assert watch.flops == 2 * (N - 1) * H * V
    assert probe.plans[0].flops == 2 * N * H * V
    assert all(x.numel() <= 8 * N for x in probe.outputs)


def test_ordinary_tensors_work_after_inference_mode() -> None:
    given = make()
    with torch.inference_mode():
        pk.linear_cross_entropy(**given)
    pk.linear_cross_entropy(**given).backward()
    assert given["weight"].grad.isfinite().all()


def test_the_recipe_says_what_is_wanted() -> None:
    given = make()
    made = call.Call(pk.Head(given["hidden"], given["weight"].detach()))
    assert made.recipe([]).needs == (True, False, False)
    with torch.no_grad():
        assert made.recipe([]).needs == (False, False, False)
