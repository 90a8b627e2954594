"""What listwise losses refuse, and in which words."""

from __future__ import annotations

import math

import pytest
import torch
from listwise_cases import rewards, value_and_grad

from pad_kernels.backends.registry import native
from pad_kernels.sequence import (
    listwise_op,
    listwise_preference_estimate,
    listwise_preference_loss,
)
from pad_kernels.sequence.listwise_op import forced_backend
from pad_kernels.sequence.plackett_luce import KINDS


def good():
    return {"student_rewards": torch.zeros(2, 4), "teacher_rewards": torch.zeros(2, 4)}


BAD = [
    ({"student_rewards": [[0.0, 1.0]]}, TypeError, "student_rewards"),
    ({"student_rewards": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "student_rewards"),
    ({"student_rewards": torch.zeros(8)}, ValueError, "student_rewards"),
    ({"student_rewards": torch.zeros(2, 4).to_sparse()}, TypeError, "student_rewards"),
    (
        {"student_rewards": torch.zeros(2, 1), "teacher_rewards": torch.zeros(2, 1)},
        ValueError,
        "student_rewards: expected at least 2",
    ),
    (
        {"student_rewards": torch.zeros(2, 20), "teacher_rewards": torch.zeros(2, 20)},
        ValueError,
        "at most 8 responses.*samples=",
    ),
    (
        {
            "student_rewards": torch.zeros(2, 17),
            "teacher_rewards": torch.zeros(2, 17),
            "kind": "kl",
        },
        ValueError,
        "at most 16 responses.*subset_size=",
    ),
    ({"teacher_rewards": torch.zeros(3, 4)}, ValueError, "teacher_rewards"),
    ({"teacher_rewards": torch.zeros(2, 4, device="meta")}, ValueError, "teacher_rewards"),
    ({"teacher_rewards": torch.zeros(2, 4, requires_grad=True)}, ValueError, "teacher_rewards"),
    ({"student_rewards": torch.full((2, 4), math.nan)}, ValueError, "student_rewards.*finite"),
    ({"teacher_rewards": torch.full((2, 4), -math.inf)}, ValueError, "teacher_rewards.*finite"),
    ({"beta": 0.0}, ValueError, "beta"),
    ({"beta": -1.0}, ValueError, "beta"),
    ({"beta": math.inf}, ValueError, "beta"),
    ({"beta": "1"}, TypeError, "beta"),
    ({"kind": "js"}, ValueError, "kind"),
    ({"kind": None}, TypeError, "kind"),
    ({"valid": torch.ones(2, 4)}, TypeError, "valid"),
    ({"valid": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "valid"),
    ({"valid": True}, TypeError, "valid"),
    ({"subset_size": 1}, ValueError, "subset_size"),
    ({"subset_size": 5}, ValueError, "subset_size"),
    ({"subset_size": 3}, ValueError, "subset_size.*alone"),
    ({"subset_size": 2.0}, TypeError, "subset_size"),
    ({"samples": 3}, ValueError, "samples"),
    ({"samples": 8.0}, TypeError, "samples"),
    ({"samples": 8, "kind": "kl"}, ValueError, "samples"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 1 << 63}, ValueError, "seed"),
    ({"seed": 0.5, "samples": 8}, TypeError, "seed"),
    ({"reduction": "avg"}, ValueError, "reduction"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=lambda x: str(x)[:40])
def test_bad_arguments(change, error, match):
    for function in (listwise_preference_loss, listwise_preference_estimate):
        with pytest.raises(error, match=match):
            function(**{**good(), **change})


def test_twenty_responses_in_subsets_or_sampled_are_fine():
    s, t = torch.zeros(2, 20), torch.zeros(2, 20)
    assert listwise_preference_loss(s, t, subset_size=5).item() == pytest.approx(0, abs=1e-7)
    assert listwise_preference_loss(s, t, samples=8, seed=0).item() == pytest.approx(0, abs=1e-7)
    assert listwise_preference_loss(s, t, kind="top1").item() == 0


@pytest.mark.parametrize("which", [0, 1])
def test_where_checking_would_wait_bad_rewards_become_nan(monkeypatch, which):
    """What happens on a GPU, whose values the host does not see."""
    monkeypatch.setattr(listwise_op, "_CHECKED_DEVICES", ())
    pair = [rewards(3, 4), rewards(3, 4)]
    pair[which][1, 2] = math.nan
    for kind in KINDS:
        value, grad = value_and_grad(
            lambda x, k=kind: listwise_preference_loss(x, pair[1], kind=k, reduction="none"),
            pair[0],
        )
        assert value.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.skipif(native() is None, reason="no compiled module")
def test_kernels_check_their_arguments():
    with pytest.raises(ValueError, match="kind"):
        native().listwise_words("ranking", 4)
    for kind, n in (("jsd", 9), ("kl", 17), ("kl", 0)):
        with pytest.raises(ValueError, match="n: expected"):
            native().listwise_words(kind, n)


def test_backend_names():
    with pytest.raises(ValueError, match="cpp or torch"), forced_backend("fortran"):
        pass


def test_a_missing_backend_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(listwise_op, "native", lambda: None)
    s, t = rewards(1, 3), rewards(1, 3)
    assert listwise_preference_loss(s, t).isfinite()
    with forced_backend("cpp"), pytest.raises(RuntimeError, match="not available"):
        listwise_preference_loss(s, t)
