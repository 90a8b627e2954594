"""Rewards and Plackett-Luce kernels of csrc/cuda/ on a CPU, against the torch ones."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

import pad_kernels as pk
from pad_kernels.sequence import gpu
from pad_kernels.sequence.listwise_op import forced_backend
from pad_kernels.sequence.token_ops import token_listwise, token_rewards

pytestmark = pytest.mark.usefixtures("one_thread")

# as many as one: two sets; odd halves; every kind's usual size; the largest jsd
SIZES = [2, 3, 4, 7, 8]


@pytest.fixture(scope="module")
def module() -> Any:
    return cuda_on_cpu.load()


@pytest.fixture
def kernels(module: Any) -> Iterator[Any]:
    with cuda_on_cpu.in_place_of_a_gpu(module):
        yield module


def listwise_by(how: str, student: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Losses and gradients by the kernels or by torch."""
    leaf = student.detach().clone().requires_grad_()
    if how == "torch":
        with forced_backend("torch"):
            loss = pk.listwise_preference_loss(leaf, *args, **kwargs)
    else:
        loss = pk.listwise_preference_loss(leaf, *args, **kwargs)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad((loss * upstream).sum(), leaf)[0]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", gpu.KINDS)
@pytest.mark.parametrize("spread", [0.0, 1.5, 60.0])
def test_listwise_losses(kernels: Any, kind: str, n: int, spread: float) -> None:
    """To a few roundings of a group's loss, which has as many nats as the gradient's terms: an
    entry is what is left of (log p_s - log p_t - loss), and may be far smaller."""
    for dtype, roundings in ((torch.float64, 256), (torch.float32, 16)):
        tolerance = roundings * torch.finfo(dtype).eps
        student, teacher = (torch.randn(3, n, dtype=torch.float64).to(dtype) * spread for _ in "st")
        options = {"kind": kind, "beta": 0.7, "reduction": "none"}
        loss, gradient = listwise_by("cuda", student, teacher, **options)
        loss_wanted, gradient_wanted = listwise_by("torch", student, teacher, **options)
        nats = loss_wanted.clamp(min=1.0)
        close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
        close(loss / nats, loss_wanted / nats)
        close(gradient / nats[:, None], gradient_wanted / nats[:, None])


@pytest.mark.parametrize("leading", [(0, 3), (0,)], ids=str)
def test_no_groups(kernels: Any, leading: tuple[int, ...]) -> None:
    hidden = torch.randn(*leading, 2, 4, requires_grad=True)
    labels, teacher = torch.zeros(*leading, 2).long(), torch.zeros(0, 3)
    loss = pk.linear_preference_loss(hidden, torch.randn(5, 4), labels, teacher, beta=1.0)
    loss.backward()
    assert loss == 0 and hidden.grad is not None


def test_tangents_raise(kernels: Any) -> None:
    hidden, weight, labels = torch.randn(2, 3, 2, 4), torch.randn(5, 4), torch.ones(2, 3, 2).long()
    teacher, logprob = torch.randn(2, 3), -torch.rand(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(teacher, torch.ones_like(teacher))
        with pytest.raises(RuntimeError, match="teacher_rewards: forward-mode"):
            pk.linear_preference_loss(hidden, weight, labels, dual, beta=1.0)
        dual = forward_ad.make_dual(logprob, torch.ones_like(logprob))
        with pytest.raises(RuntimeError, match="logprob: forward-mode"):
            pk.sequence_reward(dual)


@pytest.mark.parametrize(("kind", "size"), [("kl", 5), ("reverse_kl", 4), ("jsd", 3)])
def test_subsets_and_responses_that_do_not_exist(kernels: Any, kind: str, size: int) -> None:
    student, teacher = torch.randn(6, 12).double(), torch.randn(6, 12).double()
    valid = torch.rand(6, 12) < 0.6
    valid[0], valid[1] = False, torch.arange(12) == 2
    student[~valid] = math.nan
    for present in (valid, None):
        given = student.nan_to_num(0.3) if present is None else student
        for reduction in ("none", "mean", "sum"):
            options = {"kind": kind, "valid": present, "subset_size": size, "reduction": reduction}
            wanted = listwise_by("torch", given, teacher, **options)
            for a, b in zip(listwise_by("cuda", given, teacher, **options), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
@pytest.mark.parametrize("limit", [163 << 10, 20 << 10, 4 << 10])
def test_sets_in_shared_and_in_global_memory(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    """n = 12 as doubles, as floats where the result is one, and beyond the block's memory."""
    student, teacher = torch.randn(2, 12) * 2, torch.randn(2, 12) * 2
    wanted = listwise_by("torch", student, teacher, kind=kind, reduction="none")
    patched = _Limited(kernels, limit)
    with cuda_on_cpu.in_place_of_a_gpu(patched):
        found = listwise_by("cuda", student, teacher, kind=kind, reduction="none")
    storage = patched.listwise_plan(kind, 12, 2, False, limit)[0]
    assert storage == {163 << 10: "shared64", 20 << 10: "shared32", 4 << 10: "global64"}[limit]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


class _Limited:
    """The module on a device with so much shared memory."""

    def __init__(self, module: Any, limit: int) -> None:
        self._module, self._limit = module, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def shared_limit(self) -> int:
        return self._limit


def test_rewards_that_are_no_numbers_spoil_their_group_only(kernels: Any) -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    student[1, 2], teacher[2, 0] = math.inf, math.nan
    for kind in gpu.KINDS:
        loss, gradient, _ = gpu.listwise(kind, student, teacher, None, 1.0, 5, True)
        assert loss.isnan().tolist() == [False, True, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, True, False]


def test_one_valid_response_and_no_groups(kernels: Any) -> None:
    empty = listwise_by("cuda", torch.zeros(0, 3), torch.zeros(0, 3))
    assert empty[0] == 0 and empty[1].shape == (0, 3)


def _token_case(packed: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Sequences of 0 to 40 tokens, some masked, some whose label does not count."""
    lengths = torch.tensor([5, 0, 40, 1, 17, 3])
    shape = (int(lengths.sum()),) if packed else (2, 3, 41)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = torch.randint(0, 9, shape, dtype=torch.int32)
    mask = torch.rand(shape) < 0.7
    logprob = -torch.rand(shape, dtype=torch.float64).to(dtype)
    logprob[~mask] = math.nan
    return {
        "logprob": logprob,
        "mask": mask,
        "labels": labels.masked_fill(labels == 3, -100),
        "cu_seqlens": offsets.int() if packed else None,
    }


@pytest.mark.parametrize("normalize", ["length", "none"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sequence_rewards(module: Any, dtype: torch.dtype, packed: bool, normalize: str) -> None:
    given = _token_case(packed, dtype)
    found = []
    for on_gpu in (True, False):
        leaf = given["logprob"].clone().requires_grad_()
        call = functools.partial(pk.sequence_reward, **{**given, "logprob": leaf})
        if on_gpu:
            with cuda_on_cpu.in_place_of_a_gpu(module):
                reward = call(normalize=normalize)
                upstream = torch.linspace(1, 2, reward.numel(), dtype=reward.dtype)
                (grad,) = torch.autograd.grad(reward, leaf, upstream.view(reward.shape))
        else:
            reward = call(normalize=normalize)
            (grad,) = torch.autograd.grad(reward, leaf, upstream.view(reward.shape))
        found.append((reward.detach(), grad))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        loose = {"rtol": 1e-2, "atol": 1e-4} if a.dtype.itemsize == 2 else {}
        torch.testing.assert_close(a, b, **loose)


def test_boundaries_that_are_none_do_not_lead_out_of_memory(kernels: Any) -> None:
    logprob = torch.randn(10)
    for wild in ([0, 4, 99], [-7, 4, 10], [3, 8, 6]):
        offsets = torch.tensor(wild)
        reward, inverse = token_rewards(logprob, offsets, None, None, -100, True)
        assert reward.isfinite().all() and inverse.isfinite().all()


def test_ops_are_well_behaved(kernels: Any) -> None:
    logprob = -torch.rand(23, requires_grad=True)
    offsets = torch.tensor([0, 4, 9, 9, 23])
    labels = torch.randint(0, 4, (23,))
    opcheck(token_rewards, (logprob, offsets, None, labels, 0, True))
    teacher = torch.randn(2, 2)
    opcheck(token_listwise, (logprob, teacher, offsets, labels, None, "kl", 2.0, 2, 0, True, True))
    double = -torch.rand(23, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: token_rewards(x, offsets, None, labels, 0, True)[0], (double,)
    )


@pytest.mark.parametrize("kind", gpu.KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_training_step_in_one_launch_each_way(
    module: Any, monkeypatch: pytest.MonkeyPatch, kind: str, packed: bool
) -> None:
    """Hidden states to loss and gradients, as without the fused kernels."""
    torch.manual_seed(3)
    hidden = torch.randn(24, 5) if packed else torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 11, hidden.shape[:-1])
    labels.view(-1)[::5] = -100
    weight, teacher = torch.randn(11, 5), torch.randn(2, 3)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    cu = torch.tensor([0, 5, 6, 12, 12, 20, 24]) if packed else None
    launches: list[str] = []

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            launches.append(name)
            return getattr(module, name)(*args)

        return call

    class Counted(_Limited):
        rewards, listwise = counted("rewards"), counted("listwise")
        rewards_gradient = counted("rewards_gradient")

        def shared_limit(self) -> int:
            return int(module.shared_limit())

    for name in ("rewards", "listwise", "rewards_gradient"):
        monkeypatch.setattr(Counted, name, staticmethod(getattr(Counted, name)))

    def step() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = pk.linear_preference_loss(
            *leaves, labels, teacher, beta=3.0, kind=kind, cu_seqlens=cu, valid=valid, plan="late"
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    wanted = step()
    with cuda_on_cpu.in_place_of_a_gpu(Counted(module, 0)):
        found = step()
    assert launches == ["listwise", "rewards_gradient"]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_device_of_the_tensors_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each GPU makes no context on the first one but its own."""
    asked: list[int] = []
    monkeypatch.setattr(gpu.registry, "cuda_error", lambda device: asked.append(device) or "")
    for place in ("cuda:3", "cuda:0", "cpu"):
        tensor = types.SimpleNamespace(device=torch.device(place))
        assert gpu.usable(tensor) == (place != "cpu")  # type: ignore[arg-type]
    assert asked == [3, 0]
