"""The demo's pieces one by one: training, sampling, preference losses, measurements."""

# ruff: noqa: E402 - the demo can only be imported where its packages are

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

for _package in ("transformers", "tokenizers", "tqdm", "matplotlib", "jinja2"):
    pytest.importorskip(_package)

from pad_kernels.demo import measure, models, plots, preference, pretrain, step_cost
from pad_kernels.demo.models import IGNORE, LanguageModel
from pad_kernels.demo.outcome import Estimate
from pad_kernels.demo.sampling import EOS, Responses, sample
from pad_kernels.demo.settings import SMALL


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(models.build(SMALL.student, SMALL), 1000)


# Models, training, sampling


def test_blocks_are_shifted_by_one() -> None:
    documents = [[1, 10, 11, 2], [1, 20, 21, 22, 2]]
    inputs, labels = pretrain.blocks(documents, 4, seed=0)
    assert inputs.shape == labels.shape == (2, 4)
    assert torch.equal(inputs.flatten()[1:], labels.flatten()[:-1])


def test_schedule_warms_up_and_decays() -> None:
    rates = [pretrain.schedule(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and max(rates) == 1.0
    assert rates[11:] == sorted(rates[11:], reverse=True) and 0.05 < rates[-1] < 0.06


def test_model_agrees_with_its_own_logits(model: LanguageModel) -> None:
    torch.manual_seed(5)
    ids = torch.randint(3, 1000, (2, 9))
    logits = model.model(input_ids=ids[:, :-1]).logits[..., :1000]
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(model.logprob(ids[:, :-1], ids[:, 1:]), expected)
    loss = model.cross_entropy(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, -expected.mean())
    states = model.hidden(ids[:, :-1])[:, -1]
    torch.testing.assert_close(model.next_token_logits(states), logits[:, -1])
    assert model.weight is model.model.get_input_embeddings().weight


def test_muon_gets_the_body_and_adamw_the_rest(model: LanguageModel) -> None:
    muon, adamw = pretrain.muon_and_adamw(model, SMALL.student)
    groups = [[p for group in each.param_groups for p in group["params"]] for each in (muon, adamw)]
    assert len(groups[0]) == 7 * SMALL.student.layers
    assert sum(p.numel() for p in itertools.chain(*groups)) == sum(
        p.numel() for p in model.parameters()
    )
    assert any(p is model.weight for p in groups[1])


def test_sampling_masks_prompt_and_what_follows_the_end(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = LanguageModel.next_token_logits

    def eager_to_stop(self: LanguageModel, states: torch.Tensor) -> torch.Tensor:
        found = logits(self, states)
        found[:, EOS] += 6.0
        return found

    monkeypatch.setattr(LanguageModel, "next_token_logits", eager_to_stop)
    prompts = torch.randint(3, 1000, (5, SMALL.prompt_tokens))
    found = sample(model, prompts, SMALL, seed=1, n=6)
    width = SMALL.prompt_tokens + SMALL.response_tokens - 1
    assert found.inputs.shape == found.labels.shape == (5, 6, width)
    assert torch.equal(found.inputs[:, 3, : prompts.shape[1]], prompts)
    assert (found.labels[..., : SMALL.prompt_tokens - 1] == IGNORE).all()
    early = 0
    for labels, length in zip(found.labels.flatten(0, 1), found.lengths().flatten(), strict=True):
        kept = labels[labels != IGNORE]
        assert len(kept) == length and (kept[:-1] != EOS).all()
        early += int(length < SMALL.response_tokens)
        assert length == SMALL.response_tokens or kept[-1] == EOS
    assert early > 5
    counted = found.labels[..., :-1] != IGNORE
    assert torch.equal(found.labels[..., :-1][counted], found.inputs[..., 1:][counted])


def test_sampling_follows_its_seed_and_the_model(model: LanguageModel) -> None:
    prompts = torch.randint(3, 1000, (3, SMALL.prompt_tokens))
    first, again, other = (sample(model, prompts, SMALL, seed) for seed in (7, 7, 8))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    cold = dataclasses.replace(SMALL, temperature=1e-4)
    greedy = sample(model, prompts, cold, 0, n=1).inputs[:, 0]
    for length in range(SMALL.prompt_tokens, greedy.shape[1]):  # without the cache
        logits = model.next_token_logits(model.hidden(greedy[:, :length])[:, -1])
        assert torch.equal(logits.argmax(-1), greedy[:, length])
        if (greedy[:, length] == EOS).any():
            break


# Preferences


def make_responses(groups: int = 3, n: int = 4) -> Responses:
    torch.manual_seed(11)
    ids = torch.randint(3, 1000, (groups, n, 13))
    labels = ids[..., 1:].clone()
    labels[..., :4] = IGNORE
    labels[0, 1, 9:] = IGNORE
    return Responses(ids[..., :-1], labels)


def test_score_is_the_mean_logprob(model: LanguageModel) -> None:
    responses = make_responses()
    logprob = model.logprob(responses.inputs, responses.labels).detach()
    sums, counts = logprob.sum(-1), responses.lengths()
    torch.testing.assert_close(preference.score(model, responses), sums / counts)
    torch.testing.assert_close(preference.score(model, responses, "none"), sums)


def test_pad_loss_is_the_dense_pad_loss(model: LanguageModel) -> None:
    model = LanguageModel(model.model, SMALL.vocab_size)  # the dense step has no vocab_size
    responses, rewards = make_responses(), torch.randn(3, 4) * 0.3 - 6
    gradients, values = [], []
    for loss in (preference.pad_loss, step_cost.dense_pad_loss):
        value = loss(model, responses, rewards, SMALL)
        gradients.append(torch.autograd.grad(value, list(model.parameters())))
        values.append(value.detach())
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-5)


def test_pair_losses_by_hand(model: LanguageModel) -> None:
    pairs = make_responses(n=2)
    sums, means = (preference.score(model, pairs, how) for how in ("none", "length"))
    reference = sums + torch.tensor([[0.5, -1.0]])
    margin = 0.1 * ((sums - reference)[:, 0] - (sums - reference)[:, 1])
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    found = preference.pair_loss(model, pairs, reference, "dpo", SMALL)
    torch.testing.assert_close(found, expected)
    margin = SMALL.simpo.beta * (means[:, 0] - means[:, 1]) - SMALL.simpo.gamma
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    found = preference.pair_loss(model, pairs, reference, "simpo", SMALL)
    torch.testing.assert_close(found, expected)


def test_pairs_are_the_teachers_best_and_worst() -> None:
    rewards = torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-1.0, -2.0, -3.0, -2.5]])
    chosen = preference.best_and_worst(rewards)
    assert chosen.tolist() == [[1, 3], [0, 2]]
    responses = make_responses(groups=2)
    pairs = responses.select(torch.arange(2), chosen)
    assert torch.equal(pairs.inputs[0, 1], responses.inputs[0, 3])
    assert torch.equal(pairs.labels[1, 0], responses.labels[1, 0])


def test_training_leaves_the_student_alone(model: LanguageModel) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    seen: list[int] = []
    trained, seconds = preference.train(
        model, "dpo", make_responses(), torch.randn(3, 4), SMALL,
        lambda note: None, lambda each, step: seen.append(step),
    )  # fmt: skip
    assert seen == [0, 2, 4] and seconds > 0
    for old, now in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, now)
    assert not torch.equal(before[0], next(trained.parameters()))
    assert trained.weight is trained.model.get_input_embeddings().weight


# Measuring


def brute_tau(first: list[float], second: list[float]) -> float:
    concordant, untied = 0.0, [0, 0]
    for i, j in itertools.combinations(range(len(first)), 2):
        a = (first[i] > first[j]) - (first[i] < first[j])
        b = (second[i] > second[j]) - (second[i] < second[j])
        concordant += a * b
        untied = [untied[0] + abs(a), untied[1] + abs(b)]
    return concordant / math.sqrt(untied[0] * untied[1]) if all(untied) else 0.0


def test_kendall_tau() -> None:
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(0, 6, (40, 5), generator=generator).float()  # with ties
    second = torch.randn(40, 5, generator=generator)
    expected = [brute_tau(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    torch.testing.assert_close(measure.kendall_tau(first, second), torch.tensor(expected))
    order = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert measure.kendall_tau(order, 2 * order).item() == 1
    assert measure.kendall_tau(order, -order).item() == -1
    assert measure.kendall_tau(order, torch.ones(1, 4)).item() == 0


def test_estimate() -> None:
    found = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert found.mean == 3.0
    assert found.error == pytest.approx(torch.tensor([1.0, 2, 3, 6]).std().item() / 2)
    assert (found - Estimate((0.0, 1.0, 2.0, 5.0))).error == 0.0
    assert Estimate((2.0,)).error == 0.0


def test_distinct_pairs() -> None:
    labels = torch.full((1, 2, 6), IGNORE)
    labels[0, 0, :4] = torch.tensor([7, 8, 7, 8])  # 78 87 78
    labels[0, 1, 2:6] = torch.tensor([9, 8, 7, EOS])  # 98 87
    assert measure.distinct_pairs(Responses(labels, labels)) == pytest.approx(3 / 5)


def test_step_cost_in_this_process() -> None:
    settings = dataclasses.replace(SMALL, cost_steps=1)
    costs = {head: step_cost.measure_here(head, 1024, settings) for head in step_cost.HEADS}
    rows = SMALL.step_responses * SMALL.response_tokens
    for head, cost in costs.items():
        assert (cost.head, cost.vocab_size, cost.rows) == (head, 1024, rows)
        assert cost.seconds > 0 and cost.peak_bytes >= 0
    assert step_cost.peak_resident_bytes() > 50 * 2**20


def test_step_cost_of_dense_logits_shows_in_its_process() -> None:
    settings = dataclasses.replace(SMALL, step_responses=64, response_tokens=32, cost_steps=1)
    dense, ours = (step_cost.measure(head, 16384, settings) for head in step_cost.HEADS)
    logits = 64 * 32 * 16384 * 4
    assert dense.rows == ours.rows == 64 * 32
    assert dense.peak_bytes > 2 * logits
    assert ours.peak_bytes < dense.peak_bytes - logits


def test_step_cost_reports_a_failure() -> None:
    with pytest.raises(RuntimeError, match="measuring the dense step failed") as caught:
        step_cost.measure("dense", -1, SMALL)
    assert "Traceback" in str(caught.value)


def test_smooth() -> None:
    assert plots.smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
