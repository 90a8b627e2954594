"""Sampled listwise losses: unbiased, with an honest error, repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from listwise_cases import rewards, value_and_grad

from pad_kernels.sequence import (
    listwise_preference_estimate,
    listwise_preference_loss,
    listwise_sampling,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["jsd", "jsd_released"])
def test_sampled_estimate_is_unbiased_and_knows_its_error(kind):
    s, t = rewards(1, 6, spread=0.7), rewards(1, 6, spread=0.7)
    exact, exact_grad = value_and_grad(lambda x: listwise_preference_loss(x, t, kind=kind), s)
    # Every group draws for itself, and every seed anew: 10 seeds of 30 equal groups.
    trials, values, errors, grads = 300, [], [], []
    for seed in range(10):
        x = s.repeat(30, 1).requires_grad_()
        estimate = listwise_preference_estimate(
            x, t.repeat(30, 1), kind=kind, samples=64, seed=seed, reduction="none"
        )
        estimate.loss.sum().backward()
        values.append(estimate.loss.detach())
        errors.append(estimate.standard_error)
        grads.append(x.grad)
    values, errors = torch.cat(values), torch.cat(errors)
    spread = values.std().item()
    assert abs(values.mean().item() - exact.item()) < 4 * spread / math.sqrt(trials)
    # Honest: the claimed variance is the variance seen, whose own relative error is √(2/300) = 8 %.
    assert errors.square().mean().sqrt().item() == pytest.approx(spread, rel=0.25)
    grads = torch.cat(grads)
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
