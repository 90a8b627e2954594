"""What cache, train and eval compute, and the whole way as a user goes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

import pipeline_toys as toys
from pipeline_toys import model, run, table
from trainer_toys import logprobs

from pad_kernels import cli
from pad_kernels.pipeline import methods, rows

DOCS = Path(__file__).parents[1] / "docs" / "pipelines.md"

pytestmark = pytest.mark.usefixtures("one_thread")


# The whole way, as a user goes it.


def test_the_page_from_an_empty_folder(tmp_path: Path) -> None:
    """The settings and commands of docs/pipelines.md as they stand, each in its own process."""
    toys.fill(tmp_path)
    text = DOCS.read_text()
    (tmp_path / "run.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)[0])
    toys.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w3"} for i in range(8)])
    commands = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)[0].splitlines()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert [line.split()[1] for line in commands] == ["sample", "score", "train", "eval"]
    for line in commands:
        words = line.split("#")[0].split()
        done = subprocess.run(
            [sys.executable, "-m", "pad_kernels.cli", *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        left = line.split("-> ")[1].split(",")[0].strip()
        assert (tmp_path / left).exists()
    metrics = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert metrics.keys() == {"student", "pad"}
    assert done.stdout.splitlines()[0].split()[:3] == ["model", "nll", "reward_chosen"]


# train, cache, eval.


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((m, {}) for m in ("dckd", "kd", "sft", "dpo", "simpo", "orpo", "cpo", "kto")),
        ("seqkd", {"train__data": None, "sample__model": "teacher"}),
        ("adpa", {"train__data": None}),
        ("adpa+", {}),
        ("dpo", {"train__data": "best/scored"}),
        ("dpo", {"reference": None, "train__lora": {"r": 2, "target_modules": "all-linear"}}),
        ("kto", {"train__data": "best/scored", "reference": None}),
        ("pad", {"train__data": "unscored.jsonl"}),
    ],
)
def test_every_method_trains(
    method: str, changes: dict[str, Any], home: Path, request: pytest.FixtureRequest
) -> None:
    out = "t-" + re.sub(r"\W+", "-", request.node.name)
    options = {"train__data": "pairs.jsonl", "train__arguments__max_steps": 2, **changes}
    if options["train__data"] is None:
        run("sample", out, **changes)
    if options["train__data"] == "best/scored" and not Path("best").is_dir():
        run("sample", "best")
        run("score", "best")
    toys.write_rows(
        Path("unscored.jsonl"), [{"prompt": "w1", "responses": ["w2", "w3 w4"]} for _ in range(9)]
    )
    toys.write_settings(Path(f"{out}.yaml"), out=out, **options)
    assert cli.main(["train", f"{out}.yaml", "--method", method]) == 0
    place = Path(out) / "train" / method
    log = json.loads((place / "log.json").read_text())
    assert len([entry for entry in log if "loss" in entry]) == 2
    before, after = model("student").state_dict(), model(str(place / "final")).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if "train__lora" in changes:
        assert (place / "adapter" / "adapter_config.json").is_file()
    if method == "adpa+":
        assert len(table(place.with_name("adpa+.samples"))) == 20


def test_best_and_worst_are_the_teachers(home: Path) -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "rewards": [-2.0, -1.0, -3.0]}
    data = methods.best_and_worst(rows.datasets.Dataset.from_list([row]))
    assert data[0] == {"prompt": "p", "chosen": "b", "rejected": "c"}
    each = methods.labelled(data)
    assert Counter(zip(each["completion"], each["label"], strict=True)) == Counter(
        [("b", True), ("c", False)]
    )


@pytest.mark.parametrize(
    ("method", "data", "keep"),
    [
        ("dckd", "pairs.jsonl", toys.VOCAB),
        ("dckd", "pairs.jsonl", "hidden"),
        ("adpa", "own.jsonl", toys.VOCAB),
        ("pad", "unscored.jsonl", "hidden"),
    ],
)
def test_a_teacher_on_disk_teaches_the_same(method: str, data: str, keep: Any, home: Path) -> None:
    """With the whole vocabulary kept, it is the teacher; on rows to evaluate on too."""
    unscored = [{"prompt": f"w{i}", "responses": ["w2", f"w3 w{i}"]} for i in range(9)]
    toys.write_rows(Path("unscored.jsonl"), unscored)
    toys.write_rows(Path("own.jsonl"), [{**row, "chosen": "w4 w5"} for row in unscored])
    losses = {}
    for name in ("model", "cache"):
        changes = {
            "train__method": method,
            "train__data": data,
            "train__eval_data": data if method != "dckd" else "held-out.jsonl",
            "train__teacher": name,
            "train__arguments__eval_strategy": "steps",
            "train__arguments__eval_steps": 2,
            "train__arguments__max_steps": 2,
            "cache__keep": keep,
        }
        if name == "cache":
            run("cache", f"disk-{method}-{keep}-{name}", **changes)
        out = run("train", f"disk-{method}-{keep}-{name}", **changes)
        log = json.loads((out / "train" / method / "log.json").read_text())
        losses[name] = [each.get("loss", each.get("eval_loss")) for each in log]
    assert len(losses["model"]) == 3
    assert losses["cache"] == pytest.approx(losses["model"], abs=1e-4)


def test_eval_measures_what_it_says(home: Path) -> None:
    scored = [
        {"prompt": "w1 w2", "responses": ["w3 w4", "w5", "w6 w7 w8"], "rewards": [-1.0, -2.0, -3.0]}
    ]
    toys.write_rows(Path("scored.jsonl"), scored)
    changes = {"eval__scored": "scored.jsonl", "eval__models": ["student", "reference"]}
    out = run("eval", "measured", **changes)
    found = json.loads((out / "eval/metrics.json").read_text())
    tok, pairs = toys.tokenizer(), toys.pairs(5, 40)

    def each(name: str, prompt: str, text: str) -> torch.Tensor:
        return logprobs(model(name), tok(prompt)["input_ids"], [*tok(text)["input_ids"], 2])

    for name in ("student", "reference"):
        chosen = [each(name, row["prompt"], row["chosen"]) for row in pairs]
        rejected = [each(name, row["prompt"], row["rejected"]) for row in pairs]
        means = [[p.mean().item() for p in part] for part in (chosen, rejected)]
        right = sum(a > b for a, b in zip(*means, strict=True)) / 5
        ours = [each(name, "w1 w2", text).mean().item() for text in scored[0]["responses"]]
        tau = sum(1 if ours[i] > ours[j] else -1 for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        metrics = found[name]
        assert metrics["nll"] == pytest.approx(-torch.cat(chosen).mean().item(), abs=1e-4)
        assert metrics["reward_chosen"] == pytest.approx(sum(means[0]) / 5, abs=1e-4)
        assert metrics["reward_rejected"] == pytest.approx(sum(means[1]) / 5, abs=1e-4)
        assert metrics["preference_accuracy"] == pytest.approx(right)
        assert metrics["kendall_tau"] == pytest.approx(tau)
        assert metrics["best_agreement"] == (max(ours) == ours[0])
        assert metrics["kl_chosen"] > 0
    assert "dpo_loss" in found["reference"] and "dpo_loss" not in found["student"]


def test_eval_measures_again_only_what_is_new(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("eval", "again", eval__models=["student", "reference"])
    place = out / "eval" / "student.json"
    known = json.loads(place.read_text())
    known["metrics"]["nll"] = 77.0
    place.write_text(json.dumps(known))
    other = json.loads((out / "eval" / "reference.json").read_text())
    other["of"] = {}
    (out / "eval" / "reference.json").write_text(json.dumps({**other, "metrics": {"nll": 77.0}}))
    run("eval", "again", eval__models=["student", "reference"])
    found = json.loads((out / "eval/metrics.json").read_text())
    assert found["student"]["nll"] == 77.0
    assert found["reference"] == other["metrics"]
