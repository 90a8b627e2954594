"""What autograd may do with the ops, and what it may not: refused, never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_probe import Probe, Watch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pad_kernels as pk

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 30, 6, 41
Op = Callable[..., Tensor]


def token_stats(*args: Any, **options: Any) -> Tensor:
    """Something that depends on all three differentiable statistics, per token."""
    stats = pk.linear_token_stats(*args, **options)
    return stats.logprob + 0.1 * stats.logsumexp.square() - stats.entropy


def options(hidden: Tensor, weight: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return pk.option_logprobs(hidden, weight, torch.tensor([1, 7, 40]), **more)


def listwise(hidden: Tensor, weight: Tensor, labels: Tensor, **more: Any) -> Tensor:
    rows, aligned = hidden[:24].view(8, 3, H), labels[:24].view(8, 3)
    rewards = torch.tensor([[0.3, -1.0, 0.2, 0.1], [1.0, 2.0, 0.5, 0.0]])
    return pk.linear_preference_loss(rows, weight, aligned, rewards, beta=2.0, **more)


#: Every differentiable way in, and every schedule it may take.
ROUTES: list[tuple[Op, str]] = [
    *((pk.linear_cross_entropy, s) for s in ("early", "late", "kept", "reference")),
    (pk.linear_cross_entropy, "early:torch_blocked"),
    *((pk.linear_logprob, s) for s in ("late", "kept", "reference", "late:torch_blocked")),
    *((token_stats, s) for s in ("late", "kept")),
    (options, "late"),
    (listwise, "late"),
]
routes = pytest.mark.parametrize(("op", "plan"), ROUTES)


def make(n: int = N, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, H, requires_grad=True)
    weight = torch.randn(v, H, requires_grad=True)
    labels = torch.randint(v, (n,))
    labels[::7] = -100
    return hidden, weight, labels


def gradients(loss: Tensor, *leaves: Tensor, **more: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves, **more)


# --- what training loops do ---


@routes
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(op: Op, plan: str, reentrant: bool) -> None:
    hidden, weight, labels = make()
    expected = gradients(op(torch.tanh(hidden), weight, labels, plan=plan), hidden, weight)

    def forward(h: Tensor, w: Tensor) -> Tensor:
        return op(torch.tanh(h), w, labels, plan=plan)

    hidden.grad, weight.grad = None, None
    checkpoint(forward, hidden, weight, use_reentrant=reentrant).sum().backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("plan", ["early", "late", "kept"])
def test_micro_batches_add_up_to_the_batch(plan: str) -> None:
    hidden, weight, labels = make(64)
    count = (labels != -100).sum()
    whole = pk.linear_cross_entropy(hidden, weight, labels, plan=plan)
    expected = gradients(whole, hidden, weight)
    weight.grad, total = None, 0.0
    for rows in torch.arange(64).split([5, 30, 1, 28]):
        loss = pk.linear_cross_entropy(
            hidden[rows], weight, labels[rows], normalizer=count, plan=plan
        )
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.parametrize("plan", ["early", "late", "kept"])
def test_tied_embedding_and_head(plan: str) -> None:
    embedding = torch.nn.Embedding(V, H)
    tokens, labels = torch.randint(V, (2, 9)), torch.randint(V, (2, 9))
    dense = torch.nn.functional.cross_entropy(
        (embedding(tokens) @ embedding.weight.T).flatten(0, 1), labels.flatten()
    )
    expected = gradients(dense, embedding.weight)[0]
    loss = pk.linear_cross_entropy(embedding(tokens), embedding.weight, labels, plan=plan)
    loss.backward()
    torch.testing.assert_close(embedding.weight.grad, expected)


@pytest.mark.parametrize(("plan", "units"), [("early", 4), ("late", 6), ("kept", 4)])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_skip_their_product(
    monkeypatch: pytest.MonkeyPatch, plan: str, units: int, frozen: str
) -> None:
    hidden, weight, labels = make()
    expected = dict(
        zip(
            ("hidden", "weight"),
            gradients(pk.linear_cross_entropy(hidden, weight, labels, plan=plan), hidden, weight),
            strict=True,
        )
    )
    given = {"hidden": hidden, "weight": weight}
    given[frozen] = given[frozen].detach()
    pk.linear_cross_entropy(**given, labels=labels, plan=plan).backward()
    assert given[frozen].grad is None
    (free,) = given.keys() - {frozen}
    torch.testing.assert_close(given[free].grad, expected[free])

    probe = Probe.install(monkeypatch)
    with Watch() as watch:
        pk.linear_cross_entropy(**given, labels=labels, plan=plan)
        probe.backward(torch.tensor(1.0))
    assert watch.flops == units * int((labels != -100).sum()) * H * V


@pytest.mark.parametrize("plan", ["early", "late", "kept"])
def test_only_a_bias_to_train(plan: str) -> None:
    hidden, weight, labels = (x.detach() for x in make())
    bias = torch.randn(V, requires_grad=True)
    loss = pk.linear_cross_entropy(hidden, weight, labels, bias=bias, plan=plan)
    dense = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels)
    torch.testing.assert_close(gradients(loss, bias), gradients(dense, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("plan", [None, "late", "kept"])
def test_token_weights_get_their_gradient(plan: str | None, reduction: str) -> None:
    hidden, weight, labels = make()
    weights = torch.rand(N, requires_grad=True)

    def loss(op: Op) -> Tensor:
        return op().square().sum() if reduction == "none" else op()

    ours = loss(
        lambda: pk.linear_cross_entropy(
            hidden, weight, labels, token_weights=weights, reduction=reduction, plan=plan
        )
    )
    dense = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    weighted = dense * weights
    reduced = {
        "mean": weighted.sum() / (labels != -100).sum(),
        "sum": weighted.sum(),
        "none": weighted,
    }[reduction]
    expected = gradients(loss(lambda: reduced), hidden, weight, weights)
    torch.testing.assert_close(gradients(ours, hidden, weight, weights), expected)


def test_unused_outputs_and_a_loss_nobody_differentiates() -> None:
    hidden, weight, labels = make()
    stats = pk.linear_token_stats(hidden, weight, labels)
    assert not stats.argmax.requires_grad
    alone = gradients(stats.entropy, hidden, weight)
    mixed = pk.linear_token_stats(hidden, weight, labels)
    both = gradients(mixed.entropy.sum() + 0.0 * mixed.logprob.sum(), hidden, weight)
    torch.testing.assert_close(alone, both)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_one_of_the_statistics_may_change_in_place(changed: int) -> None:
    hidden, weight, labels = make()
    stats = pk.linear_token_stats(hidden, weight, labels)[:3]
    factors = [3.0 if i == changed else 1.0 for i in range(3)]
    expected = gradients(
        sum((c * x).sum() for c, x in zip(factors, stats, strict=True)), hidden, weight
    )
    stats = pk.linear_token_stats(hidden, weight, labels)[:3]
    stats[changed].mul_(3.0)
    torch.testing.assert_close(gradients(sum(x.sum() for x in stats), hidden, weight), expected)


# --- a second time ---


@routes
def test_a_second_backward(op: Op, plan: str) -> None:
    hidden, weight, labels = make()
    value = op(hidden, weight, labels, plan=plan).sum() * 3.0
    first = gradients(value, hidden, weight, retain_graph=True)
    kept = [g.clone() for g in first]
    if plan.startswith("early"):
        with pytest.raises(RuntimeError, match="plan='late'"):
            gradients(value, hidden, weight, retain_graph=True)
    else:
        second = gradients(value, hidden, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        # And without retain_graph the graph is gone, as with any other op.
        with pytest.raises(RuntimeError, match="second time"):
            gradients(value, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@routes
@pytest.mark.parametrize("wrt", [0, 1])
def test_second_derivatives_raise(op: Op, plan: str, wrt: int) -> None:
    given = make()
    value = op(*given, plan=plan)
    first = torch.autograd.grad(value.sum(), given[wrt], create_graph=True)[0]
    assert first.requires_grad
    with pytest.raises(RuntimeError):
        first.square().sum().backward()


@pytest.mark.parametrize("plan", ["late", "kept"])
def test_second_derivatives_with_respect_to_the_upstream_raise(plan: str) -> None:
    """Linear in the upstream gradient, but that is a derivative of the backward too."""
    hidden, weight, labels = make()
    upstream = torch.randn(N, requires_grad=True)
    value = pk.linear_logprob(hidden, weight, labels, plan=plan)
    first = torch.autograd.grad(value, hidden, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), upstream)


# --- other ways to differentiate ---


@routes
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_raises(op: Op, plan: str, which: int, grad: bool) -> None:
    given = [x.detach().requires_grad_(grad and x.is_floating_point()) for x in make()]
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which].detach(), torch.ones_like(given[which]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            op(*given, plan=plan)


@routes
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev"])
def test_functional_transforms_raise(op: Op, plan: str, transform: str) -> None:
    hidden, weight, labels = (x.detach() for x in make())

    def loss(w: Tensor) -> Tensor:
        return op(hidden, w, labels, plan=plan).sum()

    with pytest.raises((RuntimeError, NotImplementedError)):
        if transform == "vmap":
            torch.func.vmap(loss)(torch.stack([weight, weight]))
        elif transform == "jvp":
            torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
        else:
            getattr(torch.func, transform)(loss)(weight)


def test_tangents_of_the_smaller_arguments_raise() -> None:
    hidden, weight, labels = (x.detach() for x in make())
    for name, value in (
        ("bias", torch.randn(V)),
        ("token_weights", torch.rand(N)),
        ("normalizer", torch.tensor(3.0)),
    ):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            pk.linear_cross_entropy(hidden, weight, labels, **{name: dual})


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_tangents_of_offline_teachers_raise(tail: str) -> None:
    student = pk.Head(*(x.detach() for x in make()[:2]))
    ids = torch.rand(N, V).argsort(1)[:, :3]
    kept = torch.randn(N, 3).log_softmax(1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(kept, torch.ones_like(kept))
        with pytest.raises(RuntimeError, match=r"teacher\.logprobs: forward-mode"):
            pk.linear_divergence(student, pk.TopKTeacher(ids, dual, tail))
        with pytest.raises(RuntimeError, match=r"aligned\.values: forward-mode"):
            pk.linear_expected_advantage(student, pk.TopKAdvantage(ids, dual))


def test_transforms_of_topk_raise() -> None:
    hidden, weight, _ = make()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.vmap(lambda h: pk.linear_topk(h, weight, 2).logprobs)(hidden.view(3, 10, H))


# --- inputs and outputs ---


@routes
def test_same_bits_and_untouched_inputs(op: Op, plan: str) -> None:
    torch.set_num_threads(2)
    given = make(200, 300)
    before = [x.detach().clone() for x in given]
    runs = []
    for _ in range(2):
        value = op(*given, plan=plan)
        runs.append([value, *gradients(value * 0.3, *given[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@routes
def test_outputs_share_no_memory(op: Op, plan: str) -> None:
    given = make()
    value = op(*given, plan=plan)
    found = [value, *gradients(value, *given[:2])]
    places = [x.untyped_storage().data_ptr() for x in (*found, *given)]
    assert len(set(places)) == len(places)


def test_token_stats_share_no_memory_with_labels() -> None:
    hidden, weight, labels = make()
    stats = pk.linear_token_stats(hidden, weight, labels)
    before = labels.clone()
    for x in stats:
        x.detach().fill_(7)
    assert torch.equal(labels, before)


@pytest.mark.parametrize("plan", ["early", "late"])
def test_scaling_twice_scales_nothing_but_the_gradients(plan: str) -> None:
    """Early gradients are scaled in place: by each upstream exactly once."""
    hidden, weight, labels = make()
    expected = gradients(pk.linear_cross_entropy(hidden, weight, labels, plan=plan), hidden)[0]
    for scale in (1.0, -2.0, 0.0, 65536.0):
        loss = pk.linear_cross_entropy(hidden, weight, labels, plan=plan)
        found = gradients(loss * scale, hidden)[0]
        torch.testing.assert_close(found, expected * scale)
