"""For every argument of a public function what must be refused."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from good_calls import H, V, Values, topk_advantage, topk_teacher
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import pad_kernels as pk

NAN, INF = math.nan, math.inf


class Named(Tensor):
    """A subclass that only has another name."""


def tensors(x: Tensor, *, wrong: torch.dtype, required: bool = True) -> Values:
    """Wrong in type, layout, dtype, rank, size or device, whatever the tensor means."""
    x = x.detach()
    bad = {
        "list": x.tolist(),
        "string": "tensor",
        "dtype": x.to(wrong),
        "complex": x.to(torch.complex64),
        "sparse": x.to_sparse(),
        "wrapper": TwoTensor(x, x),
        "subclass": x.as_subclass(Named),
        "meta": x.to("meta"),
        "longer": torch.cat([x, x[:1]]),
        "rank": x.unsqueeze(-1),
    }
    if x.dtype == torch.float32:
        with warnings.catch_warnings():  # quantised tensors are deprecated, but not gone
            warnings.simplefilter("ignore")
            bad["quantized"] = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    if required:
        bad["none"] = None
    return bad


def floats(x: Tensor, required: bool = True) -> Values:
    return tensors(x, wrong=torch.int64, required=required)


def integers(x: Tensor, required: bool = True) -> Values:
    return tensors(x, wrong=torch.float32, required=required)


def numbers(*outside: float, required: bool = True) -> Values:
    bad: Values = {"string": "1.0", "bool": True, "nan": NAN, "inf": INF, "list": [1.0]}
    bad["no float"] = 10**400
    bad |= {f"{x:g}": x for x in outside}
    return {**bad, "none": None} if required else bad


def whole(*outside: int, required: bool = True) -> Values:
    bad: Values = {"string": "1", "bool": True, "fraction": 1.5, "list": [1], "2^63": 1 << 63}
    bad |= {str(x): x for x in outside}
    return {**bad, "none": None} if required else bad


def choices() -> Values:
    return {"unknown": "nothing like it", "number": 3, "none": None}


def flags() -> Values:
    return {"one": 1, "string": "yes", "none": None}


def plans(per_token: bool) -> Values:
    bad = {
        "unknown": "soon",
        "twice": "late:kept",
        "number": 3,
        "schedule": pk.PlanRequest("soon"),
        "backend": pk.PlanRequest(backend="gpu"),
        "budget of nothing": pk.PlanRequest(budget=0),
        "impossible budget": pk.PlanRequest(budget=1),
        "filter": pk.PlanRequest(filter=2.0),
    }
    return {**bad, "early": "early"} if per_token else bad


def labels(g: Values) -> Values:
    def with_label(value: int) -> Tensor:
        changed = g["labels"].clone()
        changed[9] = value
        return changed

    if "weight" not in g and "student" not in g:
        return integers(g["labels"], required=False)
    # A divergence of all tokens needs no labels; ce_weight= is linear_distill's.
    bad = integers(g["labels"], required="student" not in g or "ce_weight" in g)
    # 10 is padding of the vocabulary, -100 is not what this call ignores.
    outside = {f"label {v}": with_label(v) for v in (V - 1, V, -1, -100, 1 << 40)}
    return {**bad, **outside}


def offsets(g: Values) -> Values:
    good = g["cu_seqlens"]
    bad = integers(good, required=False)
    del bad["longer"]
    turned = good.clone()
    turned[1:3] = turned[1:3].flip(0) if len(good) > 3 else torch.tensor([11, 10])
    ends = {"start": good + 1, "end": good - (good == 10).long(), "falling": turned}
    return {**bad, **ends, "empty": good[:0]}


def normalizers(g: Values) -> Values:
    return {
        **numbers(0.0, -1.0, required=False),
        "vector": torch.ones(1),
        "requires grad": torch.tensor(3.0, requires_grad=True),
        "complex tensor": torch.tensor(3j),
        "meta tensor": torch.tensor(3.0, device="meta"),
        "negative tensor": torch.tensor(-3.0),
        "nan tensor": torch.tensor(NAN),
    }


def rewards(g: Values, name: str) -> Values:
    x = g[name].detach()
    bad = floats(g[name])
    spoiled = {}
    for label, value in (("nan", NAN), ("infinite", -INF)):
        spoiled[label] = x.clone()
        spoiled[label][0, 1] = value
    if name == "teacher_rewards":
        spoiled["requires grad"] = x.clone().requires_grad_()
    else:
        spoiled["one response"] = x[:, :1]
    return {**bad, **spoiled}


def candidates(g: Values) -> Values:
    bad = integers(g["option_ids"])
    del bad["longer"]
    ids = {f"id {v}": torch.tensor([1, v]) for v in (V - 1, -1, -100)}
    return {
        **bad,
        **ids,
        "none of them": torch.empty(0, dtype=torch.int64),
        "scalar": torch.tensor(1),
    }


def hidden(g: Values) -> Values:
    x = g["hidden"].detach()
    bad = floats(g["hidden"])
    if "labels" not in g:
        # Nothing says how many rows there should be.
        del bad["longer"]
    return {
        **bad,
        "features": torch.randn(10, H + 1),
        "scalar": torch.tensor(1.0),
        "half": x.half(),
        "double": x.double(),
    }


def weight(g: Values) -> Values:
    x = g["weight"].detach()
    bad = floats(g["weight"])
    # One more token is another vocabulary, and a fine one where there is no bias.
    bad["longer"] = torch.randn(V, H + 1)
    return {**bad, "half": x.half(), "double": x.double(), "no vocabulary": x[:0], "vector": x[0]}


def _with(given: Any, **change: Any) -> Any:
    return dataclasses.replace(given, **change)


def _fields(given: Any, names: tuple[str, ...]) -> Values:
    """The same head or offline teacher with one field wrong."""
    fields = dict(vars(given))
    return {
        f"{name} {label}": _with(given, **{name: value})
        for name in names
        for label, value in BAD[name](fields).items()
    }


def heads(g: Values, name: str) -> Values:
    """Not a head, a head with a field wrong, and heads that do not fit the others."""
    head = g[name]
    x = head.hidden.detach()
    tensors = {n: getattr(head, n).detach() for n in ("hidden", "weight", "bias")}
    bad = {
        "none": None,
        "tensor": x,
        "tuple": (x, head.weight),
        "class": pk.Head,
        **_fields(head, tuple(vars(head))),
        "fewer rows": _with(head, hidden=x[:-1]),
        "more rows": _with(head, hidden=torch.cat([x, x])),
        "rows in two dimensions": _with(head, hidden=x.reshape(2, 5, -1)),
        "no rows": _with(head, hidden=x[:0]),
        "vocabulary uncut": _with(head, vocab_size=None),
        "vocabulary cut shorter": _with(head, vocab_size=V - 2),
        "all float64": _with(head, **{n: t.double() for n, t in tensors.items()}),
        "all on meta": _with(head, **{n: t.to("meta") for n, t in tensors.items()}),
    }
    if name == "student":
        if not any(isinstance(v, pk.Head) for k, v in g.items() if k != name):
            # Nothing else says what the vocabulary and the dtype are.
            for label in ("vocabulary uncut", "vocabulary cut shorter", "all float64"):
                del bad[label]
    else:
        for n, t in tensors.items():
            bad[f"{n} requires grad"] = _with(head, **{n: t.clone().requires_grad_()})
    return bad


def offline(given: Any) -> Values:
    """An offline teacher with a field wrong, and ones that do not fit the student."""
    names = tuple(vars(given))
    kept = {n: getattr(given, n) for n in names if n != "tail"}
    padding = torch.arange(V).repeat(10, 1)
    number = next(n for n in names if n in ("logprobs", "values"))
    return {
        "none": None,
        "dict": vars(given),
        "other offline": topk_advantage() if "tail" in names else topk_teacher(),
        **_fields(given, names),
        "as many ids as padded entries": _with(given, ids=padding, **{number: padding - 99.0}),
        "fewer rows": _with(given, **{n: t[:-1] for n, t in kept.items()}),
        "one row": _with(given, **{n: t[0] for n, t in kept.items()}),
        "no ids": _with(given, **{n: t[:, :0] for n, t in kept.items()}),
        "on meta": _with(given, **{n: t.to("meta") for n, t in kept.items()}),
    }


def teachers(g: Values, name: str) -> Values:
    if isinstance(g[name], pk.Head):
        other = topk_teacher() if name == "aligned" else topk_advantage()
        return {**heads(g, name), "other offline": other}
    return offline(g[name])


def kept_ids(g: Values) -> Values:
    ids = g["ids"]

    def with_id(value: int) -> Tensor:
        changed = ids.clone()
        changed[4, 1] = value
        return changed

    outside = {f"id {v}": with_id(v) for v in (V - 1, V, -1, -100, 1 << 40)}
    twice = with_id(int(ids[4, 2]))
    return {**integers(ids), **outside, "twice": twice, "rows": ids[:-1], "scalar": ids[0, 0]}


def kept_numbers(g: Values, name: str, *outside: float) -> Values:
    x = g[name]
    bad = {**floats(x), "requires grad": x.clone().requires_grad_(), "fewer": x[:, :2]}
    for value in (NAN, INF, *outside):
        bad[f"entry {value:g}"] = x.clone()
        bad[f"entry {value:g}"][4, 1] = value
    return bad


def part_weights(g: Values, name: str) -> Values:
    x = torch.rand(10)
    return {**numbers(), **{f"tensor, {label}": v for label, v in floats(x).items()}}


def token_sets(g: Values) -> Values:
    first, second = g["sets"]
    bad = {label: [first, v] for label, v in integers(second).items()}
    bad |= {f"first {label}": [v] for label, v in floats(first.float()).items()}
    del bad["first longer"], bad["first rank"]
    return {**bad, "nothing": [], "only one is a bool": [first, second.long()]}


BAD: dict[str, Callable[[Values], Values]] = {
    "hidden": hidden,
    "weight": weight,
    "bias": lambda g: {**floats(g["bias"], False), "half": g["bias"].half()},
    "softcap": lambda g: numbers(0.0, -1.0, required=False),
    "logit_scale": lambda g: numbers(),
    "temperature": lambda g: numbers(0.0, -1.0),
    "vocab_size": lambda g: whole(0, -1, V + 1, required=False),
    "ignore_index": lambda g: whole(),
    "shift": lambda g: flags(),
    "cu_seqlens": offsets,
    "labels": labels,
    "plan": lambda g: plans("reduction" not in g or "teacher_rewards" in g),
    "reduction": lambda g: choices(),
    "label_smoothing": lambda g: numbers(-0.1, 1.1, required=False),
    "z_loss": lambda g: numbers(-1.0),
    "token_weights": lambda g: floats(g["token_weights"], False),
    "normalizer": normalizers,
    "k": lambda g: whole(0, -1, V),
    "option_ids": candidates,
    "per_token": lambda g: flags(),
    "limit": lambda g: whole(0, -1),
    "schedule": lambda g: {"unknown": "soon", "number": 3},
    "backend": lambda g: {"unknown": "gpu", "number": 3},
    "budget": lambda g: whole(0, -1, required=False),
    "filter": lambda g: numbers(-0.1, 1.0),
    "token_block": lambda g: whole(0, -1, required=False),
    "vocab_block": lambda g: whole(0, -1, required=False),
    "kept_rows": lambda g: whole(-1, required=False),
    "compact": lambda g: flags(),
    "device": lambda g: {"unknown": "tpu", "number": 3},
    "student_rewards": lambda g: rewards(g, "student_rewards"),
    "teacher_rewards": lambda g: rewards(g, "teacher_rewards"),
    "beta": lambda g: numbers(0.0, -1.0),
    "kind": lambda g: choices(),
    "valid": lambda g: integers(g["valid"], False),
    "subset_size": lambda g: whole(0, 1, 3, 5, required=False),  # 3 of 4 leaves one alone
    "samples": lambda g: whole(0, 3, required=False),
    "seed": lambda g: whole(-1, required=False),
    "mask": lambda g: integers(g["mask"], False),
    "normalize": lambda g: choices(),
    **{
        name: lambda g, name=name: floats(g[name])  # type: ignore[misc]
        for name in (
            *("chosen", "rejected", "ref_chosen", "ref_rejected", "logprob", "ref_logprob"),
            *("avg_logprob", "option_probability", "kl_logprob", "kl_ref_logprob"),
        )
    },
    "chosen_nll": lambda g: floats(g["chosen_nll"], required="nll_weight" in g),
    "discopop_tau": lambda g: numbers(0.0, -1.0, required=False),
    "gamma": lambda g: numbers(-1.0, required=False),
    "reward_shift": lambda g: numbers(required=False),
    "nll_weight": lambda g: numbers(-1.0),
    "desirable": lambda g: integers(g["desirable"]),
    "kl": lambda g: {**numbers(-1.0), "vector": torch.ones(2), "integer": torch.tensor(1)},
    "desirable_weight": lambda g: numbers(-1.0),
    "undesirable_weight": lambda g: numbers(-1.0),
    # A share of calibrated_rewards may be all or nothing, a mixture may not.
    "alpha": lambda g: (
        numbers(-0.1, 1.1) if "floor" in g else numbers(0.0, 1.0, -0.1, 1.1, required=False)
    ),
    "floor": lambda g: numbers(0.0, -1.0, 1.5),
    "student": lambda g: heads(g, "student"),
    "teacher": lambda g: teachers(g, "teacher"),
    "aligned": lambda g: teachers(g, "aligned"),
    "reference": lambda g: heads(g, "reference"),
    "ids": kept_ids,
    "logprobs": lambda g: kept_numbers(g, "logprobs", 0.5),
    "values": lambda g: kept_numbers(g, "values", -INF),
    "tail": lambda g: choices(),
    "sets": token_sets,
    "dtype": lambda g: {"string": "float32", "integer": torch.int64, "class": float, "none": None},
    **{
        name: lambda g, name=name: part_weights(g, name)  # type: ignore[misc]
        for name in ("ce_weight", "divergence_weight", "advantage_weight", "entropy_weight")
    },
}

#: When two arguments do not fit together either may be named.
PARTNERS = {
    "hidden": ("weight", "labels", "bias", "cu_seqlens", "teacher_rewards", "option_ids"),
    "weight": ("bias", "vocab_size"),
    "labels": ("hidden",),
    "chosen": ("rejected", "ref_chosen", "chosen_nll"),
    "logprob": ("ref_logprob", "mask", "labels", "cu_seqlens"),
    "avg_logprob": ("option_probability",),
    "student_rewards": ("teacher_rewards", "valid"),
    "teacher_rewards": ("valid", "hidden", "cu_seqlens"),
    "kl_logprob": ("kl_ref_logprob",),
    "cu_seqlens": ("logprob", "labels"),
    "kl": ("kl_logprob",),
    "student": ("labels", "teacher", "aligned", "reference", "token_weights"),
    "ids": ("logprobs", "values"),
}
