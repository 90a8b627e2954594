"""Plans in words: what an op will do, beside what dense logits would have cost."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pad_kernels._checks import check_choice, check_flag
from pad_kernels.backends.choice import PREFERRED, resolve_backend
from pad_kernels.engine.call import Call
from pad_kernels.engine.devices import DEVICES
from pad_kernels.engine.plan import Plan, PlanLike, PlanRequest, Shape
from pad_kernels.engine.planner import default_budget, make_plan
from pad_kernels.engine.problem import planned_device
from pad_kernels.functionals import LogProb
from pad_kernels.heads import Head


def explain(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    per_token: bool = False,
    device: str | None = None,
    plan: PlanLike = None,
) -> Plan:
    """Print the plan that an op would run with, and return it.

    Args:
        hidden: [..., H]; may lie on device "meta", then no memory is needed.
        weight: [V, H], likewise. Which of the tensors require grad decides the plan.
        bias: [V].
        vocab_size: as in the ops.
        per_token: True for ops with per-token outputs (``linear_logprob``), False for ops whose
            output is one number (``linear_cross_entropy``).
        device: plan for one of "a100", "h100", "h200", "b200", "rtx4090", "cpu" whether or not it
            is at hand; None for the tensors' own ("meta" counts as a CPU). For a device that is
            not at hand the Triton kernels are taken to be there.
        plan: as in the ops.

    Returns:
        The Plan; pass it back as ``plan=``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or a budget that cannot be met.

    Example:
        >>> import torch, pad_kernels as pk
        >>> hidden = torch.empty(4096, 512, device="meta", requires_grad=True)
        >>> weight = torch.empty(65536, 512, device="meta", requires_grad=True)
        >>> plan = pk.explain(hidden, weight, plan="early:torch_blocked")
        early on torch_blocked: ...
    """
    check_flag("per_token", per_token)
    call = Call(Head(hidden, weight, bias, vocab_size=vocab_size), plan=plan)
    recipe = call.recipe([LogProb()])
    if device is None:
        recipe = resolve_backend(recipe, planned_device(hidden))
        shape = call.shape(recipe, reduced=not per_token)
    else:
        check_choice("device", device, tuple(DEVICES))
        there = DEVICES[device]
        recipe = recipe.on(recipe.request.backend or PREFERRED[there.type][0])
        recipe = replace(recipe, gemm=call.gemm(there.type))
        shape = call.shape(recipe, reduced=not per_token)
        shape = replace(shape, device=device, device_bytes=there.memory)
    found = make_plan(shape, recipe.request)
    print(describe(found, shape, recipe.request))
    return found


def describe(plan: Plan, shape: Shape, request: PlanRequest) -> str:
    """The plan beside dense logits, as a few lines of text."""
    budget = request.budget or default_budget(shape.device_bytes)
    logits = shape.tokens * shape.vocab * shape.streams
    # Dense autograd holds the logits, their float32 log-softmax and the gradient of each.
    dense = logits * (2 * shape.input.itemsize + 8 if any(shape.needs) else 4)
    gradient = 2 * sum(shape.needs[:2]) * shape.tokens * shape.vocab * shape.hidden[0]
    dense_flops = 2 * shape.unit + gradient
    blocks = []
    if plan.token_block:
        blocks.append(f"{plan.token_block} rows a token block")
    if plan.gradient_over == "vocabulary":
        blocks.append(f"{plan.vocab_block} entries a vocabulary chunk")
    if plan.kept_rows:
        blocks.append(f"{plan.kept_rows} rows kept")
    dtype = str(plan.gemm).removeprefix("torch.")
    rate = DEVICES[shape.device].rate(plan.gemm)
    floor = dense_flops / rate
    lines = [
        f"{plan.schedule} on {plan.backend}: {plan.reason}",
        f"  shape      {shape.tokens} tokens x {shape.vocab} entries, hidden {list(shape.hidden)}",
        f"  blocks     {', '.join(blocks)}; products in {dtype}",
        f"  workspace  {_mib(plan.workspace_bytes)} of {_mib(budget)} allowed; dense {_mib(dense)}",
        f"  work       {plan.flops / 1e9:.1f} GFLOP; dense {dense_flops / 1e9:.1f} GFLOP",
        f"  time       {1e3 * plan.seconds:.1f} ms predicted for {shape.device}; dense products "
        f"alone {1e3 * floor:.1f} ms at {rate / 1e12:.3g} TFLOP/s",
    ]
    if plan.weight_accumulator:
        size = shape.vocab * shape.hidden[0] * plan.accumulate.itemsize
        lines.append(f"  of which   {_mib(size)} to add up the weight gradient in float32")
    if plan.filter:
        order = ", the vocabulary by mean logit" if plan.ordered else ""
        lines.append(
            f"  filter     gradient tiles below {plan.filter:g} of the largest weight{order}"
        )
    return "\n".join(lines)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
