"""Random configurations of everything against the oracle; a failure prints its configuration."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import FORMULAS, GRADIENTS, ORACLE, VALUES, Dense, assert_accurate, dense
from torch import Tensor

import pad_kernels as pk
from pad_kernels.engine.call import Call
from pad_kernels.functionals import (
    Advantage,
    Divergence,
    Entropy,
    ForwardKL,
    Functional,
    LogitSum,
    LogProb,
    LogSumExp,
    ReverseKL,
    SquaredLogSumExp,
    TopKAdvantage,
    TopKDivergence,
)
from pad_kernels.functionals.divergence import KINDS, ONE_SWEEP

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

CONFIGURATIONS = 120
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _draw(seed: int) -> dict[str, Any]:
    """A configuration: plain data, so that printing it is enough to repeat it."""
    draw = random.Random(seed)

    def head() -> dict[str, Any]:
        return {
            "width": draw.choice([3, 16, 65]),
            "bias": draw.random() < 0.5,
            "padding": draw.choice([0, 0, 1, 13]),
            "spread": draw.choice([0.01, 1.0, 4.0, 30.0]),
            "softcap": draw.choice([None, None, 3.0, 30.0]),
            "logit_scale": draw.choice([1.0, 1.0, -0.5, 2.3]),
            "temperature": draw.choice([1.0, 1.0, 0.3, 4.0]),
            "transposed": draw.random() < 0.2,
        }

    vocab = draw.choice([8, 17, 130, 513, 1025])
    teacher = draw.random() < 0.5
    one_stream = [
        LogProb(),
        LogProb("candidates"),
        Entropy(),
        LogSumExp(),
        SquaredLogSumExp(),
        LogitSum(),
        TopKDivergence(draw.choice(KINDS), draw.choice([0.1, 0.5, 0.8])),
        TopKAdvantage(),
    ]
    two_sweeps = [k for k in KINDS if k not in ONE_SWEEP]
    pool: list[Functional] = [
        *one_stream,
        ForwardKL(),
        ReverseKL(),
        Divergence(draw.choice(two_sweeps), draw.choice([0.1, 0.5, 0.8])),
        Advantage(),
    ]
    count = draw.choice([1, 1, 2, 4])
    functionals = draw.sample(pool if teacher else one_stream, count)
    # A single number may be right by luck in the computation that ours is compared with.
    tokens = draw.choice([0, 3, 7, 19, 64])
    return {
        "seed": seed,
        "tokens": tokens,
        "vocab": vocab,
        "dtype": draw.choice(list(DTYPES)),
        "functionals": functionals,
        "student": head(),
        "teacher": head(),
        "reference": head(),
        "ignored": draw.choice([0.0, 0.3, 0.95]),
        "kept_tokens": draw.choice([1, 2, 5]),
        "needs": [draw.random() < 0.8 for _ in range(3)],
        "plan": {
            "backend": draw.choice(["cpp", "torch_blocked"]),
            "schedule": draw.choice(["early", "late", "kept", None]),
            "token_block": draw.choice([None, 1, 10, 1000]),
            "vocab_block": draw.choice([None, vocab // 16 + 1, 64, 200, 5000]),
            "kept_rows": draw.choice([None, 0, 1, tokens]),
        },
    }


def _head(config: dict[str, Any], tokens: int, vocab: int, dtype: torch.dtype) -> pk.Head:
    width, rows = config["width"], vocab + config["padding"]
    hidden = torch.randn(tokens, width) * config["spread"]
    weight = torch.randn(rows, width) / width**0.5
    if config["transposed"]:
        weight = weight.T.contiguous().T
    return pk.Head(
        hidden.to(dtype),
        weight.to(dtype),
        torch.randn(rows).to(dtype) if config["bias"] else None,
        config["softcap"],
        config["logit_scale"],
        config["temperature"],
        vocab if config["padding"] else None,
    )


def _inputs(config: dict[str, Any]) -> dict[str, Tensor]:
    tokens, vocab, kept = config["tokens"], config["vocab"], config["kept_tokens"]
    labels = torch.randint(vocab, (tokens, 1))
    labels[torch.rand(tokens) < config["ignored"]] = -100
    ids = torch.rand(tokens, vocab).argsort(-1)[:, :kept]
    mass = torch.rand(tokens, 1)
    return {
        "labels": labels,
        "candidates": torch.randint(vocab, (tokens, 3)),
        "teacher_ids": ids,
        "teacher_logprobs": torch.randn(tokens, kept).log_softmax(-1) + mass.log(),
        "advantage_ids": ids,
        "advantage_values": torch.randn(tokens, kept),
    }


def _dense(
    how: Dense,
    heads: list[pk.Head],
    functionals: list[Functional],
    inputs: dict[str, Tensor],
    grad: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """[values, gradients...] of those leaves that want one."""
    leaves: list[Tensor] = []
    z = []
    for i, head in enumerate(heads):
        tensors = []
        for x, need in zip((head.hidden, head.weight, head.bias), needs, strict=True):
            tensors.append(how.leaf(x, grad=need and i == 0))
            if x is not None and need and i == 0:
                leaves.append(tensors[-1])
        options = (head.softcap, head.logit_scale, head.temperature, head.vocab_size)
        z.append(how.logits(*tensors, *options))
    ignored = inputs["labels"][:, 0] == -100
    # What is infinite in a row that does not count would make NaN of its gradient.
    fill = {"teacher_logprobs": -5.0}
    inputs = {n: x.masked_fill(ignored[:, None], fill.get(n, 0)) for n, x in inputs.items()}
    values = torch.cat([FORMULAS[type(f).__name__](f, z, inputs) for f in functionals])
    values = torch.where(ignored, 0.0, values)
    if not leaves:
        return [values.detach()]
    return [values.detach(), *torch.autograd.grad(values, leaves, grad.to(values.dtype))]


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_configuration(seed: int) -> None:
    config = _draw(seed)
    print(config)
    _run(config)


def _run(config: dict[str, Any]) -> None:
    torch.manual_seed(config["seed"])
    dtype, functionals = DTYPES[config["dtype"]], config["functionals"]
    plan = pk.PlanRequest(**config["plan"])
    if plan.backend == "cpp" and pk.available_backends()["cpp"] != "available":
        pytest.skip("the extension is not built")
    heads = [_head(config["student"], config["tokens"], config["vocab"], dtype)]
    names = ["teacher", "reference"][: max(j for f in functionals for j in (0, *f.teachers))]
    heads += [_head(config[n], config["tokens"], config["vocab"], dtype) for n in names]
    inputs = _inputs(config)
    outputs = sum(f.outputs(inputs) for f in functionals)
    grad = torch.rand(outputs, config["tokens"], dtype=torch.float64) + 0.1
    if dtype == torch.float16:
        grad *= 1e-4  # its gradients overflow
    # A row whose weights are all zero is left out of a sum.
    grad[:, torch.rand(config["tokens"]) < 0.2] = 0
    needs = config["needs"]
    references = [
        _dense(how, heads, functionals, inputs, grad, needs) for how in (ORACLE, dense(dtype))
    ]

    student = heads[0]
    tensors = [student.hidden, student.weight, student.bias]
    leaves = [
        None if x is None else x.detach().clone().requires_grad_(need)
        for x, need in zip(tensors, needs, strict=True)
    ]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    student = replace(student, hidden=hidden, weight=weight, bias=bias)
    called = ["", *(name + "." for name in names)]
    call = Call(student, heads[1:], inputs, ignore_index=-100, plan=plan, names=called)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    if plan.schedule != "early":
        values, _ = call.tokens(functionals)
        assert_accurate(values.detach(), references[0][0], references[1][0], k=VALUES, dtype=dtype)
        _check_gradients((values * grad).sum(), wanted, references, dtype)
    total, _ = call.total(functionals, grad.to(call.accumulate))
    _check_gradients(total, wanted, references, dtype)


def _check_gradients(
    total: Tensor, wanted: list[Tensor], references: list[list[Tensor]], dtype: torch.dtype
) -> None:
    if not wanted:
        assert not total.requires_grad
        return
    found = torch.autograd.grad(total, wanted)
    for ours, oracle, careful in zip(found, references[0][1:], references[1][1:], strict=True):
        assert ours.dtype == dtype
        assert_accurate(ours, oracle, careful, k=GRADIENTS, dtype=dtype, what="gradient")
