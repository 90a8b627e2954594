"""The miniature of the papers: its task, its runs, how they resume, and the table it has made."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.miniature import jobs, models, report, run, tune  # noqa: E402
from examples.miniature.__main__ import main  # noqa: E402
from examples.miniature.lab import SHARED, Lab  # noqa: E402
from examples.miniature.methods import FIRST, METHODS, STAGES  # noqa: E402
from examples.miniature.settings import Settings, Size  # noqa: E402
from examples.miniature.store import Store  # noqa: E402
from examples.miniature.world import World  # noqa: E402

HERE = ROOT / "examples" / "miniature"
TINY = Settings(
    subjects=3,
    manners=3,
    words=7,
    length=3,
    held_out=2,
    texts=32,
    pairs=16,
    held_out_pairs=24,
    samples=24,
    teacher=Size(16, 1, 16, 2),
    student=Size(8, 1, 8, 2),
    rows=8,
    reference_steps=3,
    aligned_steps=3,
    base_steps=3,
    steps=4,
    curve_points=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


# The task.


def test_reward_is_a_sum_over_words() -> None:
    world = World(TINY, 3)
    found = world.rewards(torch.tensor([4]), torch.tensor([[2, 5, 5]]))
    worth = world.worth[4]
    assert found.item() == pytest.approx((worth[0, 2] + worth[3, 5] + worth[6, 5]).item())


def test_people_choose_by_reward_and_err() -> None:
    world = World(Settings(), 0)
    prompts, chosen, rejected = world.pairs(world.training, 20000)
    gap = world.rewards(prompts, chosen) - world.rewards(prompts, rejected)
    right = (gap > 0).double().mean().item()
    expected = gap.abs().sigmoid().double().mean().item()  # Bradley and Terry
    assert abs(right - expected) < 4 * math.sqrt(expected * (1 - expected) / len(gap))
    assert 0.75 < right < 0.98


def test_writers_care_about_reward_a_little() -> None:
    """Corpus and chance differ, or there would be nothing to learn before the preferences."""
    world = World(Settings(), 1)
    prompts = world.draw(world.training, 4000)
    chance = torch.randint(48, (4000, 8), generator=torch.Generator().manual_seed(0))
    written = world.rewards(prompts, world.written(prompts)).mean()
    assert written > world.rewards(prompts, chance).mean() + 2.0


def test_held_out_prompts_are_new_in_their_combination_alone() -> None:
    world = World(Settings(), 0)
    assert not set(world.held_out.tolist()) & set(world.training.tolist())
    ids = world.prompt_ids(world.training)
    new = world.prompt_ids(world.held_out)
    assert set(new[:, 1].tolist()) <= set(ids[:, 1].tolist())
    assert set(new[:, 2].tolist()) <= set(ids[:, 2].tolist())


def test_logprob_is_that_of_the_models_logits() -> None:
    lab = Lab.of(TINY, 0)
    model = lab.student().eval()
    prompts, chosen = lab.prompts, lab.chosen
    ids = torch.cat([lab.world.prompt_ids(prompts), lab.world.response_ids(chosen)], 1)
    with torch.no_grad():
        dense = model(input_ids=ids).logits.log_softmax(-1)[:, 2:-1]
    dense = dense.gather(-1, ids[:, 3:, None]).sum((1, 2))
    torch.testing.assert_close(models.logprob(model, lab.world, prompts, chosen), dense)


def test_samples_come_from_the_model() -> None:
    lab = Lab.of(TINY, 0)
    model, world = lab.student().eval(), lab.world
    asked = torch.full((20000,), 5)
    words = models.sample(model, world, asked, seed=0)
    with torch.no_grad():
        logits = model(input_ids=world.prompt_ids(asked[:1])).logits[0, -1]
    chances = logits[world.first_word :].softmax(-1)
    found = torch.bincount(words[:, 0], minlength=TINY.words) / len(words)
    assert (found - chances).abs().max() < 4 * (0.25 / len(words)) ** 0.5


def test_batches_of_all_stages_have_as_many_responses() -> None:
    lab = Lab.of(TINY, 0)
    student = lab.student().eval()
    lab.models = dict.fromkeys(("reference", "aligned"), student)
    for stage in STAGES.values():
        row = stage.data(lab, student)[0]
        many = [r for name, value in row.items() if name != "prompt" for r in _responses(value)]
        assert len(many) == stage.in_row and TINY.rows % stage.in_row == 0
        assert {len(response) for response in many} == {TINY.length}


def _responses(value: Any) -> list[Any]:
    return value if isinstance(value[0], list) else [value]


# Runs.


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Everything for two seeds; the second seed's last round is left undone but for SFT."""
    store = Store(tmp_path_factory.mktemp("runs"), TINY)
    for part in jobs.rounds([0]):
        for job in part:
            job.run(store)
    for job in (jobs.Job("pretrain", 1), jobs.Job("first", 1, "sft"), jobs.Job("second", 1, "SFT")):
        job.run(store)
    return store


def test_every_job_leaves_its_result(store: Store) -> None:
    assert all(job.done(store) for part in jobs.rounds([0]) for job in part)
    results = store.read([0])
    assert [each["method"] for each in results] == [*SHARED, *METHODS]
    for each in results:
        assert all(math.isfinite(each[name]) for name in report.MEASURES if name != "over_sft")
        assert each["method"] in SHARED or len(each["curve"]) == TINY.curve_points
    rewards = {each["method"]: each["reward"] for each in results}
    assert len({round(rewards[name], 9) for name in METHODS}) > 1


def test_measures_are_those_of_the_model(store: Store) -> None:
    lab = store.lab(0)
    found = run.measure(lab, lab.models["base"])
    prompts, better, worse = lab.held_out
    world = lab.world
    assert (world.rewards(prompts, better) >= world.rewards(prompts, worse)).all()
    more = [models.logprob(lab.models["base"], world, prompts, y) for y in (better, worse)]
    assert found["accuracy"] == pytest.approx((more[0] > more[1]).float().mean().item())
    assert found["gain_accuracy"] == 0.0  # it has not changed since itself
    flat = math.log(TINY.words)
    assert 0.5 * flat < found["entropy"] < 1.5 * flat


@pytest.mark.parametrize("method", ["DPO", "ADPA+", "PAD jsd"])
def test_same_seed_same_numbers(store: Store, method: str) -> None:
    first, second = METHODS[method]
    again = run.second_stage(store.lab(0, first), first, second)
    before = json.loads(store.path(0, method).read_text())
    for name, value in again.items():
        assert name == "seconds" or value == before[name]


def test_first_stages_move_the_base(store: Store) -> None:
    lab = store.lab(0, *FIRST)
    base = lab.models["base"].lm_head.weight
    weights = [lab.models[name].lm_head.weight for name in FIRST]
    assert all(not torch.equal(base, each) for each in weights)
    assert len({each.sum().item() for each in weights}) == len(FIRST)


def test_only_what_is_missing_is_run_again(store: Store) -> None:
    """In another process, as the command does it, with the same numbers."""
    results = [store.path(0, name) for name in (*SHARED, *METHODS)]
    lost = store.path(0, "SFT")
    before = json.loads(lost.read_text())
    times = {path: path.stat().st_mtime_ns for path in results}
    lost.unlink()
    jobs.run_missing([0], store.folder.parent, TINY, processes=1)
    after = json.loads(lost.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert [p for p in results if p.stat().st_mtime_ns != times[p]] == [lost]


def test_other_settings_find_no_results(store: Store) -> None:
    assert not Store(store.folder.parent, dataclasses.replace(TINY, steps=5)).read([0, 1])


# The report.


def test_report_of_an_unfinished_table(store: Store, tmp_path: Path) -> None:
    results = store.read([0, 1])
    report.write(results, tmp_path, TINY)
    table = report.summary(results)
    sft = [each["reward"] for each in results if each["method"] == "SFT"]
    assert table["SFT"]["reward"].mean == pytest.approx(sum(sft) / 2)
    assert table["SFT"]["reward"].error == pytest.approx(abs(sft[0] - sft[1]) / 2)
    assert table["SFT"]["over_sft"] == report.Estimate(0.0, 0.0)
    assert table["DPO"]["seeds"] == 1 and math.isnan(table["DPO"]["reward"].error)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(SHARED) + len(METHODS)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert len(stored["runs"]) == len(results)
    for name in ("ranking", "seeds", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seeds", "1"])
    assert "--seeds" in capsys.readouterr().err


# What is committed.


def committed() -> dict[str, Any]:
    return json.loads((HERE / "results" / "results.json").read_text(encoding="utf-8"))


def test_committed_table_was_made_with_these_settings() -> None:
    found = committed()
    assert found["settings"] == dataclasses.asdict(Settings())
    for name, stage in STAGES.items():
        used = found["stages"][name]
        assert used == {"trainer": stage.trainer, "rate": stage.rate, **stage.options}
    assert report.markdown(report.summary(found["runs"])) == (HERE / "results/table.md").read_text()
    assert (HERE / "results/table.md").read_text() in (HERE / "README.md").read_text()


def test_rates_and_options_are_the_best_of_the_grid() -> None:
    trials = json.loads((HERE / "results" / "tuning.json").read_text(encoding="utf-8"))
    assert len(trials) == len(tune.grid())
    for name in {each["stage"] for each in trials}:
        best = max((t for t in trials if t["stage"] == name), key=lambda t: t["reward"])
        option = {} if name not in tune.OPTIONS else {tune.OPTIONS[name][0]}
        assert STAGES[name].rate == best["rate"]
        assert all(STAGES[name].options[each] == best[each] for each in option)
        twin = STAGES[name.removesuffix("-aligned")]
        if name.endswith("-aligned"):
            assert (twin.rate, twin.options) == (STAGES[name].rate, STAGES[name].options)


def test_the_projects_readme_has_the_figures_of_the_table() -> None:
    table = [line.split("|") for line in (HERE / "results/table.md").read_text().splitlines()]
    readme = (HERE.parents[1] / "README.md").read_text()
    shown = readme.split("<!-- miniature -->")[1].split("<!-- /miniature -->")[0]
    rows = [line.split("|") for line in shown.strip().splitlines()]
    # name, stages, true reward, over SFT, accuracy
    wanted = [[cell.strip() for cell in row[1:6]] for row in table[2:] if len(row) > 5]
    assert [[cell.strip() for cell in row[1:6]] for row in rows[2:]] == wanted
