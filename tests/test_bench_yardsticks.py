"""The benchmark's yardsticks: its oracle, the tensors of a case, and the floors."""

import pytest
import torch
import torch.nn.functional as F

from pad_kernels.bench import cases, gate, timing
from pad_kernels.bench.cases import OPS, Case, make_inputs
from pad_kernels.bench.implementations import all_implementations

CPU = torch.device("cpu")


def _case(op: str, dtype: str = "float32", ignored: float = 0.0) -> Case:
    return Case(op, 24, 16, 300, dtype, ignored)


def _by_hand(op: str, s: torch.Tensor, teachers: list[torch.Tensor], picks: torch.Tensor):
    """Per-token values and their gradients by the student's logits, of probabilities."""
    hot = F.one_hot(picks, s.shape[1]).double()
    logprob = s.gather(1, picks[:, None])[:, 0].log()
    if op == "cross_entropy":
        return -logprob, s - hot
    if not teachers:
        return logprob, hot - s
    t = teachers[0]
    if op in ("forward_kl", "distill"):
        ce = op == "distill"
        value = (t * (t / s).log()).sum(1) - ce * logprob
        return value, s - t + ce * (s - hot)
    if op == "advantage":
        slope = (t / teachers[1]).log()
        value = (s * slope).sum(1)
        return value, s * (slope - value[:, None])
    assert op == "jsd"
    m, slope = (s + t) / 2, (2 * s / (s + t)).log() / 2
    value = ((t * (t / m).log()).sum(1) + (s * (s / m).log()).sum(1)) / 2
    return value, s * (slope - (s * slope).sum(1, keepdim=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_oracle_agrees_with_closed_forms(
    op: str, ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CELLS", 10 * 300)
    monkeypatch.setattr(gate, "BLOCK", 128)
    case = _case(op, ignored=ignored)
    inputs = make_inputs(case, CPU)
    reference = gate.oracle(case, inputs)
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    probs = (hidden @ weight.T).softmax(1)
    teachers = [(h.double() @ w.double().T).softmax(1) for h, w in inputs.teachers]
    active = inputs.labels != cases.IGNORE
    values, grad = _by_hand(op, probs, teachers, inputs.labels.clamp(min=0))
    upstream = active / active.sum() if OPS[op].mean else inputs.upstream.double()
    values, grad = values * active, grad * (upstream * active)[:, None]
    expected = {"value": values.sum() / active.sum() if OPS[op].mean else values}
    if OPS[op].backward:
        expected |= {"grad_hidden": grad @ weight, "grad_weight": grad.T @ hidden}
    torch.testing.assert_close(reference.tensors, expected)


@pytest.mark.parametrize("op", OPS)
def test_no_value_is_so_near_zero_that_the_gate_would_judge_noise(op: str) -> None:
    reference = gate.oracle(_case(op), make_inputs(_case(op), CPU))
    assert reference.tensors["value"].abs().max() > 0.1


def test_teachers_have_no_gradient_and_the_students_shapes() -> None:
    for op in OPS:
        inputs = make_inputs(_case(op), CPU)
        assert len(inputs.teachers) == OPS[op].teachers
        for hidden, weight in inputs.teachers:
            assert hidden.shape == inputs.hidden.shape and weight.shape == inputs.weight.shape
            assert not (hidden.requires_grad or weight.requires_grad)
            assert not torch.equal(weight, inputs.weight)


def test_teachers_skip_the_larger_shapes_unless_everything_is_asked_for() -> None:
    count = [[c.op for c in cases.make_cases(everything=e)].count("jsd") for e in (False, True)]
    assert count == [2, 6]
    assert [c.op for c in cases.make_cases()].count("score") == 6
    assert len(cases.make_cases(["jsd"], cases.QUICK_SHAPES)) == 2


def test_the_same_case_has_the_same_tensors() -> None:
    one, two = (make_inputs(_case("logprob", ignored=0.25), CPU) for _ in range(2))
    assert torch.equal(one.hidden, two.hidden) and torch.equal(one.labels, two.labels)
    assert int((one.labels == cases.IGNORE).sum()) == 6


def test_nan_is_over_every_bound() -> None:
    assert gate.failures({"value": float("nan")}, {"value": 1.0})
    assert not gate.failures({"value": 1.0}, {"value": 1.0})


def test_floors_are_the_products_of_a_step() -> None:
    case = _case("cross_entropy")
    inputs = make_inputs(case, CPU)
    floor = timing.Floor(case, inputs)
    torch.testing.assert_close(floor.logits, F.linear(inputs.hidden, inputs.weight).detach())
    grad_hidden, grad_weight = floor.backward()
    assert grad_hidden.shape == inputs.hidden.shape and grad_weight.shape == inputs.weight.shape
    products = floor.round(CPU)
    assert 0 < products.of(2) < products.of(6) < products.of(8)


def test_a_floor_counts_its_products() -> None:
    products = timing.Products(logits=2.0, gradients=5.0)
    assert [products.of(g) for g in (2, 6, 8, 10, 16)] == [2.0, 7.0, 9.0, 11.0, 17.0]


def test_late_schedules_do_all_forward_products_twice() -> None:
    found = {i.op: i.gemms for i in all_implementations() if i.name == "pad_kernels late:cpp"}
    assert found == {
        "cross_entropy": 8,
        "logprob": 8,
        "score": 2,
        "forward_kl": 12,
        "jsd": 12,
        "advantage": 16,
        "distill": 12,
    }
