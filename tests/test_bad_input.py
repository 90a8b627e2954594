"""Every public function, every argument, every way to get it wrong: refused by name, before work.

The calls that work are in good_calls.py, the bad values of each argument in bad_values.py. A new
function, or a new argument without bad values, fails here.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from bad_values import BAD, PARTNERS
from good_calls import GOOD, WITH, Values, call
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.workspace import account

pytestmark = pytest.mark.usefixtures("one_thread")

#: Named tuples that functions return, the plan that the planner makes, and names without arguments.
OUTPUTS = {
    "KTOOutput",
    "ListwiseEstimate",
    "ORPOOutput",
    "PairwiseOutput",
    "Plan",
    "TokenStats",
    "TopK",
}
WITHOUT_ARGUMENTS = {"__version__", "available_backends"}


def arguments(name: str) -> list[str]:
    return list(inspect.signature(getattr(pk, name)).parameters)


def given(name: str, argument: str | None = None) -> Values:
    """A call that works, with this argument in it."""
    torch.manual_seed(0)
    return {**GOOD[name](), **WITH.get((name, argument or ""), {})}


CASES = [
    pytest.param(name, argument, label, id=f"{name}-{argument}-{label}")
    for name in GOOD
    for argument in arguments(name)
    for label in (BAD[argument](given(name, argument)) if argument in BAD else ["missing"])
]


def test_every_public_name_is_walked() -> None:
    assert set(pk.__all__) == GOOD.keys() | OUTPUTS | WITHOUT_ARGUMENTS
    assert not arguments("available_backends")
    for name in OUTPUTS:
        assert hasattr(getattr(pk, name), "_fields") or dataclasses.is_dataclass(getattr(pk, name))


@pytest.mark.parametrize("name", GOOD)
def test_every_argument_has_good_and_bad_values(name: str) -> None:
    call(name, given(name))
    for argument in arguments(name):
        with_it = given(name, argument)
        assert argument in with_it, f"{name} has a new argument {argument}: give it a good value"
        assert argument in BAD, f"{name} has a new argument {argument}: give it bad values"
        call(name, with_it)


def _snapshot(values: Values) -> dict[str, tuple[Tensor, int]]:
    return {
        k: (v.detach().clone(), v._version)
        for k, v in values.items()
        if isinstance(v, Tensor) and v.layout == torch.strided and v.device.type == "cpu"
    }


def _same(a: Any, b: Any) -> bool:
    return bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


@pytest.mark.parametrize(("name", "argument", "label"), CASES)
def test_refused_by_name_before_work(name: str, argument: str, label: str) -> None:
    assert argument in BAD, f"{name} has a new argument {argument}: give it bad values"
    values = given(name, argument)
    values[argument] = BAD[argument](values)[label]
    untouched = {k: v for k, v in values.items() if k != argument}
    before = _snapshot(untouched)
    account.reset()
    with pytest.raises((TypeError, ValueError)) as caught:
        call(name, values)
    allowed = "|".join((argument, *PARTNERS.get(argument, ())))
    # PlanRequest's fields are named as the plan= argument's.
    assert caught.match(rf"^(plan\.)?({allowed})(\.\w+)?: expected .+, got .+")
    assert account.high_water == account.current == 0
    for key, (value, version) in before.items():
        assert values[key]._version == version
        assert _same(values[key].detach(), value)


# --- what one bad value cannot say ---


@pytest.mark.parametrize("name", [n for n in GOOD if "plan" in arguments(n)])
def test_the_smallest_budget_that_is_named_works(name: str) -> None:
    values = given(name)
    values["plan"] = pk.PlanRequest(budget=1)
    with pytest.raises(ValueError, match=r"^plan: expected a workspace budget of at least") as e:
        call(name, values)
    smallest = int(str(e.value).split("at least ")[1].split(" bytes")[0])
    with pk.workspace_limit(smallest - 1), pytest.raises(ValueError, match=str(smallest)):
        call(name, {**values, "plan": None if name != "explain" else "late"})
    values["plan"] = pk.PlanRequest(budget=smallest)
    call(name, values)


@pytest.mark.parametrize(
    ("kind", "n"), [("jsd", 20), ("jsd", 9), ("jsd_released", 9), ("kl", 17), ("reverse_kl", 17)]
)
def test_too_many_responses_to_rank_exactly(kind: str, n: int) -> None:
    with pytest.raises(ValueError, match=rf"^student_rewards: .*subset_size=.*, got {n}$"):
        pk.listwise_preference_loss(torch.zeros(1, n), torch.zeros(1, n), kind=kind)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "ranking", "top1"])
def test_samples_are_for_kinds_that_are_sampled(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^samples: expected None"):
        pk.listwise_preference_loss(torch.zeros(1, 3), torch.zeros(1, 3), kind=kind, samples=8)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("linear_cross_entropy", {"reduction": "sum"}, "normalizer"),
        ("linear_cross_entropy", {"reduction": "none"}, "normalizer"),
        ("linear_logprob", {"shift": False}, "cu_seqlens"),
        ("linear_topk", {"plan": "reference"}, "plan"),
        ("linear_topk", {"vocab_size": 2}, "k"),
        ("kto_loss", {"kl": None}, "kl_logprob"),
        ("kto_loss", {"kind": "apo_zero_unpaired"}, "kl"),
        ("kto_loss", {"kl_logprob": torch.zeros(3)}, "kl"),
        ("pairwise_preference_loss", {"kind": "hinge"}, "label_smoothing"),
        ("pairwise_preference_loss", {"kind": "simpo"}, "ref_chosen"),
        ("pairwise_preference_loss", {"gamma": 0.5}, "gamma"),
        ("pairwise_preference_loss", {"ref_chosen": None}, "ref_chosen"),
        (
            "pairwise_preference_loss",
            {"ref_rejected": torch.zeros(5).requires_grad_()},
            "ref_rejected",
        ),
        ("cpo_loss", {"kind": "hinge"}, "label_smoothing"),
        ("cpo_loss", {"gamma": 0.5}, "gamma"),
        ("orpo_loss", {"chosen": torch.ones(5)}, "chosen"),
        ("calibrated_rewards", {"option_probability": torch.full((5,), 1.5)}, "option_probability"),
        (
            "calibrated_rewards",
            {"option_probability": torch.full((5,), torch.nan)},
            "option_probability",
        ),
        ("linear_preference_loss", {"teacher_rewards": torch.zeros(4, 4)}, "cu_seqlens"),
    ],
)
def test_arguments_that_do_not_go_together(name: str, change: Values, named: str) -> None:
    values = {**given(name), **change}
    with pytest.raises((TypeError, ValueError), match=rf"^{named}: expected"):
        call(name, values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("argument", ["hidden", "weight", "bias"])
def test_dtypes_are_not_mixed(argument: str, dtype: torch.dtype) -> None:
    values = given("linear_logprob")
    values[argument] = values[argument].detach().to(dtype)
    with pytest.raises(TypeError, match=r"^(weight|bias): expected hidden's dtype"):
        pk.linear_logprob(**values)
