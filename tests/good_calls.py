"""For every public function a call that works, with all of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import pad_kernels as pk

H, V = 4, 11
Values = dict[str, Any]


def _head() -> Values:
    return {
        "hidden": torch.randn(10, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "bias": torch.randn(V),
        "softcap": 5.0,
        "logit_scale": 1.5,
        "temperature": 0.7,
        "vocab_size": V - 1,
        "plan": "late",
    }


def _tokens() -> Values:
    return {
        **_head(),
        "labels": torch.tensor([0, 3, -7, 9, 1, 2, -7, 4, 5, 6]),
        "ignore_index": -7,
        "shift": True,
        "cu_seqlens": torch.tensor([0, 4, 10]),
    }


def _cross_entropy() -> Values:
    return {
        **_tokens(),
        "reduction": "mean",
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "token_weights": torch.rand(10),
        "normalizer": 3.0,
    }


def _listwise() -> Values:
    return {
        "student_rewards": torch.randn(2, 4, requires_grad=True),
        "teacher_rewards": torch.randn(2, 4),
        "beta": 2.0,
        "kind": "jsd",
        "valid": torch.tensor([[True, True, False, True], [True] * 4]),
        "subset_size": 2,
        "samples": 8,
        "seed": 3,
        "reduction": "mean",
    }


def _preference() -> Values:
    # Two groups of four responses, packed, of one to three tokens.
    rest = {k: v for k, v in _listwise().items() if k != "student_rewards"}
    mask = torch.ones(10, dtype=torch.bool)
    return {
        **_tokens(),
        **rest,
        "cu_seqlens": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10]),
        "mask": mask,
        "normalize": "length",
    }


def _pairs() -> Values:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    logprobs = {name: -torch.rand(5) for name in names}
    logprobs["chosen"].requires_grad_()
    return {**logprobs, "kind": "dpo", "beta": 0.1, "label_smoothing": 0.1, "reduction": "mean"}


def _free_pairs() -> Values:
    given = {k: v for k, v in _pairs().items() if not k.startswith("ref")}
    return {**given, "chosen_nll": torch.rand(5)}


def _student() -> pk.Head:
    return pk.Head(**{k: v for k, v in _head().items() if k != "plan"})


def teacher_head(size: int = 6) -> pk.Head:
    """A teacher with a hidden size and options of its own, of the student's vocabulary."""
    tensors = torch.randn(10, size), torch.randn(V, size), torch.randn(V)
    return pk.Head(*tensors, softcap=9.0, logit_scale=0.5, temperature=1.3, vocab_size=V - 1)


def topk_teacher(tail: str = "bucket") -> pk.TopKTeacher:
    ids = torch.rand(10, V - 1).argsort(1)[:, :3]
    return pk.TopKTeacher(ids, torch.randn(10, V - 1).log_softmax(1)[:, :3].clone(), tail)


def topk_advantage() -> pk.TopKAdvantage:
    return pk.TopKAdvantage(topk_teacher().ids, torch.randn(10, 3))


def _against_teachers() -> Values:
    tokens = {k: v for k, v in _tokens().items() if k not in _head() or k == "plan"}
    return {"student": _student(), **tokens, "reduction": "mean", "normalizer": 3.0}


def _distill() -> Values:
    return {
        **_against_teachers(),
        "teacher": teacher_head(),
        "aligned": teacher_head(3),
        "reference": teacher_head(7),
        "kind": "jsd",
        "alpha": 0.3,
        "beta": 2.0,
        "ce_weight": 0.5,
        "divergence_weight": torch.rand(10),
        "advantage_weight": torch.rand(10),
        "entropy_weight": 0.1,
    }


GOOD: dict[str, Callable[[], Values]] = {
    "Head": lambda: {k: v for k, v in _head().items() if k != "plan"},
    "PlanRequest": lambda: {
        "schedule": "late",
        "backend": "torch_blocked",
        "budget": 1000,
        "filter": 0.0,
        "token_block": 4,
        "vocab_block": 8,
        "kept_rows": 0,
        "compact": True,
    },
    "explain": lambda: {
        **{k: v for k, v in _head().items() if k in ("hidden", "weight", "bias", "vocab_size")},
        "per_token": True,
        "device": "cpu",
        "plan": "late",
    },
    "workspace_limit": lambda: {"limit": 1000},
    "linear_logprob": _tokens,
    "linear_token_stats": _tokens,
    "linear_cross_entropy": _cross_entropy,
    "linear_topk": lambda: {**_head(), "k": 3},
    "option_logprobs": lambda: {**_head(), "option_ids": torch.tensor([3, 0, 9])},
    "TopKTeacher": lambda: vars(topk_teacher()),
    "TopKAdvantage": lambda: vars(topk_advantage()),
    "linear_divergence": lambda: {
        **_against_teachers(),
        "teacher": teacher_head(),
        "kind": "skew_reverse_kl",
        "alpha": 0.3,
        "token_weights": torch.rand(10),
    },
    "linear_expected_advantage": lambda: {
        **_against_teachers(),
        "aligned": teacher_head(),
        "reference": teacher_head(7),
        "beta": 2.0,
        "token_weights": torch.rand(10),
    },
    "linear_distill": _distill,
    "token_mean_weights": lambda: {
        "sets": [torch.arange(10) < 4, torch.arange(10) > 6],
        "dtype": torch.float64,
    },
    "linear_preference_loss": _preference,
    "listwise_preference_loss": _listwise,
    "listwise_preference_estimate": _listwise,
    "pairwise_preference_loss": _pairs,
    "kto_loss": lambda: {
        "logprob": -torch.rand(5).requires_grad_(),
        "ref_logprob": -torch.rand(5),
        "desirable": torch.tensor([True, False, True, True, False]),
        "kind": "kto",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.5,
        "kl": 0.2,
        "reduction": "mean",
    },
    "orpo_loss": lambda: {
        k: v for k, v in _free_pairs().items() if k not in ("kind", "label_smoothing")
    },
    "cpo_loss": lambda: {**_free_pairs(), "kind": "sigmoid", "nll_weight": 1.0},
    "sequence_reward": lambda: {
        "logprob": -torch.rand(10).requires_grad_(),
        "mask": torch.arange(10) % 3 > 0,
        "labels": torch.tensor([0, 3, -7, 9, 1, 2, -7, 4, 5, 6]),
        "cu_seqlens": torch.tensor([0, 4, 10]),
        "normalize": "length",
        "ignore_index": -7,
    },
    "calibrated_rewards": lambda: {
        "avg_logprob": -torch.rand(5),
        "option_probability": torch.rand(5),
        "alpha": 0.5,
        "floor": 1e-8,
    },
}

#: Arguments that do not go with the others of the call above: (function, argument) to a change.
WITH: dict[tuple[str, str], Values] = {
    ("pairwise_preference_loss", "gamma"): {
        "kind": "simpo",
        "ref_chosen": None,
        "ref_rejected": None,
        "gamma": 0.5,
    },
    ("pairwise_preference_loss", "discopop_tau"): {
        "kind": "discopop",
        "label_smoothing": None,
        "discopop_tau": 0.1,
    },
    ("pairwise_preference_loss", "reward_shift"): {
        "kind": "bco_pair",
        "label_smoothing": None,
        "reward_shift": 0.1,
    },
    ("cpo_loss", "gamma"): {"kind": "simpo", "gamma": 0.5},
    **{
        ("kto_loss", name): {
            "kl": None,
            "kl_logprob": -torch.ones(3),
            "kl_ref_logprob": -torch.ones(3),
        }
        for name in ("kl_logprob", "kl_ref_logprob")
    },
}

#: The same functions in another use: all of their arguments are walked there too.
VARIANTS: dict[str, dict[str, Callable[[], Values]]] = {
    "linear_divergence": {
        tail: lambda tail=tail: {"teacher": topk_teacher(tail)}  # type: ignore[misc]
        for tail in ("bucket", "renormalize")
    },
    "linear_expected_advantage": {
        "offline": lambda: {"aligned": topk_advantage(), "reference": None}
    },
    "linear_distill": {
        tail: lambda tail=tail: {  # type: ignore[misc]
            "teacher": topk_teacher(tail),
            "aligned": topk_advantage(),
            "reference": None,
        }
        for tail in ("bucket", "renormalize")
    },
}


def call(name: str, given: Values) -> Any:
    """Call a public function; classes are called and checked by an op, or as one would."""
    if name == "Head":
        return pk.Head(**given).checked()
    if name == "TopKTeacher":
        return pk.linear_divergence(_student(), pk.TopKTeacher(**given))
    if name == "TopKAdvantage":
        return pk.linear_expected_advantage(_student(), pk.TopKAdvantage(**given))
    if name == "token_mean_weights":
        return pk.token_mean_weights(*given["sets"], dtype=given["dtype"])
    if name == "PlanRequest":
        return pk.PlanRequest.of(pk.PlanRequest(**given))
    if name == "workspace_limit":
        with pk.workspace_limit(**given):
            return None
    return getattr(pk, name)(**given)
