"""Listwise losses as PyTorch's machinery sees them: autograd, opcheck, the compiler."""

from __future__ import annotations

import math

import pytest
import torch
from listwise_cases import rewards, value_and_grad
from torch.autograd import forward_ad
from torch.library import opcheck

from pad_kernels.sequence import listwise_preference_loss
from pad_kernels.sequence.listwise_op import listwise_preference, listwise_scale
from pad_kernels.sequence.plackett_luce import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

VALID = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, listwise_backend):
    s, t = rewards(3, 5).requires_grad_(), rewards(3, 5)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    for options in ({}, {"valid": valid}, {"subset_size": 3}, {"valid": valid, "subset_size": 3}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: listwise_preference_loss(
                x, t, beta=1.3, kind=kind, reduction="none", **o
            ),
            (s,),
        )


def test_backward_again_and_never_twice_differentiated(listwise_backend):
    s, t = rewards(3, 4).requires_grad_(), rewards(3, 4)
    loss = listwise_preference_loss(s, t)
    (first,) = torch.autograd.grad(loss, s, retain_graph=True)
    (again,) = torch.autograd.grad(2.0 * loss, s)
    assert torch.equal(2.0 * first, again)
    loss = listwise_preference_loss(s, t)
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    # The second term has a derivative of its own: dropping the first silently would look fine.
    with pytest.raises(RuntimeError, match="listwise_scale"):
        (grad.square().sum() + s.square().sum()).backward()
    with pytest.raises(RuntimeError):
        torch.autograd.functional.hessian(lambda x: listwise_preference_loss(x, t), s.detach())


def test_other_kinds_of_differentiation_raise():
    s, t = rewards(3, 4), rewards(3, 4)
    loss = lambda x: listwise_preference_loss(x, t)  # noqa: E731
    for call in (
        lambda: torch.func.grad(loss)(s),
        lambda: torch.func.vmap(loss)(s[None]),
        lambda: torch.func.jvp(loss, (s,), (torch.ones_like(s),)),
        lambda: torch.func.jacrev(loss)(s),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            call()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(s, torch.ones_like(s))
        with pytest.raises(RuntimeError, match="forward-mode"):
            loss(dual)


def test_no_gradient_is_made_when_none_is_wanted(listwise_backend):
    s, t = rewards(2, 4).requires_grad_(), rewards(2, 4)
    with torch.no_grad():
        loss = listwise_preference_loss(s, t)
    assert not loss.requires_grad
    assert not listwise_preference_loss(s.detach(), t).requires_grad
    assert listwise_preference(s, t, None, None, "jsd", 1.0, 4, 0, False)[2].shape == (0, 4)


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "valid"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, valid, listwise_backend):
    s, t = rewards(3, 4).requires_grad_(), rewards(3, 4)
    opcheck(listwise_preference, (s, t, valid, None, kind, 2.0, 4, 0, True))
    opcheck(listwise_preference, (s.detach(), t, valid, None, kind, 2.0, 2, 0, False))


def test_opcheck_sampled_and_scale():
    s, t = rewards(3, 9, dtype=torch.float32).requires_grad_(), rewards(3, 9, dtype=torch.float32)
    opcheck(listwise_preference, (s, t, None, torch.tensor(3), "jsd", 2.0, 9, 16, True))
    half = s.detach().to(torch.bfloat16)
    opcheck(listwise_scale, (torch.randn(3), torch.randn(3, 9), half))


@pytest.mark.parametrize(
    ("options", "compiler"),
    [
        ({}, "aot_eager"),
        ({"valid": VALID}, "inductor"),
        ({"samples": 8, "seed": 1}, "aot_eager"),
    ],
    ids=["all", "valid", "sampled"],
)
def test_compiled(options, compiler):
    """As one graph; what its code generator makes of what surrounds the op is seen once."""
    s, t = rewards(3, 4, dtype=torch.float32), rewards(3, 4, dtype=torch.float32)
    plain = lambda x: listwise_preference_loss(x, t, beta=2.0, **options)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, backend=compiler)
    for ours, reference in zip(value_and_grad(compiled, s), value_and_grad(plain, s), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


def test_compiled_code_still_refuses_nan():
    t = rewards(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: listwise_preference_loss(x, t), fullgraph=True, backend="aot_eager"
    )
    compiled(rewards(3, 4))
    with pytest.raises(ValueError, match="student_rewards"):
        compiled(torch.full((3, 4), math.nan, dtype=torch.float64))
