"""The LM head of a step: dense logits by running them, ours by what our planner says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pad_kernels.backends.choice import PREFERRED
from pad_kernels.engine.devices import DEVICES
from pad_kernels.engine.plan import Plan, PlanRequest, Shape
from pad_kernels.engine.planner import default_budget, make_plan, smallest_budget
from pad_kernels.fit.trace import Timeline

#: Each method's teachers. PAD's only scores responses; the others' distributions are in the loss.
METHODS = {"pad": ("teacher",), "dckd": ("teacher",), "adpa": ("teacher", "reference")}


def dense_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [B, T, V] as transformers computes them, soft cap included, in the products' dtype."""
    head = model.get_output_embeddings()
    logits = F.linear(hidden, head.weight, head.bias)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def label_logprobs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 log-softmax [B, T, V] and the labels' entries [B, T]."""
    logprob = logits.float().log_softmax(-1)
    labels = torch.zeros((*logits.shape[:-1], 1), dtype=torch.long)
    return logprob, logprob.gather(-1, labels)[..., 0]


def dense_loss(logits: Tensor, teachers: list[Tensor]) -> Tensor:
    """The losses as one writes them: float32 log-softmax of each model's logits, then a sum."""
    logprob, label = label_logprobs(logits)
    loss = -label.sum()
    if len(teachers) == 1:  # DCKD: cross-entropy and forward KL
        teacher = teachers[0].float().log_softmax(-1)
        loss = loss + F.kl_div(logprob, teacher, reduction="sum", log_target=True)
    elif teachers:  # ADPA: cross-entropy and the expected advantage
        aligned, reference = (x.float().log_softmax(-1) for x in teachers)
        loss = loss - (logprob.exp() * (aligned - reference)).sum()
    return loss


def trace_dense(
    model: Any, there: list[Tensor], hidden: Tensor, teachers: int, autocast: bool
) -> list[int]:
    """Timeline of the student's dense logits, forward and backward, beside the teachers' logits.

    Args:
        model: a causal LM without weights.
        there: tensors that do not count.
        hidden: [B, T, H] of the student.
        teachers: how many models' logits [B, T, V], in bfloat16, the loss reads.
        autocast: products in bfloat16, whatever the parameters' dtype.
    """
    hidden = hidden.detach().requires_grad_()
    shape = (*hidden.shape[:-1], model.get_output_embeddings().weight.shape[0])
    others = [torch.empty(shape, dtype=torch.bfloat16) for _ in range(teachers)]
    with Timeline([*there, hidden, *others]) as timeline:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = dense_loss(dense_logits(model, hidden), others)
        loss.backward()
    return timeline.take()


def trace_dense_scores(model: Any, there: list[Tensor], hidden: Tensor, keep: bool) -> list[int]:
    """Timeline of a teacher's dense logits without gradients.

    Args:
        keep: hand the logits on to the loss; else only the labels' log-probs.
    """
    with Timeline([*there, hidden]) as timeline, torch.no_grad():
        found = dense_logits(model, hidden)
        if not keep:
            found = label_logprobs(found)[1]
        return timeline.take()


def our_plan(
    gpu_bytes: int,
    tokens: int,
    vocab: int,
    hidden: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
    per_token: bool,
) -> Plan:
    """The library's own plan, on the known GPU whose memory is nearest.

    Its workspace is the default share of the memory, or, where a long batch cannot do with that,
    the least that it can do with (``pad_kernels.workspace_limit``).

    Args:
        gpu_bytes: memory of the GPU, of which the workspace is a fixed share.
        tokens: N.
        vocab: V.
        hidden: H of the student and of the teachers whose distributions the loss reads.
        dtypes: of hidden states and of the head's weight.
        needs: gradients of hidden states, weight and bias; none for a teacher.
        per_token: whether a value per token is wanted (log-probs), or one number.
    """
    gpus = [name for name, device in DEVICES.items() if device.type == "cuda"]
    near = min(gpus, key=lambda name: abs(DEVICES[name].memory - gpu_bytes))
    shape = Shape(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        input=dtypes[0],
        weight=dtypes[1],
        gemm=torch.bfloat16,
        needs=needs,
        reduced=not per_token,
        sweeps=1,
        backend=PREFERRED["cuda"][0],
        device=near,
        device_bytes=gpu_bytes,
        copied_weights=dtypes[1] != torch.bfloat16,
        fused=dtypes[1] == torch.bfloat16,
    )
    budget = max(default_budget(gpu_bytes), smallest_budget(shape, PlanRequest()))
    return make_plan(shape, PlanRequest(budget=budget))
