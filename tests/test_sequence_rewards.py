"""Sequence rewards, PAD's calibration, and the way from hidden states to the listwise loss."""

from __future__ import annotations

import math

import pytest
import torch

from pad_kernels.sequence import (
    calibrated_rewards,
    linear_preference_loss,
    listwise_preference_loss,
    sequence_reward,
)

IGNORE = -100


def test_mean_and_sum_of_the_tokens_that_count():
    logprob = torch.tensor([[-1.0, -3.0, -9.0], [-2.0, -4.0, -6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sequence_reward(logprob, mask=mask).tolist() == [-2.0, -4.0]
    assert sequence_reward(logprob, mask=mask, normalize="none").tolist() == [-4.0, -12.0]
    assert sequence_reward(logprob).tolist() == pytest.approx([-13 / 3, -4.0])
    labels = torch.tensor([[5, IGNORE, 7], [IGNORE, 0, 1]])
    assert sequence_reward(logprob, labels=labels).tolist() == [-5.0, -5.0]
    assert sequence_reward(logprob, labels=labels, mask=mask).tolist() == [-1.0, -5.0]
    zero = sequence_reward(logprob, labels=labels, ignore_index=0)  # now only label 0 is left out
    assert zero.tolist() == pytest.approx([-13 / 3, -4.0])


def test_narrow_labels_are_compared_with_the_whole_index():
    logprob = torch.tensor([[-1.0, -2.0]])
    labels = torch.tensor([[156, 3]], dtype=torch.uint8)  # 156 is -100 in eight bits
    assert sequence_reward(logprob, labels=labels, normalize="none").tolist() == [-3.0]


def test_nothing_that_counts_is_reward_zero():
    logprob = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3])
    for normalize in ("length", "none"):
        reward = sequence_reward(logprob, mask=mask, normalize=normalize)
        assert reward[0] == 0 and reward[1] != 0
        (grad,) = torch.autograd.grad(reward.sum(), logprob)
        assert not grad[0].any() and grad[1].all()
    assert sequence_reward(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    assert sequence_reward(torch.zeros(0, 3)).shape == (0,)


def test_what_is_masked_out_may_be_anything():
    logprob = torch.tensor([[-1.0, math.nan], [-math.inf, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    reward = sequence_reward(logprob, mask=mask)
    reward.sum().backward()
    assert reward.tolist() == [-1.0, -2.0]
    assert logprob.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("normalize", ["length", "none"])
def test_packed_is_padded_without_the_padding(normalize, dtype):
    lengths = [3, 0, 5, 1, 0]
    cu = torch.tensor([0, 3, 3, 8, 9, 9], dtype=dtype)
    packed = torch.randn(9, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
    ours = sequence_reward(packed, mask=keep, cu_seqlens=cu, normalize=normalize)
    parts = zip(packed.split(lengths), keep.split(lengths), strict=True)
    sums = torch.stack([p[k].sum() for p, k in parts])
    counts = torch.tensor([2, 0, 4, 0, 0])
    wanted = sums / counts.clamp(min=1) if normalize == "length" else sums
    torch.testing.assert_close(ours, wanted)
    weights = torch.randn(5, dtype=torch.float64)
    for_ours, for_wanted = (
        torch.autograd.grad((x * weights).sum(), packed, retain_graph=True)[0]
        for x in (ours, wanted)
    )
    torch.testing.assert_close(for_ours, for_wanted)


@pytest.mark.parametrize("normalize", ["length", "none"])
def test_gradcheck(normalize):
    logprob = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 3, 4) < 0.6
    assert torch.autograd.gradcheck(
        lambda x: sequence_reward(x, mask=mask, normalize=normalize), (logprob,)
    )
    cu = torch.tensor([0, 5, 5, 12])
    assert torch.autograd.gradcheck(
        lambda x: sequence_reward(x, mask=mask[0].view(-1), cu_seqlens=cu, normalize=normalize),
        (logprob.detach()[0].reshape(-1).requires_grad_(),),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_sequences_are_added_up_in_float32(dtype, packed):
    logprob = -torch.rand(4096).to(dtype)
    cu = torch.tensor([0, 4096])
    arguments = (logprob, {"cu_seqlens": cu}) if packed else (logprob[None], {})
    ours = sequence_reward(arguments[0], normalize="none", **arguments[1])
    assert ours.dtype == torch.float32
    exact = logprob.double().sum().item()
    assert ours.item() == pytest.approx(exact, rel=1e-5)  # bfloat16 would be off by per cents
    assert sequence_reward(logprob.double()).dtype == torch.float64


def test_compiled():
    logprob, labels = torch.randn(6), torch.tensor([1, IGNORE, 2, 3, IGNORE, 4])
    cu = torch.tensor([0, 2, 6])
    call = lambda x, c: sequence_reward(x, labels=labels, cu_seqlens=c)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(logprob, cu), call(logprob, cu))
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(logprob, torch.tensor([0, 2, 7]))


def test_offsets_op():
    from torch.library import opcheck

    from pad_kernels.sequence.rewards import checked_offsets

    for dtype in (torch.int32, torch.int64):
        opcheck(checked_offsets, (torch.tensor([0, 2, 6], dtype=dtype), 6))


BAD = [
    ({"logprob": [-1.0]}, TypeError, "logprob"),
    ({"logprob": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logprob"),
    ({"logprob": torch.tensor(1.0)}, ValueError, "logprob"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask"),
    ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask"),
    ({"labels": torch.zeros(2, 3)}, TypeError, "labels"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "logprob"),
    ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens"),
    ({"normalize": "mean"}, ValueError, "normalize"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=lambda x: str(x)[:40])
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        sequence_reward(**{"logprob": torch.zeros(2, 3), **change})


@pytest.mark.parametrize("cu", [[1, 6], [0, 5], [0, 7], [0, 4, 2, 6], [[0, 6]], []], ids=str)
def test_boundaries_that_are_none(cu):
    with pytest.raises(ValueError, match="cu_seqlens"):
        sequence_reward(torch.zeros(6), cu_seqlens=torch.tensor(cu, dtype=torch.int64))


# --- calibration ----------------------------------------------------------------------------------


def test_calibration():
    reward, option = torch.tensor([-2.0, -1.0, -1.0]), torch.tensor([0.5, 1.0, 0.0])
    ours = calibrated_rewards(reward, option, alpha=0.25)
    half = math.log(0.5)
    assert ours.tolist() == pytest.approx([-0.5 + 0.75 * half, -0.25, -0.25 + 0.75 * -18.420681])
    assert calibrated_rewards(reward, option, alpha=1.0).tolist() == reward.tolist()
    released = calibrated_rewards(reward, option, alpha=0.0, floor=1e-4)
    assert released.tolist() == pytest.approx([half, 0.0, -9.210340])
    impossible = calibrated_rewards(reward - math.inf, option, alpha=0.0, floor=1e-4)
    assert impossible.tolist() == released.tolist()
    low = calibrated_rewards(reward.to(torch.bfloat16), option.to(torch.float16), alpha=0.25)
    assert low.dtype == torch.float32 and low[0].item() == pytest.approx(-0.5 + 0.75 * half)
    assert calibrated_rewards(reward.double(), option, alpha=0.5).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"avg_logprob": -1.0}, TypeError, "avg_logprob"),
        ({"avg_logprob": torch.zeros(3)}, ValueError, "option_probability"),
        ({"option_probability": torch.ones(2, dtype=torch.int64)}, TypeError, "option_probability"),
        ({"option_probability": torch.tensor([0.5, 1.5])}, ValueError, "option_probability.*1.5"),
        ({"option_probability": torch.tensor([-0.5, 1.0])}, ValueError, "option_probability"),
        ({"option_probability": torch.tensor([math.nan, 1.0])}, ValueError, "option_probability"),
        ({"alpha": 1.1}, ValueError, "alpha"),
        ({"alpha": -0.1}, ValueError, "alpha"),
        ({"alpha": None}, TypeError, "alpha"),
        ({"floor": 0.0}, ValueError, "floor"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_calibration(change, error, match):
    good = {"avg_logprob": torch.zeros(2), "option_probability": torch.ones(2), "alpha": 0.5}
    with pytest.raises(error, match=match):
        calibrated_rewards(**{**good, **change})


# --- from hidden states ---------------------------------------------------------------------------

GROUPS, N, T, H, V = 2, 3, 5, 7, 11


def problem():
    hidden = torch.randn(GROUPS, N, T, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (GROUPS, N, T))
    labels[torch.rand(GROUPS, N, T) < 0.2] = IGNORE
    labels[..., 0] = 3  # every response has a token
    return hidden, weight, labels, torch.randn(GROUPS, N, dtype=torch.float64)


def dense(hidden, weight, labels, teacher, *, softcap=None, normalize="length", **options):
    """The same loss from logits, response by response."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rewards = []
    for lp, lab in zip(logits.log_softmax(-1).flatten(0, 1), labels.flatten(0, 1), strict=True):
        kept = [lp[i, lab[i]] for i in range(len(lab)) if lab[i] != IGNORE]
        total = sum(kept) if kept else lp.sum() * 0
        rewards.append(total / max(1, len(kept)) if normalize == "length" else total)
    return listwise_preference_loss(torch.stack(rewards).view(teacher.shape), teacher, **options)


def agree(ours, wanted, *leaves):
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "kl", "normalize": "none"},
        {"softcap": 2.0, "reduction": "sum"},
        {"kind": "ranking", "plan": "torch_blocked"},
        {"samples": 64, "seed": 3},
        {"subset_size": 3},
    ],
    ids=str,
)
def test_preference_loss_from_hidden_states(options):
    hidden, weight, labels, teacher = problem()
    ours = linear_preference_loss(hidden, weight, labels, teacher, beta=2.0, **options)
    options = {k: v for k, v in options.items() if k != "plan"}
    agree(ours, dense(hidden, weight, labels, teacher, beta=2.0, **options), hidden, weight)


def test_three_dimensions_and_packed_are_the_same():
    hidden, weight, labels, teacher = problem()
    wanted = dense(hidden, weight, labels, teacher, beta=2.0)
    flat, flat_labels = hidden.flatten(0, 1), labels.flatten(0, 1)
    ours = linear_preference_loss(flat, weight, flat_labels, teacher, beta=2.0)
    agree(ours, wanted, hidden, weight)
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])
    kept = torch.arange(T) < lengths[:, None]
    cut = torch.where(kept, flat_labels, IGNORE)
    wanted = dense(hidden, weight, cut.view(GROUPS, N, T), teacher, beta=2.0)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    ours = linear_preference_loss(
        flat[kept], weight, flat_labels[kept], teacher, beta=2.0, cu_seqlens=cu
    )
    agree(ours, wanted, hidden, weight)


@pytest.mark.parametrize("packed", [False, True])
def test_shift_counts_what_is_predicted(packed):
    hidden, weight, labels, teacher = problem()
    mask = torch.rand(GROUPS, N, T) < 0.8
    mask[..., 1] = True  # of which position 0 predicts the label
    aligned = torch.full_like(labels, IGNORE)
    aligned[..., :-1] = torch.where(mask, labels, IGNORE)[..., 1:]
    wanted = dense(hidden, weight, aligned, teacher, beta=2.0)
    if packed:
        ours = linear_preference_loss(
            hidden.flatten(0, 2),
            weight,
            labels.flatten(),
            teacher,
            beta=2.0,
            mask=mask.flatten(),
            cu_seqlens=torch.arange(0, GROUPS * N * T + 1, T),
            shift=True,
        )
    else:
        ours = linear_preference_loss(
            hidden, weight, labels, teacher, beta=2.0, mask=mask, shift=True
        )
    agree(ours, wanted, hidden, weight)


@pytest.mark.parametrize("packed", [False, True])
def test_responses_that_are_not_valid(packed):
    hidden, weight, labels, teacher = problem()
    valid = torch.tensor([[True, False, True], [True, True, False]])
    wanted = dense(hidden, weight, labels, teacher, beta=2.0, valid=valid)
    teacher = torch.where(valid, teacher, math.nan)
    arguments = (hidden, weight, labels, teacher)
    options = {}
    if packed:
        arguments = (hidden.flatten(0, 2), weight, labels.flatten(), teacher)
        options["cu_seqlens"] = torch.arange(0, GROUPS * N * T + 1, T)
    ours = linear_preference_loss(*arguments, beta=2.0, valid=valid, **options)
    agree(ours, wanted, hidden, weight)


def test_compiled_from_hidden_states():
    hidden, weight, labels, teacher = problem()
    call = lambda h: linear_preference_loss(h, weight, labels, teacher, beta=2.0)  # noqa: E731
    torch._dynamo.reset()
    agree(torch.compile(call, fullgraph=True)(hidden), call(hidden), hidden, weight)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": torch.zeros(2, 4, 5, 7)}, ValueError, r"hidden.*\[2, 3, T, H\]"),
        ({"hidden": torch.zeros(5, 5, 7)}, ValueError, "hidden"),
        ({"hidden": torch.zeros(30, 7)}, ValueError, "hidden"),
        ({"hidden": None}, TypeError, "hidden"),
        ({"labels": torch.zeros(2, 3, 4, dtype=torch.int64)}, ValueError, "labels"),
        ({"labels": torch.zeros(2, 3, 5)}, TypeError, "labels"),
        ({"labels": torch.full((2, 3, 5), 11)}, ValueError, "labels"),
        ({"weight": torch.zeros(11, 8)}, ValueError, "weight|hidden"),
        ({"teacher_rewards": torch.zeros(6)}, ValueError, "teacher_rewards"),
        ({"teacher_rewards": torch.zeros(2, 3, requires_grad=True)}, ValueError, "teacher_rewards"),
        ({"mask": torch.ones(2, 3, 5)}, TypeError, "mask"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid"),
        ({"valid": torch.ones(3, 2, dtype=torch.bool)}, ValueError, "valid"),
        ({"cu_seqlens": torch.tensor([0, 30])}, ValueError, "cu_seqlens.*7 boundaries"),
        ({"cu_seqlens": torch.arange(0, 31, 5)}, ValueError, r"hidden.*\[total, H\]"),
        ({"beta": 0.0}, ValueError, "beta"),
        ({"kind": "js"}, ValueError, "kind"),
        ({"normalize": "mean"}, ValueError, "normalize"),
        ({"shift": 1}, TypeError, "shift"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"subset_size": 1}, ValueError, "subset_size"),
        ({"reduction": "all"}, ValueError, "reduction"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_preference_arguments(change, error, match):
    good = {
        "hidden": torch.zeros(2, 3, 5, 7),
        "weight": torch.zeros(11, 7),
        "labels": torch.zeros(2, 3, 5, dtype=torch.int64),
        "teacher_rewards": torch.zeros(2, 3),
        "beta": 1.0,
    }
    with pytest.raises(error, match=match):
        linear_preference_loss(**{**good, **change})
