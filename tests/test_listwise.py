"""Values and gradients of listwise losses against enumerations written independently of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from listwise_cases import close, expected, oracle, ranking_probability, rewards, value_and_grad
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from pad_kernels.backends.registry import native
from pad_kernels.sequence import listwise_op, listwise_preference_loss
from pad_kernels.sequence.listwise_op import forced_backend
from pad_kernels.sequence.plackett_luce import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = ("jsd", "jsd_released", "kl", "reverse_kl")


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_enumeration(kind, n, listwise_backend):
    s, t = rewards(2, n), rewards(2, n)
    ours = value_and_grad(
        lambda x: listwise_preference_loss(x, t / 2, beta=2.0, kind=kind, reduction="none"), s / 2
    )
    value, grad = expected(kind, s, t)
    close(ours, (value, 2.0 * grad))


@pytest.mark.parametrize("kind", ["jsd", "jsd_released"])
@pytest.mark.parametrize("n", [7, 8])
def test_all_rankings_at_the_limit(kind, n, listwise_backend):
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


def test_two_responses_are_a_bernoulli_choice(listwise_backend):
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
    """Values are right; gradients are the slopes of values."""
    s, t, direction = rewards(1, 16), rewards(1, 16), rewards(1, 16)
    a, b = s[0].tolist(), t[0].tolist()
    plain = recursive_kl(b, a) if kind == "kl" else recursive_kl(a, b)
    step = 1e-5
    results = []
    for name in ["torch", "cpp"] if native() else ["torch"]:
        loss = lambda x: listwise_preference_loss(x, t, kind=kind)  # noqa: E731
        with forced_backend(name):
            value, grad = value_and_grad(loss, s)
            rise = loss(s + step * direction) - loss(s - step * direction)
        assert value.item() == pytest.approx(plain, rel=1e-12)
        slope = rise.item() / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-7)
        results.append((value, grad))
    close(results[0], results[-1])


# --- what the arguments mean ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [6, 3])
def test_rewards_of_any_layout(kind, size, listwise_backend):
    s, t, valid = rewards(4, 6), rewards(1, 6).expand(4, 6), torch.ones(4, 6, dtype=torch.bool)
    options = {"kind": kind, "subset_size": size, "reduction": "none"}
    plain = value_and_grad(lambda x: listwise_preference_loss(x, t.contiguous(), **options), s)
    for mask in (None, valid.t().contiguous().t()):
        ours = value_and_grad(
            lambda x, mask=mask: listwise_preference_loss(x.t(), t, valid=mask, **options), s.t()
        )
        close(ours, (plain[0], plain[1].t()))
    across = t.t().contiguous().t()
    close(value_and_grad(lambda x: listwise_preference_loss(x, across, **options), s), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_valid_is_leaving_responses_out(kind, listwise_backend):
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


def test_nothing_to_rank(listwise_backend):
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
def test_subsets(kind, n, size, listwise_backend):
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


def test_subsets_of_which_some_are_not_valid(listwise_backend):
    s, t = rewards(2, 5), rewards(2, 5)
    valid = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 0, 0, 1]]).bool()
    ours = listwise_preference_loss(s, t, kind="kl", subset_size=3, valid=valid, reduction="none")
    # The last subset of group 0 has one response left; group 1 has nothing to rank anywhere.
    wanted = oracle("kl", s[0, :3], t[0, :3])
    torch.testing.assert_close(ours, torch.stack([wanted, torch.zeros_like(wanted)]))
    mean = listwise_preference_loss(s, t, kind="kl", subset_size=3, valid=valid)
    torch.testing.assert_close(mean, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_responses_does_not_matter(kind, listwise_backend):
    s, t, shuffle = rewards(3, 7), rewards(3, 7), torch.randperm(7)
    value, grad = value_and_grad(
        lambda x: listwise_preference_loss(x, t, kind=kind, reduction="none"), s
    )
    moved = value_and_grad(
        lambda x: listwise_preference_loss(x, t[:, shuffle], kind=kind, reduction="none"),
        s[:, shuffle],
    )
    close(moved, (value, grad[:, shuffle]))


def test_ties_of_the_teacher_rank_by_index(listwise_backend):
    s = rewards(1, 4)
    t = torch.tensor([[0.5, 1.0, 0.5, 1.0]])
    ours = listwise_preference_loss(s, t, kind="ranking")
    torch.testing.assert_close(ours, -ranking_probability(s[0], (1, 3, 0, 2)).log())
    valid = torch.tensor([[True, False, True, True]])
    ours = listwise_preference_loss(s, t, kind="ranking", valid=valid)
    torch.testing.assert_close(ours, -ranking_probability(s[0, [0, 2, 3]], (2, 0, 1)).log())


# --- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_have_no_divergence(kind, listwise_backend):
    s = rewards(4, 6, dtype=torch.float32).requires_grad_()
    loss = listwise_preference_loss(s, s.detach(), beta=10.0, kind=kind)
    loss.backward()
    if kind == "ranking":
        assert loss > 0
    else:
        assert 0 <= loss.item() < 1e-7 and s.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_cost_one_rounding(kind, dtype, listwise_backend):
    s, t = rewards(4, 6, dtype=dtype), rewards(4, 6, dtype=dtype)
    exact = value_and_grad(lambda x: listwise_preference_loss(x, t.double(), kind=kind), s.double())
    value, grad = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert abs(value.item() - exact[0].item()) <= 2.4e-7 * exact[0].item()
    eps = torch.finfo(dtype).eps
    assert (grad.double() - exact[1]).norm() <= eps * exact[1].norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0e2, 1.0e4])
def test_large_rewards(kind, scale, listwise_backend):
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
def test_one_dominating_response_does_not_hide_the_others(kind, listwise_backend):
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
def test_inputs_of_any_layout_are_left_alone(layout, listwise_backend):
    base = rewards(4, 6)
    s = {
        "transposed": base.T.contiguous().T,
        "expanded": base[:1].expand(4, 6),
        "strided": torch.stack([base, base + 1], -1)[..., 0],
    }[layout]
    t = rewards(4, 6)
    before = s.clone(), t.clone()
    ours = value_and_grad(lambda x: listwise_preference_loss(x, t), s.contiguous())
    assert torch.equal(listwise_preference_loss(s, t), ours[0])
    assert torch.equal(listwise_preference_loss(s, t.T.contiguous().T), ours[0])
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
            runs = []
            for threads in (1, 2, 2):  # groups are shared out between them
                torch.set_num_threads(threads)
                runs.append(value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        results[name] = runs[0]
    close(results["cpp"], results["torch"], 1e-11)


@pytest.mark.parametrize("kind", ["ranking", "top1"])
def test_whole_groups_wait_for_no_device(kind: str) -> None:
    """Kinds without kernels on a GPU: a fake tensor has no counts to look at."""
    with FakeTensorMode():
        student, teacher = (torch.empty(5, 4, dtype=torch.float64) for _ in "st")
        arguments = kind, student, teacher, torch.full((5,), 4), 0, None
        found = listwise_op._solve_rows(*arguments, whole=True, with_gradient=True)
        with pytest.raises(DynamicOutputShapeException):
            listwise_op._solve_rows(*arguments, whole=False, with_gradient=True)
    assert [x.shape for x in found] == [(5,), (5,), (5, 4)]
