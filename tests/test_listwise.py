"""Listwise preference losses against enumerations written independently of them."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pad_kernels.backends.registry import native
from pad_kernels.sequence import (
    listwise_preference_estimate,
    listwise_preference_loss,
    listwise_sampling,
    listwise_torch,
)
from pad_kernels.sequence.listwise_op import forced_backend, listwise_preference, listwise_scale
from pad_kernels.sequence.plackett_luce import KINDS

EXACT = ("jsd", "jsd_released", "kl", "reverse_kl")
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(native() is None, reason="no compiled module")),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with forced_backend(request.param):
        yield request.param


def rewards(groups, n, spread=1.5, dtype=torch.float64):
    return (torch.randn(groups, n, dtype=torch.float64) * spread).to(dtype)


# --- the oracle: every ranking, its probability multiplied up place by place ----------------------


def ranking_probability(x: Tensor, orders) -> Tensor:
    """Probability of each ranking in ``orders`` [..., n]."""
    orders = torch.tensor(orders)
    probability = torch.ones(orders.shape[:-1], dtype=x.dtype)
    for place in range(orders.shape[-1]):
        probability = probability * torch.softmax(x[orders[..., place:]], -1)[..., 0]
    return probability


def oracle(kind: str, s: Tensor, t: Tensor) -> Tensor:
    """Loss of one group, differentiable in s."""
    n = len(s)
    if kind == "ranking":
        best = sorted(range(n), key=lambda i: (-t[i].item(), i))
        return -ranking_probability(s, best).log()
    if kind == "top1":
        p, q = torch.softmax(s, 0), torch.softmax(t, 0)
        return (q * (q / p).log()).sum()
    orders = list(itertools.permutations(range(n)))
    p, q = ranking_probability(s, orders), ranking_probability(t, orders)
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    return {
        "kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: (kl(p, m) + kl(q, m)) / 2,
        "jsd_released": lambda: (kl(m, p) + kl(m, q)) / 2,
    }[kind]()


def value_and_grad(function, s):
    s = s.detach().clone().requires_grad_()
    value = function(s)
    (grad,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), grad


def expected(kind, s, t):
    return value_and_grad(
        lambda x: torch.stack([oracle(kind, *g) for g in zip(x, t, strict=True)]), s
    )


def close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_enumeration(kind, n, backend):
    s, t = rewards(2, n), rewards(2, n)
    ours = value_and_grad(
        lambda x: listwise_preference_loss(x, t / 2, beta=2.0, kind=kind, reduction="none"), s / 2
    )
    value, grad = expected(kind, s, t)
    close(ours, (value, 2.0 * grad))


@pytest.mark.parametrize("kind", ["jsd", "jsd_released"])
@pytest.mark.parametrize("n", [7, 8])
def test_all_rankings_at_the_limit(kind, n, backend):
    s, t = rewards(3, n), rewards(3, n)
    orders = torch.tensor(list(itertools.permutations(range(n))))

    def dense(x):
        def log_prob(r):
            ranked = r[:, orders]
            return (ranked - ranked.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)

        p, q = log_prob(x), log_prob(t)
        m = torch.logaddexp(p, q) - math.log(2)
        if kind == "jsd":
            return 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)
        return 0.5 * (m.exp() * (2 * m - p - q)).sum(-1)

    ours = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind, reduction="none"), s)
    close(ours, value_and_grad(dense, s))


def test_two_responses_are_a_bernoulli_choice(backend):
    s, t = rewards(5, 2), rewards(5, 2)
    p, q = torch.sigmoid(s[:, 0] - s[:, 1]), torch.sigmoid(t[:, 0] - t[:, 1])

    def kl(a, b):
        return a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()

    m = (p + q) / 2
    wanted = {
        "kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "jsd_released": (kl(m, p) + kl(m, q)) / 2,
        "top1": kl(q, p),
        "ranking": -torch.where(t[:, 0] >= t[:, 1], p, 1 - p).log(),
    }
    for kind, value in wanted.items():
        ours = listwise_preference_loss(s, t, kind=kind, reduction="none")
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)


# --- n = 16: a plain recursion over sets ----------------------------------------------------------


def recursive_kl(x: list[float], y: list[float]) -> float:
    """KL(P_x‖P_y): choosing costs the KL of the two softmaxes, and then the rest is ranked."""
    memo: dict[int, float] = {0: 0.0}
    for chosen in range(1, 1 << len(x)):
        items = [i for i in range(len(x)) if chosen >> i & 1]
        top_x, top_y = max(x[i] for i in items), max(y[i] for i in items)
        lse_x = top_x + math.log(math.fsum(math.exp(x[i] - top_x) for i in items))
        lse_y = top_y + math.log(math.fsum(math.exp(y[i] - top_y) for i in items))
        memo[chosen] = sum(
            math.exp(x[i] - lse_x) * (x[i] - lse_x - y[i] + lse_y + memo[chosen ^ (1 << i)])
            for i in items
        )
    return memo[(1 << len(x)) - 1]


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
def test_sixteen_responses(kind):
    s, t, direction = rewards(1, 16), rewards(1, 16), rewards(1, 16)

    def plain(x):
        a, b = x[0].tolist(), t[0].tolist()
        return recursive_kl(b, a) if kind == "kl" else recursive_kl(a, b)

    step = 1e-5
    slope = (plain(s + step * direction) - plain(s - step * direction)) / (2 * step)
    results = []
    for name in ["torch", "cpp"] if native() else ["torch"]:
        with forced_backend(name):
            value, grad = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
        assert value.item() == pytest.approx(plain(s), rel=1e-12)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-7)
        results.append((value, grad))
    close(results[0], results[-1])


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, backend):
    s, t = rewards(3, 5).requires_grad_(), rewards(3, 5)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    for options in ({}, {"valid": valid}, {"subset_size": 3}, {"valid": valid, "subset_size": 3}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: listwise_preference_loss(
                x, t, beta=1.3, kind=kind, reduction="none", **o
            ),
            (s,),
        )


def test_backward_again_and_never_twice_differentiated(backend):
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


def test_no_gradient_is_made_when_none_is_wanted(backend):
    s, t = rewards(2, 4).requires_grad_(), rewards(2, 4)
    with torch.no_grad():
        loss = listwise_preference_loss(s, t)
    assert not loss.requires_grad
    assert not listwise_preference_loss(s.detach(), t).requires_grad
    assert listwise_preference(s, t, None, None, "jsd", 1.0, 4, 0, False)[2].shape == (0, 4)


VALID = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "valid"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, valid, backend):
    s, t = rewards(3, 4).requires_grad_(), rewards(3, 4)
    opcheck(listwise_preference, (s, t, valid, None, kind, 2.0, 4, 0, True))
    opcheck(listwise_preference, (s.detach(), t, valid, None, kind, 2.0, 2, 0, False))


def test_opcheck_sampled_and_scale():
    s, t = rewards(3, 9, dtype=torch.float32).requires_grad_(), rewards(3, 9, dtype=torch.float32)
    opcheck(listwise_preference, (s, t, None, torch.tensor(3), "jsd", 2.0, 9, 16, True))
    half = s.detach().to(torch.bfloat16)
    opcheck(listwise_scale, (torch.randn(3), torch.randn(3, 9), half))


@pytest.mark.parametrize("options", [{}, {"valid": VALID}, {"samples": 8, "seed": 1}], ids=str)
def test_compiled(options):
    s, t = rewards(3, 4, dtype=torch.float32), rewards(3, 4, dtype=torch.float32)
    plain = lambda x: listwise_preference_loss(x, t, beta=2.0, **options)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True)
    for ours, reference in zip(value_and_grad(compiled, s), value_and_grad(plain, s), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


def test_compiled_code_still_refuses_nan():
    t = rewards(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: listwise_preference_loss(x, t), fullgraph=True)
    compiled(rewards(3, 4))
    with pytest.raises(ValueError, match="student_rewards"):
        compiled(torch.full((3, 4), math.nan, dtype=torch.float64))


# --- what the arguments mean ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_valid_is_leaving_responses_out(kind, backend):
    s, t = rewards(4, 5), rewards(4, 5)
    valid = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    ).bool()
    s[~valid], t[~valid] = math.nan, math.inf  # padding may be anything
    value, grad = value_and_grad(
        lambda x: listwise_preference_loss(x, t, kind=kind, valid=valid, reduction="none"), s
    )
    for g in range(4):
        keep = valid[g]
        if keep.sum() < 2:
            assert value[g] == 0 and not grad[g].any()
            continue
        part = value_and_grad(lambda x, k=keep, i=g: oracle(kind, x, t[i, k]), s[g, keep])
        close((value[g], grad[g, keep]), part)
        assert not grad[g, ~keep].any()
    mean = listwise_preference_loss(s, t, kind=kind, valid=valid)
    assert mean.item() == pytest.approx(value.sum().item() / 3, rel=1e-12)
    total = listwise_preference_loss(s, t, kind=kind, valid=valid, reduction="sum")
    assert total.item() == pytest.approx(value.sum().item(), rel=1e-12)


def test_nothing_to_rank(backend):
    s, t = rewards(3, 4).requires_grad_(), rewards(3, 4)
    loss = listwise_preference_loss(s, t, valid=torch.zeros(3, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not s.grad.any()
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = listwise_preference_loss(empty, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 4)
    none = torch.zeros(0, 4, dtype=torch.bool)
    assert listwise_preference_loss(empty, torch.zeros(0, 4), valid=none).item() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "size"), [(6, 3), (6, 2), (5, 3), (8, 6), (4, 4)])
def test_subsets(kind, n, size, backend):
    s, t = rewards(3, n), rewards(3, n)

    def split(x):
        parts = [
            torch.stack([oracle(kind, *g) for g in zip(a, b, strict=True)])
            for a, b in zip(x.split(size, 1), t.split(size, 1), strict=True)
        ]
        return torch.stack(parts).mean(0)

    ours = value_and_grad(
        lambda x: listwise_preference_loss(x, t, kind=kind, subset_size=size, reduction="none"), s
    )
    close(ours, value_and_grad(split, s))


def test_subsets_of_which_some_are_not_valid(backend):
    s, t = rewards(2, 5), rewards(2, 5)
    valid = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 0, 1]]).bool()
    ours = listwise_preference_loss(s, t, kind="kl", subset_size=3, valid=valid, reduction="none")
    # The last subset of group 0 has one response left; group 1 has nothing to rank anywhere.
    wanted = oracle("kl", s[0, :3], t[0, :3])
    torch.testing.assert_close(ours, torch.stack([wanted, torch.zeros_like(wanted)]))
    mean = listwise_preference_loss(s, t, kind="kl", subset_size=3, valid=valid)
    torch.testing.assert_close(mean, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_responses_does_not_matter(kind, backend):
    s, t, shuffle = rewards(3, 7), rewards(3, 7), torch.randperm(7)
    value, grad = value_and_grad(
        lambda x: listwise_preference_loss(x, t, kind=kind, reduction="none"), s
    )
    moved = value_and_grad(
        lambda x: listwise_preference_loss(x, t[:, shuffle], kind=kind, reduction="none"),
        s[:, shuffle],
    )
    close(moved, (value, grad[:, shuffle]))


def test_ties_of_the_teacher_rank_by_index(backend):
    s = rewards(1, 4)
    t = torch.tensor([[0.5, 1.0, 0.5, 1.0]])
    ours = listwise_preference_loss(s, t, kind="ranking")
    torch.testing.assert_close(ours, -ranking_probability(s[0], (1, 3, 0, 2)).log())
    valid = torch.tensor([[True, False, True, True]])
    ours = listwise_preference_loss(s, t, kind="ranking", valid=valid)
    torch.testing.assert_close(ours, -ranking_probability(s[0, [0, 2, 3]], (2, 0, 1)).log())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_have_no_divergence(kind, backend):
    s = rewards(4, 6, dtype=torch.float32).requires_grad_()
    loss = listwise_preference_loss(s, s.detach(), beta=10.0, kind=kind)
    loss.backward()
    if kind == "ranking":
        assert loss > 0
    else:
        assert 0 <= loss.item() < 1e-7 and s.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_cost_one_rounding(kind, dtype, backend):
    s, t = rewards(4, 6, dtype=dtype), rewards(4, 6, dtype=dtype)
    exact = value_and_grad(lambda x: listwise_preference_loss(x, t.double(), kind=kind), s.double())
    value, grad = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert abs(value.item() - exact[0].item()) <= 2.4e-7 * exact[0].item()
    eps = torch.finfo(dtype).eps
    assert (grad.double() - exact[1]).norm() <= eps * exact[1].norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0e2, 1.0e4])
def test_large_rewards(kind, scale, backend):
    s, t = rewards(4, 6) * scale, rewards(4, 6) * scale
    value, grad = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
    assert value.isfinite() and grad.isfinite().all()
    if kind == "jsd":
        assert value.item() == pytest.approx(math.log(2), rel=1e-3)
    if kind == "kl":
        # One ranking has all the mass: the KL is what the student's ranking loss says of it.
        best = listwise_preference_loss(s, t, kind="ranking").item()
        assert value.item() == pytest.approx(best, rel=1e-6 if scale > 1e3 else 0.05)


@pytest.mark.parametrize("kind", EXACT)
def test_one_dominating_response_does_not_hide_the_others(kind, backend):
    """The sets without it decide the loss, though exp of their rewards against it is 0."""
    s, t = rewards(2, 4), rewards(2, 4)
    head = torch.full((2, 1), 1e4, dtype=torch.float64)
    with_head = value_and_grad(
        lambda x: listwise_preference_loss(
            torch.cat([head, x], 1), torch.cat([head, t], 1), kind=kind, reduction="none"
        ),
        s,
    )
    close(with_head, expected(kind, s, t), 1e-9)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_inputs_of_any_layout_are_left_alone(layout, backend):
    base = rewards(4, 6)
    s = {
        "transposed": base.T.contiguous().T,
        "expanded": base[:1].expand(4, 6),
        "strided": torch.stack([base, base + 1], -1)[..., 0],
    }[layout]
    t = rewards(4, 6)
    before = s.clone(), t.clone()
    ours = value_and_grad(lambda x: listwise_preference_loss(x, t), s)
    assert torch.equal(listwise_preference_loss(s, t), ours[0])
    strided = s.detach().requires_grad_() if layout != "expanded" else base[:1].requires_grad_()
    seen = strided if layout != "expanded" else strided.expand(4, 6)
    (grad,) = torch.autograd.grad(listwise_preference_loss(seen, t), strided)
    torch.testing.assert_close(grad, ours[1] if layout != "expanded" else ours[1].sum(0)[None])
    assert torch.equal(s, before[0]) and torch.equal(t, before[1])


@pytest.mark.skipif(native() is None, reason="no compiled module")
@pytest.mark.parametrize("kind", EXACT)
def test_backends_agree_and_repeat_their_bits(kind):
    n = 12 if "kl" in kind else 8
    s, t = rewards(5, n, spread=4.0), rewards(5, n, spread=4.0)
    results = {}
    for name in ("cpp", "torch"):
        with forced_backend(name):
            runs = [
                value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
                for _ in range(2)
            ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        results[name] = runs[0]
    close(results["cpp"], results["torch"], 1e-11)


def test_backend_names():
    with pytest.raises(ValueError, match="cpp or torch"), forced_backend("fortran"):
        pass


def test_a_missing_backend_does_not_fall_back(monkeypatch):
    from pad_kernels.sequence import listwise_op

    monkeypatch.setattr(listwise_op, "native", lambda: None)
    s, t = rewards(1, 3), rewards(1, 3)
    assert listwise_preference_loss(s, t).isfinite()
    with forced_backend("cpp"), pytest.raises(RuntimeError, match="not available"):
        listwise_preference_loss(s, t)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsd", "jsd_released"])
def test_sampled_estimate_is_unbiased_and_knows_its_error(kind):
    s, t = rewards(1, 6, spread=0.7), rewards(1, 6, spread=0.7)
    exact, exact_grad = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
    trials, values, errors, grads = 300, [], [], []
    for seed in range(trials):
        x = s.clone().requires_grad_()
        estimate = listwise_preference_estimate(x, t, kind=kind, samples=64, seed=seed)
        estimate.loss.backward()
        values.append(estimate.loss.item())
        errors.append(estimate.standard_error.item())
        grads.append(x.grad)
    values, errors = torch.tensor(values), torch.tensor(errors)
    spread = values.std().item()
    assert abs(values.mean().item() - exact.item()) < 4 * spread / math.sqrt(trials)
    # Honest: the claimed variance is the variance seen, whose own relative error is √(2/300) = 8 %.
    assert errors.square().mean().sqrt().item() == pytest.approx(spread, rel=0.25)
    grads = torch.stack(grads)
    off = (grads.mean(0) - exact_grad).abs() / (grads.std(0) / math.sqrt(trials))
    assert off.max() < 4


def test_sampled_estimate_at_twenty_responses():
    s, t = rewards(3, 20, dtype=torch.float32), rewards(3, 20, dtype=torch.float32)
    one = listwise_preference_estimate(s, t, samples=2000, seed=5, reduction="none")
    two = listwise_preference_estimate(s, t, samples=2000, seed=6, reduction="none")
    assert one.loss.dtype == torch.float32 and one.standard_error.shape == (3,)
    assert ((one.loss > 0) & (one.loss < math.log(2))).all()
    both = (one.standard_error.square() + two.standard_error.square()).sqrt()
    assert ((one.loss - two.loss).abs() < 5 * both).all()
    assert not torch.equal(one.loss, two.loss)
    again = listwise_preference_estimate(s, t, samples=2000, seed=5, reduction="none")
    assert torch.equal(one.loss, again.loss)


def test_errors_of_groups_and_subsets_add_up_in_squares():
    s, t = rewards(3, 6), rewards(3, 6)
    options = {"samples": 64, "seed": 1}
    each = listwise_preference_estimate(s, t, reduction="none", **options).standard_error
    total = listwise_preference_estimate(s, t, reduction="sum", **options).standard_error
    mean = listwise_preference_estimate(s, t, **options).standard_error
    torch.testing.assert_close(total, each.square().sum().sqrt())
    torch.testing.assert_close(mean, total / 3)
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[2, 1:] = False
    lone = listwise_preference_estimate(s, t, valid=valid, reduction="none", **options)
    assert lone.standard_error[2] == 0
    some = listwise_preference_estimate(s, t, valid=valid, **options)
    torch.testing.assert_close(some.loss, lone.loss.sum() / 2)
    torch.testing.assert_close(some.standard_error, lone.standard_error.square().sum().sqrt() / 2)
    halves = listwise_preference_estimate(
        s.view(6, 3), t.view(6, 3), reduction="none", **options
    ).standard_error.view(3, 2)
    split = listwise_preference_estimate(s, t, subset_size=3, reduction="none", **options)
    torch.testing.assert_close(split.standard_error, halves.square().sum(1).sqrt() / 2)


def test_seed_comes_from_torch_when_none_is_given():
    s, t = rewards(1, 5), rewards(1, 5)
    torch.manual_seed(3)
    first, other = (listwise_preference_loss(s, t, samples=16) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, listwise_preference_loss(s, t, samples=16))
    assert not torch.equal(first, other)


def test_samples_are_drawn_in_blocks(monkeypatch):
    """Blocks only bound the memory: every one of them adds its share."""
    s, t = rewards(2, 5), rewards(2, 5)
    exact = listwise_preference_loss(s, t)
    monkeypatch.setattr(listwise_sampling, "_BLOCK", 70)  # seven rankings at a time
    estimate = listwise_preference_estimate(s, t, samples=4001, seed=0)
    assert abs(estimate.loss - exact) < 4 * estimate.standard_error


def test_sampling_gradients_of_rare_rankings_stay_finite():
    s, t = rewards(2, 10) * 1e4, rewards(2, 10) * 1e4
    for kind in ("jsd", "jsd_released"):
        value, grad = value_and_grad(
            lambda x, k=kind: listwise_preference_loss(x, t, kind=k, samples=32, seed=0), s
        )
        assert value.isfinite() and grad.isfinite().all()


# --- memory ---------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of storage alive, made by the operations inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in {x.data_ptr() for x in self.seen}:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage.nbytes())
                    self.peak = max(self.peak, self.now)
        return out

    def release(self, nbytes):
        self.now -= nbytes


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
@pytest.mark.parametrize("groups", [1, 4])
def test_memory_of_the_twin_at_sixteen(kind, groups):
    s, t = rewards(groups, 16), rewards(groups, 16)
    with LiveBytes() as live:
        listwise_torch.solve(kind, s, t)
    assert live.peak > groups * 3 * 8 * 2**16  # the mode does see the tables
    shared = 4 * 8 * 2**16  # which sets there are, by level: not per group
    assert live.peak - shared < groups * 4 * 2**20


@pytest.mark.parametrize("kind", ["jsd", "jsd_released"])
def test_memory_of_the_twin_for_jsd(kind):
    listwise_torch.solve(kind, rewards(1, 8), rewards(1, 8))  # fill the cache of orders
    s, t = rewards(16, 8), rewards(16, 8)
    with LiveBytes() as live:
        listwise_torch.solve(kind, s, t)
    one_array = 16 * math.factorial(8) * 8
    assert live.peak < one_array


@pytest.mark.skipif(native() is None, reason="no compiled module")
def test_workspace_of_the_kernels():
    for kind in ("kl", "reverse_kl"):
        assert 2**16 < 8 * native().listwise_words(kind, 16) < 4 * 2**20
    assert 8 * native().listwise_words("jsd", 8) < 16 * 2**10


@pytest.mark.skipif(native() is None, reason="no compiled module")
def test_kernels_check_their_arguments():
    with pytest.raises(ValueError, match="kind"):
        native().listwise_words("ranking", 4)
    for kind, n in (("jsd", 9), ("kl", 17), ("kl", 0)):
        with pytest.raises(ValueError, match="n: expected"):
            native().listwise_words(kind, n)


# --- what is refused ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("which", [0, 1])
def test_where_checking_would_wait_bad_rewards_become_nan(monkeypatch, which):
    """What happens on a GPU, whose values the host does not see."""
    from pad_kernels.sequence import listwise_op

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


def test_twenty_responses_in_subsets_or_sampled_are_fine():
    s, t = torch.zeros(2, 20), torch.zeros(2, 20)
    assert listwise_preference_loss(s, t, subset_size=5).item() == pytest.approx(0, abs=1e-7)
    assert listwise_preference_loss(s, t, samples=8, seed=0).item() == pytest.approx(0, abs=1e-7)
    assert listwise_preference_loss(s, t, kind="top1").item() == 0
