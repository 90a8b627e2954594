"""The demo's pieces one by one: training, sampling, preference losses, measurements."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from pad_kernels.demo import missing_packages

if missing_packages():
    pytest.skip(f"needs {missing_packages()}", allow_module_level=True)

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from pad_kernels.demo import (
    corpus,
    measure,
    models,
    plots,
    preference,
    pretrain,
    sampling,
    step_cost,
)
from pad_kernels.demo.models import IGNORE
from pad_kernels.demo.outcome import Estimate
from pad_kernels.demo.sampling import EOS, Responses, draw, sample
from pad_kernels.demo.settings import METHODS, SMALL

VOCABULARY = 1000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> PreTrainedModel:
    return models.build(SMALL.student, SMALL, VOCABULARY)


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


def test_model_agrees_with_its_own_logits(model: PreTrainedModel) -> None:
    torch.manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    logits = model(input_ids=ids[:, :-1]).logits
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(models.logprob(model, ids[:, :-1], ids[:, 1:]), expected)
    loss = models.cross_entropy(model, ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, -expected.mean())


def test_muon_gets_the_body_and_adamw_the_rest(model: PreTrainedModel) -> None:
    muon, adamw = pretrain.muon_and_adamw(model, SMALL.student)
    groups = [[p for group in each.param_groups for p in group["params"]] for each in (muon, adamw)]
    assert len(groups[0]) == 7 * SMALL.student.layers
    assert sum(p.numel() for p in itertools.chain(*groups)) == sum(
        p.numel() for p in model.parameters()
    )
    assert any(p is model.get_input_embeddings().weight for p in groups[1])


def test_sampling_masks_prompt_and_what_follows_the_end(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager_to_stop(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        logits[:, EOS] += 6.0
        return draw(logits, generator)

    monkeypatch.setattr(sampling, "draw", eager_to_stop)
    prompts = torch.randint(3, VOCABULARY, (5, SMALL.prompt_tokens))
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


def test_sampling_follows_its_seed_and_the_model(model: PreTrainedModel) -> None:
    prompts = torch.randint(3, VOCABULARY, (3, SMALL.prompt_tokens))
    first, again, other = (sample(model, prompts, SMALL, seed) for seed in (7, 7, 8))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    cold = dataclasses.replace(SMALL, temperature=1e-4)
    greedy = sample(model, prompts, cold, 0, n=1).inputs[:, 0]
    for length in range(SMALL.prompt_tokens, greedy.shape[1]):  # without the cache
        logits = model(input_ids=greedy[:, :length]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), greedy[:, length])
        if (greedy[:, length] == EOS).any():
            break


# Preferences


def make_responses(groups: int = 3, n: int = 4) -> Responses:
    torch.manual_seed(11)
    ids = torch.randint(3, VOCABULARY, (groups, n, 13))
    ids[..., :5] = ids[:, :1, :5]  # the prompt
    labels = ids[..., 1:].clone()
    labels[..., :4] = IGNORE
    labels[0, 1, 9:] = IGNORE
    return Responses(ids[..., :-1], labels)


def test_score_is_the_mean_logprob(model: PreTrainedModel) -> None:
    responses = make_responses()
    logprob = models.logprob(model, responses.inputs, responses.labels).detach()
    sums, counts = logprob.sum(-1), responses.lengths()
    torch.testing.assert_close(preference.score(model, responses), sums / counts)
    torch.testing.assert_close(preference.score(model, responses, "none"), sums)


def test_pad_loss_is_the_dense_pad_loss(model: PreTrainedModel) -> None:
    responses, rewards = make_responses(), torch.randn(3, 4) * 0.3 - 6
    gradients, values = [], []
    for loss in (step_cost.pad_loss, step_cost.dense_pad_loss):
        value = loss(model, responses, rewards, SMALL)
        gradients.append(torch.autograd.grad(value, list(model.parameters())))
        values.append(value.detach())
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-5)


def test_responses_come_apart_again() -> None:
    responses = make_responses()
    ends = [[13, 13, 13, 13], [13, 13, 13, 13], [13, 13, 13, 13]]
    ends[0][1] = 10
    for group, prompt in enumerate(responses.prompts()):
        for i, response in enumerate(responses.continuations()[group]):
            whole = [*responses.inputs[group, i].tolist(), responses.labels[group, i, -1].item()]
            assert prompt + response == whole[: ends[group][i]] and len(prompt) == 5


def test_pairs_are_the_teachers_best_and_worst(model: PreTrainedModel) -> None:
    rewards = torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-1.0, -2.0, -3.0, -2.5]])
    assert preference.best_and_worst(rewards).tolist() == [[1, 3], [0, 2]]
    responses = make_responses(groups=2)
    written = responses.continuations()
    pairs = preference.rows(model, "simpo", responses, rewards)
    assert [each["prompt"] for each in pairs] == responses.prompts()
    assert [each["chosen"] for each in pairs] == [written[0][1], written[1][0]]
    assert [each["rejected"] for each in pairs] == [written[0][3], written[1][2]]
    (first, _) = preference.rows(model, "dpo", responses, rewards)
    sums = preference.score(model, responses, "none")[0]
    assert first.pop("ref_chosen_logps") == pytest.approx(sums[1].item())
    assert first.pop("ref_rejected_logps") == pytest.approx(sums[3].item())
    assert first == pairs[0]


def losses_by_hand(model: PreTrainedModel, responses: Responses, rewards: torch.Tensor) -> dict:
    means = preference.score(model, responses).gather(1, preference.best_and_worst(rewards))
    margin = SMALL.simpo.beta * (means[:, 0] - means[:, 1]) - SMALL.simpo.gamma
    return {
        "pad": step_cost.dense_pad_loss(model, responses, rewards, SMALL).item(),
        "dpo": math.log(2),  # the student is the reference
        "simpo": -torch.nn.functional.logsigmoid(margin).mean().item(),
    }


@pytest.mark.parametrize("kind", METHODS)
def test_training(kind: str, model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    before = copy.deepcopy(model.state_dict())
    steps: list[int] = []
    notes: list[str] = []
    responses, rewards = make_responses(), torch.randn(3, 4) * 0.3 - 6
    words = [corpus.PAD, corpus.BOS, corpus.EOS, *(f"w{i}" for i in range(VOCABULARY - 3))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = corpus.for_transformers(Tokenizer(WordLevel(vocabulary)))
    trained, seconds = preference.train(
        model, kind, responses, rewards, tokenizer, SMALL,
        notes.append, lambda each, step: steps.append(step),
    )  # fmt: skip
    assert steps == [0, 2, 4] and seconds > 0
    # A step has room for all three prompts, so the first loss is that of all of them.
    expected = losses_by_hand(model, responses, rewards)[kind]
    assert len(notes) == SMALL.preference_steps and notes[0] == f"{kind} loss {expected:.3f}"
    assert float(notes[-1].split()[-1]) < expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, trained.state_dict()[name])
    assert capsys.readouterr() == ("", "")


# Measuring


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
