"""Every row computed, as in a CUDA graph: the same numbers as when rows are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_backends import BACKENDS
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine import rows
from pad_kernels.engine.plan import PlanRequest

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 23, 12, 507


def heads() -> list[pk.Head]:
    return [pk.Head(torch.randn(N, H) * 2, torch.randn(V, H)) for _ in range(3)]


def offline(kind: type) -> Any:
    ids = torch.stack([torch.randperm(V)[:5] for _ in range(N)])
    if kind is pk.TopKTeacher:
        return pk.TopKTeacher(ids, torch.randn(N, V).log_softmax(-1).gather(1, ids))
    return pk.TopKAdvantage(ids, torch.randn(N, 5))


def labels() -> Tensor:
    found = torch.randint(V, (N,))
    found[torch.randperm(N)[:9]] = -100
    return found


def weights() -> Tensor:
    return torch.rand(N) * (torch.rand(N) > 0.5)


def mixture(student: pk.Head, plan: PlanRequest, given: dict[str, Any]) -> list[Tensor]:
    out = pk.linear_distill(student, given["labels"], plan=plan, **given["options"])
    return [x for x in out if x is not None]


def cases() -> dict[str, Any]:
    _, aligned, reference = heads()
    teachers = {"teacher": aligned, "aligned": aligned, "reference": reference}
    several = {"ce_weight": 0.5, "divergence_weight": weights(), "advantage_weight": weights()}
    return {
        "weighted": {"labels": labels(), "options": {**teachers, **several}},
        # None is left out, yet those that use the same teachers lie side by side.
        "all": {"labels": torch.randint(V, (N,)), "options": {**teachers, **several}},
        "jsd": {"labels": labels(), "options": {**teachers, **several, "kind": "jsd"}},
        "per token": {"labels": labels(), "options": {**teachers, "reduction": "none"}},
        "offline": {
            "labels": labels(),
            "options": {
                "teacher": offline(pk.TopKTeacher),
                "aligned": offline(pk.TopKAdvantage),
                **several,
            },
        },
    }


def run(case: str, given: dict[str, Any], student: pk.Head, request: PlanRequest) -> list[Tensor]:
    hidden = student.hidden.clone().requires_grad_()
    weight = student.weight.clone().requires_grad_()
    found = mixture(pk.Head(hidden, weight), request, given)
    total = sum((x.nan_to_num(neginf=0).sum() for x in found if x.requires_grad), torch.zeros(()))
    return [x.detach() for x in found] + list(torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
@pytest.mark.parametrize("case", ["weighted", "all", "jsd", "per token", "offline"])
def test_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, case: str, schedule: str, backend: str, captured: bool
) -> None:
    if case == "per token" and schedule == "early":
        schedule = "late"
    given, student = cases()[case], heads()[0]
    if case == "offline":  # what an ignored row holds does not matter
        ignored = given["labels"] == -100
        given["options"]["teacher"].ids[ignored] = -1
        given["options"]["teacher"].logprobs[ignored] = torch.nan
        given["options"]["aligned"].values[ignored] = torch.inf
    expected = run(case, given, student, PlanRequest(schedule, backend))
    request = PlanRequest(schedule, backend, compact=captured)
    monkeypatch.setattr(rows, "capturing", lambda *_: captured)
    found = run(case, given, student, request)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("reason", ["capturing", "on_gpu"])
@pytest.mark.parametrize("schedule", ["early", "late"])
def test_a_wrong_input_is_nan_where_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, schedule: str, reason: str
) -> None:
    student = heads()[0]
    hidden = student.hidden.requires_grad_()
    wrong = labels()
    wrong[0] = V
    monkeypatch.setattr(rows, reason, lambda *_: True)
    monkeypatch.setattr(rows, "_to_host", None)
    plan = PlanRequest(schedule, compact=reason == "capturing")
    assert pk.linear_cross_entropy(hidden, student.weight, wrong, plan=plan).isnan()
    per_token = PlanRequest(compact=plan.compact)
    assert pk.linear_logprob(hidden, student.weight, wrong, plan=per_token).isnan().all()
    wrong[0] = -100
    assert pk.linear_cross_entropy(hidden, student.weight, wrong, plan=plan).isfinite()


def test_a_wrong_input_is_an_error_where_rows_are_not_left_out() -> None:
    student = heads()[0]
    with pytest.raises(ValueError, match="labels"):
        pk.linear_cross_entropy(
            student.hidden, student.weight, torch.full((N,), V), plan=PlanRequest(compact=False)
        )
    with pytest.raises(TypeError, match=r"plan\.compact"):
        pk.linear_logprob(*(student.hidden, student.weight), labels(), plan=PlanRequest(compact=1))  # type: ignore[arg-type]
