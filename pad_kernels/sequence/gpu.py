"""The CUDA kernels over sequences, on tensors: rewards and listwise losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.backends import registry, streams
from pad_kernels.engine.workspace import Workspace

#: The type of device that the kernels run on.
DEVICE = "cuda"
#: Kinds that csrc/cuda/listwise.cu has.
KINDS = ("kl", "reverse_kl", "jsd", "jsd_released")


def _usable(device_type: str, index: int) -> bool:
    return device_type == DEVICE and not registry.cuda_error(index)


# What torch.compiler.assume_constant_result does, without loading the compiler and Triton.
_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def usable(tensor: Tensor) -> bool:
    """Whether the kernels take tensors of this device.

    That very device is asked: a process for each GPU should leave the first one to its own.
    """
    return _usable(tensor.device.type, tensor.device.index or 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(tensor: Tensor | None) -> tuple[int, str]:
    """Address and dtype, as the kernels read numbers."""
    return (0, "float32") if tensor is None else (tensor.data_ptr(), _name(tensor.dtype))


class Tokens(NamedTuple):
    """Token log-probs of sequences and which of them count.

    Attributes:
        logprob: [sequences, T], or [total] with ``offsets``.
        offsets: [sequences + 1] int64, or None.
        mask: like ``logprob``, bool, or None.
        labels: like ``logprob``, integer; those equal to ``ignore_index`` do not count.
        ignore_index: the label of tokens that do not count.
        mean: over the tokens that count; else the sum.
    """

    logprob: Tensor
    offsets: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    ignore_index: int
    mean: bool

    @property
    def sequences(self) -> int:
        """How many there are."""
        if self.offsets is None:
            return int(self.logprob.shape[0])
        return int(self.offsets.shape[0]) - 1

    def packed(self) -> tuple[Any, list[Tensor]]:
        """The kernels' struct, and the tensors that have to outlive the launch."""
        module = registry.cuda()
        assert module is not None
        labels = self.labels
        if labels is not None and labels.dtype not in (torch.int32, torch.int64):
            labels = labels.long()
        held = {
            name: None if x is None else x.contiguous()
            for name, x in (
                ("logprob", self.logprob.detach()),
                ("offsets", self.offsets),
                ("mask", self.mask),
                ("labels", labels),
            )
        }
        tokens = module.Tokens()
        for name, x in held.items():
            setattr(tokens, name, 0 if x is None else x.data_ptr())
        tokens.dtype, tokens.total = _name(self.logprob.dtype), self.logprob.numel()
        tokens.length = 0 if self.offsets is not None else int(self.logprob.shape[1])
        tokens.label_bytes = 8 if labels is None else labels.element_size()
        tokens.ignore_index, tokens.mean = self.ignore_index, self.mean
        return tokens, [x for x in held.values() if x is not None]


def rewards(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Rewards [sequences] and, float64, what each token that counts adds to its sequence's."""
    like, module = tokens.logprob, registry.cuda()
    assert module is not None
    out = like.new_empty(tokens.sequences, dtype=accumulate_dtype(like.dtype))
    inverse = like.new_empty(tokens.sequences, dtype=torch.float64)
    packed, _held = tokens.packed()
    with streams.current_stream(like.device) as stream:
        module.rewards(packed, tokens.sequences, _numbers(out), inverse.data_ptr(), stream)
    return out, inverse


def rewards_gradient(
    tokens: Tokens, upstream: Tensor, per: int, gradient: Tensor | None, inverse: Tensor
) -> Tensor:
    """Gradient by the tokens, like ``tokens.logprob``.

    Args:
        tokens: as they were; the log-probs themselves are not read.
        upstream: [sequences / per], possibly one number that is expanded.
        per: sequences that share an upstream gradient.
        gradient: [sequences] of each reward, or None for ones.
        inverse: [sequences], of the forward.
    """
    module = registry.cuda()
    assert module is not None
    out = torch.empty_like(tokens.logprob, memory_format=torch.contiguous_format)
    packed, _held = tokens.packed()
    step = upstream.stride(0) if upstream.numel() else 0
    with streams.current_stream(out.device) as stream:
        module.rewards_gradient(
            *(packed, tokens.sequences, _numbers(upstream), step, per, _numbers(gradient)),
            *(inverse.data_ptr(), _numbers(out), stream),
        )
    return out


def listwise(
    kind: str,
    student: Tensor | Tokens,
    teacher: Tensor,
    valid: Tensor | None,
    beta: float,
    subset_size: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of groups in one launch.

    Args:
        kind: one of :data:`KINDS`.
        student: rewards [groups, n], or the tokens that they are made of, a sequence for each.
        teacher: [groups, n].
        valid: [groups, n] bool, or None.
        beta: scale of all rewards.
        subset_size: responses ranked at once.
        with_gradient: whether to make the gradient.

    Returns:
        Losses [groups], their gradient by the rewards [groups, n] (or [0, n]), and the inverse
        counts of the tokens [groups · n], float64 (or none). NaN for groups with rewards that are
        not finite.
    """
    module = registry.cuda()
    assert module is not None
    of_tokens = isinstance(student, Tokens)
    like = student.logprob if isinstance(student, Tokens) else student
    groups, n = teacher.shape
    dtype = accumulate_dtype(like.dtype)
    loss = like.new_empty(groups, dtype=dtype)
    gradient = like.new_empty((groups if with_gradient else 0, n), dtype=dtype)
    inverse = like.new_empty(groups * n if of_tokens else 0, dtype=torch.float64)
    if groups == 0:
        return loss, gradient, inverse
    given: Tensor | None = None
    if isinstance(student, Tokens):
        tokens, _held = student.packed()
    else:
        tokens, given = module.Tokens(), student.detach().contiguous()
    teacher, valid = teacher.contiguous(), None if valid is None else valid.contiguous()
    present = 0 if valid is None else valid.data_ptr()
    with streams.current_stream(like.device) as stream, Workspace(like.device) as workspace:
        limit = module.shared_limit()
        wide = dtype == torch.float64
        *_, scratch = module.listwise_plan(kind, subset_size, groups, wide, limit)
        space = workspace.empty(scratch // 8, dtype=torch.float64)
        module.listwise(
            *(kind, groups, n, subset_size, beta, _numbers(given), tokens),
            *(_numbers(teacher), present),
            *(_numbers(loss), gradient.data_ptr() if with_gradient else 0),
            *(inverse.data_ptr() if of_tokens else 0, limit, space.data_ptr(), stream),
        )
    return loss, gradient, inverse
