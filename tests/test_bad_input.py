"""Every public function, every argument, every way to get it wrong: refused by name, before work.

The calls that work are in good_calls.py, the bad values of each argument in bad_values.py. A new
function, or a new argument without bad values, fails here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bad_values import BAD, PARTNERS
from good_calls import (
    GOOD,
    VARIANTS,
    WITH,
    V,
    Values,
    call,
    teacher_head,
    topk_advantage,
    topk_teacher,
)
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import pad_kernels as pk
from pad_kernels.engine.workspace import account

pytestmark = pytest.mark.usefixtures("one_thread")

#: Named tuples that functions return, the plan that the planner makes, and names without arguments.
OUTPUTS = {
    "DistillOutput",
    "KTOOutput",
    "ListwiseEstimate",
    "ORPOOutput",
    "PairwiseOutput",
    "Plan",
    "TokenStats",
    "TopK",
}
WITHOUT_ARGUMENTS = {"__version__", "available_backends"}
#: Modules, whose names are not those of the package; each has a test of its own.
MODULES = {"compat", "nn"}
#: Fields are named as those of the argument that holds them.
PREFIX = {
    "PlanRequest": r"plan\.",
    "TopKTeacher": r"teacher\.",
    "TopKAdvantage": r"aligned\.",
}


def arguments(name: str) -> list[str]:
    return list(inspect.signature(getattr(pk, name)).parameters)


def given(name: str, argument: str | None = None, variant: str = "") -> Values:
    """A call that works, with this argument in it."""
    torch.manual_seed(0)
    change = VARIANTS[name][variant]() if variant else WITH.get((name, argument or ""), {})
    return {**GOOD[name](), **change}


def bad_values(name: str, argument: str, values: Values) -> Values:
    """What must be refused for an argument of this call."""
    bad = dict(BAD[argument](values))
    if name == "linear_divergence" and getattr(values["teacher"], "tail", "") == "renormalize":
        # It makes no pass over the vocabulary: no workspace, and labels only leave tokens out.
        for label in [x for x in bad if x == "impossible budget" or x.startswith("label ")]:
            del bad[label]
    return bad


def cases(name: str, variant: str = "") -> Iterator[Any]:
    for argument in arguments(name):
        values = given(name, argument, variant)
        bad: Iterable[str] = ["missing"]
        if variant and values[argument] is None:
            bad = ["head"]
        elif argument in BAD:
            bad = bad_values(name, argument, values)
        for label in bad:
            names = [name, variant, argument, label]
            yield pytest.param(*names, id="-".join(filter(None, names)))


CASES = [
    case
    for name in GOOD
    for variant in ("", *VARIANTS.get(name, ()))
    for case in cases(name, variant)
]


def test_every_public_name_is_walked() -> None:
    assert set(pk.__all__) - MODULES == GOOD.keys() | OUTPUTS | WITHOUT_ARGUMENTS
    for name in MODULES & set(pk.__all__):
        assert inspect.ismodule(getattr(pk, name))
    assert not arguments("available_backends")
    for name in OUTPUTS:
        assert hasattr(getattr(pk, name), "_fields") or dataclasses.is_dataclass(getattr(pk, name))


@pytest.mark.parametrize("name", GOOD)
def test_every_argument_has_good_and_bad_values(name: str) -> None:
    for variant in ("", *VARIANTS.get(name, ())):
        call(name, given(name, variant=variant))
    for argument in arguments(name):
        with_it = given(name, argument)
        assert argument in with_it, f"{name} has a new argument {argument}: give it a good value"
        assert argument in BAD, f"{name} has a new argument {argument}: give it bad values"
        call(name, with_it)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same values, changed one by one."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **_changed(vars(value), change))
    if isinstance(value, dict):
        return {name: _changed(x, change) for name, x in value.items()}
    if isinstance(value, list):
        return [_changed(x, change) for x in value]
    return change(value)


def _of_numpy(value: Any) -> Any:
    """A number as numpy has it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return (np.int64 if isinstance(value, int) else np.float64)(value)


@pytest.mark.parametrize("name", GOOD)
def test_numbers_of_numpy_are_numbers(name: str) -> None:
    values = given(name)
    if "plan" in values and name != "explain":
        values["plan"] = pk.PlanRequest("late", budget=1 << 28, vocab_block=64, filter=0.0)
    call(name, _changed(values, _of_numpy))


def _turned(value: Any) -> Any:
    """A tensor whose rows are its columns in memory, or whose entries lie apart."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    x = value.detach()
    x = x.mT.contiguous().mT if x.dim() > 1 else torch.stack((x, x), -1)[..., 0]
    return x.requires_grad_(value.requires_grad)


def _outputs(name: str, values: Values) -> list[Tensor]:
    """What a call returns, and the gradients of its inputs."""
    torch.manual_seed(1)
    found = call(name, values)
    tensors = [x for x in (found if isinstance(found, tuple) else (found,)) if _plain(x)]
    leaves = [x for x in _tensors(values) if x.requires_grad]
    total = sum((x.sum() for x in tensors if x.requires_grad), torch.zeros(()))
    if not leaves or not total.requires_grad:
        return tensors
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*tensors, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize(
    ("name", "variant"),
    [(n, v) for n in GOOD for v in ("", *VARIANTS.get(n, ())) if n != "explain"],
)
def test_the_layout_of_tensors_does_not_matter(name: str, variant: str) -> None:
    values = given(name, variant=variant)
    pairs = zip(_outputs(name, values), _outputs(name, _changed(values, _turned)), strict=True)
    for straight, turned in pairs:
        torch.testing.assert_close(turned, straight)


def _tensors(values: Values) -> Iterator[Tensor]:
    """The tensors of a call, those of its heads and offline teachers too."""
    for value in values.values():
        if isinstance(value, pk.Head | pk.TopKTeacher | pk.TopKAdvantage):
            yield from _tensors(vars(value))
        elif isinstance(value, list):
            yield from _tensors(dict(enumerate(value)))
        elif _plain(value):
            yield value


def _plain(value: Any) -> bool:
    """Whether it is a tensor that can be copied and compared."""
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value):
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_quantized:
        a, b = a.int_repr(), b.int_repr()
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@pytest.mark.parametrize(("name", "variant", "argument", "label"), CASES)
def test_refused_by_name_before_work(name: str, variant: str, argument: str, label: str) -> None:
    assert argument in BAD, f"{name} has a new argument {argument}: give it bad values"
    values = given(name, argument, variant)
    if label == "head":
        values[argument] = teacher_head()
    else:
        values[argument] = BAD[argument](values)[label]
    refused(name, values, "|".join((argument, *PARTNERS.get(argument, ()))))


def refused(name: str, values: Values, allowed: str) -> None:
    """Raises and names one of these, without workspace, and nothing has changed."""
    before = [(x, x.detach().clone(), x._version) for x in _tensors(values)]
    account.reset()
    with pytest.raises((TypeError, ValueError)) as caught:
        call(name, values)
    prefix = PREFIX.get(name, "")
    assert caught.match(rf"^{prefix}({allowed})(\.\w+|\[\d\])?: expected .+, got .+")
    assert account.high_water == account.current == 0
    for x, value, version in before:
        assert x._version == version
        assert _same(x.detach(), value)


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
        ("linear_divergence", {"kind": "forward_kl"}, "alpha"),
        ("linear_divergence", {"kind": "reverse_kl"}, "alpha"),
        ("linear_divergence", {"kind": "tvd"}, "alpha"),
        ("linear_divergence", {"reduction": "sum"}, "normalizer"),
        ("linear_divergence", {"reduction": "none"}, "normalizer"),
        ("linear_divergence", {"labels": None}, "shift"),
        ("linear_divergence", {"labels": None, "shift": False}, "cu_seqlens"),
        ("linear_divergence", {"shift": False}, "cu_seqlens"),
        ("linear_expected_advantage", {"reference": None}, "reference"),
        ("linear_expected_advantage", {"aligned": topk_advantage()}, "reference"),
        ("linear_expected_advantage", {"reduction": "none"}, "normalizer"),
        ("linear_distill", {"kind": "forward_kl"}, "alpha"),
        ("linear_distill", {"reduction": "sum"}, "normalizer"),
        ("linear_distill", {"reduction": "none"}, "normalizer"),
        ("linear_distill", {"teacher": None}, "teacher"),
        ("linear_distill", {"aligned": None}, "aligned"),
        ("linear_distill", {"aligned": None, "reference": None}, "aligned"),
        ("linear_distill", {"aligned": None, "advantage_weight": 0.0}, "aligned"),
        ("linear_distill", {"reference": None}, "reference"),
        ("linear_distill", {"aligned": topk_advantage()}, "reference"),
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


#: What a weight of 0 leaves out is still looked at: a typing error does not wait for a warm-up.
UNUSED = {"divergence_weight": 0.0, "advantage_weight": 0.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": 3}, "teacher"),
        ({"aligned": 3}, "aligned"),
        ({"reference": 3}, "reference"),
        ({"reference": None}, "reference"),
        ({"aligned": topk_advantage()}, "reference"),
    ],
)
def test_teachers_without_weight_are_checked(change: Values, named: str) -> None:
    call("linear_distill", {**given("linear_distill"), **UNUSED})
    refused("linear_distill", {**given("linear_distill"), **UNUSED, **change}, named)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("weight", ["ce", "divergence", "advantage", "entropy"])
def test_weights_are_checked_whatever_the_reduction(weight: str, reduction: str) -> None:
    values = {**given("linear_distill"), "reduction": reduction, "normalizer": None}
    refused("linear_distill", {**values, f"{weight}_weight": torch.rand(9)}, f"{weight}_weight")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("pairwise_preference_loss", "ref_chosen"),
        ("listwise_preference_loss", "teacher_rewards"),
        ("linear_preference_loss", "teacher_rewards"),
    ],
)
def test_where_nothing_is_differentiated_a_teacher_may_require_grad(
    name: str, argument: str
) -> None:
    values = given(name)
    values[argument].requires_grad_()
    refused(name, values, argument)
    with torch.no_grad():
        call(name, values)


@pytest.mark.parametrize("plan", ["reference", "late", "kept", "early"])
@pytest.mark.parametrize("field", ["ids", "logprobs", "values"])
def test_offline_values_are_checked_under_every_plan(field: str, plan: str) -> None:
    advantage = field == "values"
    name = "linear_expected_advantage" if advantage else "linear_divergence"
    argument, good = ("aligned", topk_advantage()) if advantage else ("teacher", topk_teacher())
    spoiled = getattr(good, field).clone()
    spoiled[4, 1] = V if field == "ids" else torch.nan
    change = {"reference": None} if advantage else {}
    values = {**given(name), **change, "plan": plan}
    bad = dataclasses.replace(good, **{field: spoiled})
    refused(name, {**values, argument: bad}, argument)
    if plan == "reference":
        return  # dense: it looks at every row
    # Labels are shifted: without the next one nobody looks at what was kept of a row.
    left_out = values["labels"].clone()
    left_out[5] = values["ignore_index"]
    call(name, {**values, argument: bad, "labels": left_out})


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("name", ["linear_divergence", "linear_distill"])
def test_early_plans_are_for_one_number(name: str, tail: str) -> None:
    values = {**given(name), "teacher": topk_teacher(tail), "plan": "early"}
    call(name, values)
    refused(name, {**values, "reduction": "none", "normalizer": None}, "plan")
