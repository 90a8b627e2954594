"""The demo in miniature, end to end, and its pieces."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pad_kernels.demo import missing_packages

if missing_packages():
    pytest.skip(f"needs {missing_packages()}", allow_module_level=True)

from pad_kernels import cli
from pad_kernels.demo import (
    corpus,
    wording,
)
from pad_kernels.demo.outcome import Estimate, Outcome, Result
from pad_kernels.demo.pipeline import Console, prepare, run
from pad_kernels.demo.sampling import EOS
from pad_kernels.demo.settings import METHODS, SMALL, ModelSize


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return run(SMALL, folder, quiet=True)


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


# The run as a whole


def test_every_figure_is_finite(outcome: Outcome) -> None:
    values = list(numbers(outcome.numbers()))
    assert len(values) > 100 and all(map(math.isfinite, values))
    assert [result.name for result in outcome.results] == ["before", *METHODS]
    for result in outcome.results:
        assert 0 <= result.loss.mean <= math.log(2) + 1e-6  # a Jensen-Shannon divergence
        assert -1 <= result.tau.mean <= 1 and result.teacher_logprob.mean < 0
        assert 1 <= result.length <= SMALL.response_tokens and 0 < result.distinct <= 1
        assert len(result.tau.values) == outcome.prompts[1] == SMALL.held_out_prompts


def test_pretraining_learns(outcome: Outcome) -> None:
    blind = math.log(outcome.vocabulary)
    assert outcome.text_losses[0] < outcome.text_losses[1] < blind - 0.2
    for curve, size in zip(outcome.pretraining, (SMALL.teacher, SMALL.student), strict=True):
        assert len(curve.y) == size.steps and curve.y[-1] < curve.y[0] - 0.3


def test_preference_training_moves_every_student(outcome: Outcome) -> None:
    assert len({result.loss.mean for result in outcome.results}) == 4
    for curve in (*outcome.taus, *outcome.losses):
        assert curve.x == [0, 2, 4]
    # All start from the same student, measured on the same responses.
    assert len({curve.y[0] for curve in outcome.losses}) == 1
    assert outcome.losses[0].y[0] == pytest.approx(outcome.result("before").loss.mean)
    assert outcome.losses[0].y[-1] == pytest.approx(outcome.result("pad").loss.mean)


def test_same_seed_same_numbers(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Times are no such numbers, and measuring them is half the work.
    monkeypatch.setattr("pad_kernels.demo.pipeline.measure_costs", lambda *_: outcome.costs)
    again = run(SMALL, tmp_path, quiet=True)
    assert again.numbers() == outcome.numbers()
    other = dataclasses.replace(SMALL, seed=1)
    assert run(other, tmp_path, quiet=True).numbers() != outcome.numbers()


def test_results_file(outcome: Outcome, folder: Path) -> None:
    found = json.loads((folder / "results.json").read_text())
    assert found["numbers"]["students"]["pad"]["loss"] == outcome.result("pad").loss.mean
    assert found["settings"]["responses"] == 4 and found["environment"]["torch"]
    assert {cost["head"] for cost in found["timings"]["step_cost"]} == {"dense", "ours"}


def test_report_is_self_contained(outcome: Outcome, folder: Path) -> None:
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    text = re.sub(r'src="[^"]*"', "", page)
    assert not re.search(r"https?://|@import|<script|url\(", text)
    assert "{{" not in text and "{%" not in text
    assert len(page) < 3_000_000


def test_report_shows_what_was_measured(outcome: Outcome, folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for result in outcome.results:
        assert f"{result.loss.mean:.3f} <span" in page and f"{result.tau.mean:.2f} <span" in page
    assert page.count('class="sample"') == SMALL.shown_samples == len(outcome.samples)
    for sentence in wording.savings(outcome.costs):
        assert sentence in page


def test_command_prints_where_the_report_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = dataclasses.replace(
        SMALL,
        teacher=ModelSize(16, 1, 32, 2, steps=2),
        student=ModelSize(16, 1, 32, 2, steps=2),
        preference_steps=2,
        cost_vocab_sizes=(1024,),
        cost_steps=1,
    )
    monkeypatch.setattr("pad_kernels.demo.settings.SMALL", tiny)
    assert cli.main(["demo", "--small", "--seed", "3", "--out", str(tmp_path)]) == 0
    streams = capsys.readouterr()
    lines = streams.out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{i}/6]" for i in range(1, 7)]
    assert lines[-1].endswith(str((tmp_path / "report.html").resolve()))
    table = [line.split()[0] for line in lines if " ±" in line]
    assert table == ["before", "PAD", "DPO", "SimPO"]
    assert "%" in streams.err  # the progress bars


# Text


def test_nothing_held_out_was_trained_on() -> None:
    found = corpus.read_corpus(SMALL)
    assert not set(found.reference) & set(found.held_out)
    train = found.training_texts()
    held = corpus.in_order(found.held_out)
    assert len(set(train)) == len(train) and len(held) > 60
    assert not set(train) & set(held)
    prose = [*train, *held]
    assert all(len(text.split()) >= 8 and ">>>" not in text for text in prose)


def test_modules_bound_the_docstrings_and_not_the_reference() -> None:
    some = corpus.read_corpus(SMALL)
    few = corpus.read_corpus(dataclasses.replace(SMALL, modules=5))
    assert 0 < len(few.docstrings) <= 5 < len(some.docstrings) <= 25
    assert few.held_out.keys() == some.held_out.keys()
    share = sum(map(len, corpus.in_order(some.held_out)))
    share /= share + sum(map(len, corpus.in_order(some.reference)))
    assert SMALL.held_out_share <= share < SMALL.held_out_share + 0.06


def test_topics_are_held_out_by_seed() -> None:
    first, second = (corpus.read_corpus(dataclasses.replace(SMALL, seed=s)) for s in (0, 1))
    assert set(first.held_out) != set(second.held_out)


def test_only_the_teacher_reads_the_reference() -> None:
    found = prepare(SMALL, Console(quiet=True))
    reference = corpus.encode(found.tokenizer, corpus.in_order(found.corpus.reference))
    repeated = len(found.teacher_reads) - len(found.student_reads)
    assert repeated == SMALL.reference_repeats * len(reference)
    student = {tuple(tokens) for tokens in found.student_reads}
    assert not student & {tuple(tokens) for tokens in (*reference, *found.held_out)}
    read = "\n".join(found.corpus.training_texts())
    for prompt in found.held_out_prompts.tolist():
        assert found.tokenizer.decode(prompt) not in read


def test_openings_are_different_long_enough_and_not_to_be_avoided() -> None:
    words = [f"word{i}" for i in range(40)]
    long = " ".join(words)
    texts = [long, f"{long} Again {' '.join(reversed(words))}", f"{long}. {long.title()}", "word1"]
    tokenizer = corpus.train_tokenizer(texts * 3, 300)
    settings = dataclasses.replace(SMALL, prompt_tokens=4)
    found = corpus.openings(tokenizer, texts, settings, 10)
    starts = sorted(tokenizer.decode(tokens) for tokens in found.tolist())
    assert len(starts) == 2 and long.startswith(starts[1]) and long.title().startswith(starts[0])
    left = corpus.openings(tokenizer, texts, settings, 10, avoid=long)
    assert [tokenizer.decode(tokens) for tokens in left.tolist()] == starts[:1]
    assert len(corpus.openings(tokenizer, texts, settings, 1)) == 1


def test_tokenizer_round_trip() -> None:
    texts = ["the quick brown fox", "the lazy dog is quick"] * 20
    tokenizer = corpus.train_tokenizer(texts, 300)
    (ids,) = corpus.encode(tokenizer, ["the quick dog"])
    assert ids[0] == tokenizer.token_to_id("<bos>") == 1 and ids[-1] == EOS == 2
    assert tokenizer.decode(ids) == "the quick dog"


# Wording


def make_outcome(outcome: Outcome, **taus: list[float]) -> Outcome:
    """The outcome with other taus."""

    def changed(result: Result) -> Result:
        return dataclasses.replace(result, tau=Estimate(tuple(taus[result.name])))

    return dataclasses.replace(outcome, results=[changed(each) for each in outcome.results])


def test_wording_is_honest_about_who_wins(outcome: Outcome) -> None:
    base = [0.1 * math.sin(i) for i in range(50)]

    def around(mean: float, noise: float = 0.0) -> list[float]:
        return [x + mean + noise * math.cos(7 * i) for i, x in enumerate(base)]

    ours = make_outcome(
        outcome, before=around(0.2), pad=around(0.5), dpo=around(0.7), simpo=around(0.49, 0.4)
    )
    text = wording.against(ours, "tau")
    assert "behind DPO (-0.20 ± 0.00)" in text and "level with SimPO" in text
    assert wording.change(ours, "tau").startswith("Kendall's tau rose from 0.20 to 0.50")
    worse = make_outcome(
        outcome, before=around(0.5), pad=around(0.2), dpo=around(0.1), simpo=around(0.1)
    )
    assert "fell from 0.50 to 0.20" in wording.change(worse, "tau")
    assert "ahead of DPO" in wording.against(worse, "tau")
    same = make_outcome(
        outcome, before=around(0.5), pad=around(0.5, 0.4), dpo=around(0.5), simpo=around(0.5)
    )
    assert "within chance" in wording.change(same, "tau")


def test_verdict_names_every_figure_once(outcome: Outcome) -> None:
    base = [0.1 * math.sin(i) for i in range(50)]

    def shifted(loss: float, tau: float, logprob: float) -> Outcome:
        def result(each: Result, scale: float) -> Result:
            loss_, tau_, logprob_ = (
                Estimate(tuple(x + scale * by for x in base)) for by in (loss, tau, logprob)
            )
            return dataclasses.replace(each, loss=loss_, tau=tau_, teacher_logprob=logprob_)

        results = [result(each, float(each.name == "pad")) for each in outcome.results]
        return dataclasses.replace(outcome, results=results)

    loss, tau, logprob = (name for name, *_ in wording.METRICS.values())
    assert wording.verdict(shifted(-1, 1, 1)) == f"PAD improved {loss}, {tau} and {logprob}."
    mixed = wording.verdict(shifted(1, 1, 0))
    assert mixed == f"PAD improved {tau} but worsened {loss}; {logprob} stayed within chance."
    chance = wording.verdict(shifted(0, 0, 0))
    assert chance == f"With PAD {loss}, {tau} and {logprob} stayed within chance."


# The example


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "examples" / "preference_loop.py"
    assert len(path.read_text().splitlines()) < 80
    torch.manual_seed(0)
    losses = load(path).train(steps=8)
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]
    assert capsys.readouterr().out.count("preference loss") == 8
