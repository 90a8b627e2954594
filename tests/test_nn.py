"""Every op has a module that has its options, checks them at once, and computes the same bits."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import bad_values
import pytest
import torch
from good_calls import GOOD

import pad_kernels as pk
import pad_kernels.nn as pknn

pytestmark = pytest.mark.usefixtures("one_thread")

#: Public functions that are not computations a model would have as a part.
NOT_OPS = {"available_backends", "explain", "token_mean_weights", "workspace_limit"}
FUNCTIONS = {name for name in pk.__all__ if inspect.isfunction(getattr(pk, name))}
OPS = sorted(FUNCTIONS - NOT_OPS)
#: What PEP 8 does not make of a function's name.
SPELLED = {
    "linear_logprob": "LinearLogProb",
    "option_logprobs": "OptionLogProbs",
    "linear_topk": "LinearTopK",
    "kto_loss": "KTOLoss",
    "orpo_loss": "ORPOLoss",
    "cpo_loss": "CPOLoss",
}


def module_of(op: str) -> type:
    return getattr(pknn, SPELLED.get(op, op.title().replace("_", "")))


def distillation() -> dict:
    def head(width):
        return pk.Head(torch.randn(10, width), torch.randn(11, width))

    student = pk.Head(torch.randn(10, 4, requires_grad=True), torch.randn(11, 4), softcap=5.0)
    tail = {"ignore_index": -7, "shift": True, "cu_seqlens": torch.tensor([0, 4, 10])}
    labels = torch.tensor([0, 3, -7, 9, 1, 2, -7, 4, 5, 6])
    tail |= {"labels": labels, "plan": "late", "normalizer": 3.0, "reduction": "mean"}
    return {"student": student, "one": head(6), "other": head(3), "tail": tail}


def good(op: str) -> dict:
    """Arguments that work; the ops against teachers have theirs here."""
    if op in GOOD:
        return GOOD[op]()
    given = distillation()
    student, one, other, tail = given.values()
    weights = {"token_weights": torch.rand(10)}
    if op == "linear_divergence":
        teacher = {"student": student, "teacher": one, "kind": "jsd", "alpha": 0.3}
        return {**teacher, **weights, **tail}
    heads = {"student": student, "aligned": one, "reference": other, "beta": 0.5}
    if op == "linear_expected_advantage":
        return {**heads, **weights, **tail}
    assert op == "linear_distill", f"no example of {op}"
    numbers = {"ce_weight": 1.0, "divergence_weight": 0.5, "entropy_weight": 0.1}
    kind = {"kind": "jsd", "alpha": 0.3, "advantage_weight": torch.rand(10)}
    return {**heads, "teacher": other, **numbers, **kind, **tail}


def split(op: str, given: dict) -> tuple[dict, dict]:
    """Arguments of the constructor and of the call."""
    options = {k for k in inspect.signature(module_of(op)).parameters if k in given}
    call = {k: v for k, v in given.items() if k not in options}
    for name in [n for n in options if isinstance(given[n], torch.Tensor)]:
        options.remove(name)  # a per-token weight of linear_distill
        call[name] = given[name]
    return {k: given[k] for k in options}, call


def leaves(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in value if part is not None for x in leaves(part)]


def same(found, expected) -> None:
    assert type(found) is type(expected)
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_all_names_the_modules_and_nothing_else() -> None:
    assert sorted(pknn.__all__) == sorted(module_of(op).__name__ for op in OPS)


@pytest.mark.parametrize("op", OPS)
def test_signatures_share_out_the_functions_parameters(op: str) -> None:
    function = inspect.signature(getattr(pk, op)).parameters
    options = inspect.signature(module_of(op)).parameters
    call = list(inspect.signature(module_of(op).forward).parameters.values())[1:]
    for option in options.values():
        assert option.kind is option.KEYWORD_ONLY
        assert option.default == function[option.name].default
    names = [p.name for p in call]
    assert names == [name for name in function if name in names], "not in the function's order"
    for p in call:
        if p.name not in options:
            assert (p.kind, p.default) == (function[p.name].kind, function[p.name].default)
    both = set(names) & set(options)
    assert both == ({n for n in function if n.endswith("_weight")} if "distill" in op else set())
    assert set(names) | set(options) == set(function)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_as_the_function(op: str) -> None:
    torch.manual_seed(3)
    given = good(op)
    options, call = split(op, given)
    expected = getattr(pk, op)(**given)
    module = module_of(op)(**options)
    same(module(**call), expected)

    first = next(iter(call.values()))
    wanted = first.hidden if isinstance(first, pk.Head) else first
    loss = leaves(expected)[0]
    assert loss.requires_grad == (op not in ("calibrated_rewards", "linear_topk"))
    if not loss.requires_grad:
        return
    (one,) = torch.autograd.grad(loss.sum(), wanted)
    (two,) = torch.autograd.grad(leaves(module(**call))[0].sum(), wanted)
    assert torch.equal(one, two) and one.abs().sum() > 0


@pytest.mark.parametrize("op", OPS)
def test_copies_pickles_and_has_no_state(op: str) -> None:
    torch.manual_seed(4)
    options, call = split(op, good(op))
    module = module_of(op)(**options)
    assert isinstance(module, torch.nn.Module)
    assert not module.state_dict() and not list(module.parameters())
    expected = module(**call)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    again = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for other in [*again, torch.load(saved, weights_only=False), module.eval().to(torch.float64)]:
        assert repr(other) == repr(module)
        same(other(**call), expected)
    parent = torch.nn.ModuleDict({"loss": module})
    assert not parent.state_dict() and module in set(parent.modules())


@pytest.mark.parametrize("op", OPS)
def test_repr_shows_the_options(op: str) -> None:
    options, _ = split(op, good(op))
    module = module_of(op)(**options)
    shown = repr(module)
    assert shown.startswith(type(module).__name__ + "(")
    defaults = inspect.signature(type(module)).parameters
    for name, value in options.items():
        assert getattr(module, name) == value
        assert (f"{name}={value!r}" in shown) == (value != defaults[name].default)


@pytest.mark.parametrize("op", OPS)
def test_unknown_and_positional_options_raise(op: str) -> None:
    options, call = split(op, good(op))
    with pytest.raises(TypeError, match="temprature"):
        module_of(op)(**options, temprature=1.0)
    with pytest.raises(TypeError, match="positional"):
        module_of(op)(1.0)
    with pytest.raises(TypeError, match="temprature"):
        module_of(op)(**options)(**call, temprature=1.0)


def bad_options(op: str) -> list[tuple[str, str]]:
    """(option, value's name) of all that must be refused whatever the tensors are."""
    whole = {"subset_size", "samples", "vocab_size", "k", "ignore_index"}
    cases = []
    for name, parameter in inspect.signature(module_of(op)).parameters.items():
        if name in whole:
            values = bad_values.whole(*([] if name == "ignore_index" else [0, -1]), required=False)
        elif name == "plan":
            values = bad_values.plans(per_token=op in ("linear_logprob", "linear_topk"))
            del values["impossible budget"]  # for some shapes
        elif name in ("kind", "reduction", "normalize"):
            values = bad_values.choices()
        elif name == "shift":
            values = bad_values.flags()
        elif parameter.default is None:
            values = bad_values.numbers(required=False)
        else:
            values = bad_values.numbers(required=True)
        cases += [(name, value, values[value]) for value in values]
    return cases


@pytest.mark.parametrize("op", OPS)
def test_bad_options_raise_in_the_constructor(op: str) -> None:
    options, _ = split(op, good(op))
    for name, case, value in bad_options(op):
        with pytest.raises((TypeError, ValueError), match=name) as caught:
            module_of(op)(**{**options, name: value})
        assert "expected" in str(caught.value), f"{name}: {case}"


@pytest.mark.parametrize(
    ("module", "options", "error", "match"),
    [
        (pknn.LinearDivergence, {"alpha": 0.5}, ValueError, "alpha.*forward_kl"),
        (pknn.LinearDivergence, {"kind": "jsd", "alpha": 1.0}, ValueError, "alpha"),
        (pknn.LinearExpectedAdvantage, {"beta": 0.0}, ValueError, "beta"),
        (pknn.LinearDistill, {"beta": -1.0}, ValueError, "beta"),
        (pknn.LinearDistill, {"ce_weight": torch.ones(2)}, TypeError, "ce_weight.*a number"),
        (pknn.LinearCrossEntropy, {"plan": "early", "reduction": "none"}, ValueError, "plan"),
        (pknn.LinearDistill, {"plan": "early", "reduction": "none"}, ValueError, "plan"),
        (pknn.LinearCrossEntropy, {"label_smoothing": 1.1}, ValueError, "label_smoothing"),
        (pknn.LinearCrossEntropy, {"z_loss": -1.0}, ValueError, "z_loss"),
        (pknn.LinearLogProb, {"softcap": 0.0}, ValueError, "softcap"),
        (pknn.LinearLogProb, {"temperature": 0.0}, ValueError, "temperature"),
        (pknn.PairwisePreferenceLoss, {"gamma": 0.5}, ValueError, "gamma.*simpo"),
        (pknn.PairwisePreferenceLoss, {"label_smoothing": 0.5}, ValueError, "label_smoothing"),
        (pknn.KTOLoss, {"beta": 0.0}, ValueError, "beta"),
        (pknn.KTOLoss, {"desirable_weight": -1.0}, ValueError, "desirable_weight"),
        (pknn.ORPOLoss, {"beta": -1.0}, ValueError, "beta"),
        (pknn.CPOLoss, {"kind": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing"),
        (pknn.CalibratedRewards, {"alpha": 1.5}, ValueError, "alpha"),
        (pknn.CalibratedRewards, {"alpha": 0.5, "floor": 0.0}, ValueError, "floor"),
        (pknn.CalibratedRewards, {}, TypeError, "alpha"),
        (pknn.LinearPreferenceLoss, {}, TypeError, "beta"),
        (pknn.LinearTopK, {}, TypeError, "'k'"),
        (pknn.ListwisePreferenceLoss, {"kind": "kl", "samples": 8}, ValueError, "samples.*kl"),
        (pknn.ListwisePreferenceLoss, {"samples": 3}, ValueError, "samples"),
        (pknn.ListwisePreferenceLoss, {"subset_size": 9}, ValueError, "at most 8"),
    ],
)
def test_refused(module, options, error, match) -> None:
    with pytest.raises(error, match=match):
        module(**options)


def test_constructors_leave_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    for op in OPS:
        options, _ = split(op, good(op))
        state = torch.get_rng_state()
        module_of(op)(**options)
        assert torch.equal(torch.get_rng_state(), state), op


def test_constructors_work_under_another_default_device_and_dtype() -> None:
    before = torch.get_default_dtype()
    made = {op: split(op, good(op))[0] for op in OPS}
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            for op, options in made.items():
                module_of(op)(**options)
    finally:
        torch.set_default_dtype(before)


def test_large_options_allocate_nothing() -> None:
    assert pknn.ListwisePreferenceLoss(subset_size=1 << 40, kind="ranking").subset_size == 1 << 40
    assert pknn.LinearTopK(k=1 << 40).k == 1 << 40


def test_distill_weights_of_the_call_replace_the_modules() -> None:
    torch.manual_seed(5)
    given = good("linear_distill")
    options, call = split("linear_distill", given)
    loss = pknn.LinearDistill(**options)
    tokens = torch.rand(10)
    expected = pk.linear_distill(**{**given, "ce_weight": tokens, "entropy_weight": 0.0})
    same(loss(**call, ce_weight=tokens, entropy_weight=0.0), expected)
    assert expected.entropy == 0 and loss(**call).entropy != 0


def test_an_option_may_change_and_is_then_checked_by_the_call() -> None:
    hidden, weight, labels = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2])
    module = pknn.LinearLogProb()
    module.temperature = 2.0
    same(module(hidden, weight, labels), pk.linear_logprob(hidden, weight, labels, temperature=2.0))
    module.temperature = math.nan
    with pytest.raises(ValueError, match="temperature"):
        module(hidden, weight, labels)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_distill", "kto_loss"])
def test_compiles_in_one_graph(op: str) -> None:
    torch.manual_seed(6)
    options, call = split(op, good(op))
    module = module_of(op)(**options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found, expected = leaves(compiled(**call)), leaves(module(**call))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
