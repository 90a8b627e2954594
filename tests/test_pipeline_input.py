"""Every mistake is one line that says where it is, what was expected and what came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

import pipeline_toys as toys
import yaml
from pipeline_toys import refused
from safetensors.torch import load, save_file

from pad_kernels import cli
from pad_kernels.cache.writer import lock

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, rows, and a run that has been sampled, scored and trained."""
    folder = tmp_path_factory.mktemp("home")
    toys.fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ("sample", "score", "train"):
            assert cli.main([command, "run.yaml"]) == 0
    return folder


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    place = tmp_path / "home"
    shutil.copytree(folder, place)
    monkeypatch.chdir(place)
    return place


# Rows.


def test_prompts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("rows.jsonl")
    toys.write_settings(Path("x.yaml"), out="x", sample__prompts="rows.jsonl")
    refused(capsys, "sample x.yaml", "sample.prompts: there is no rows.jsonl")
    for text, *parts in (
        ("", "at least one row, got none in rows.jsonl"),
        ('{"prompt": "w1"}\n{"prompt": ', "rows.jsonl, line 2: not JSON"),
        ('{"prompt": "w1"}\n[1]', "line 2: expected an object"),
        ('{"prompt": "w1"}\n{"text": "w1"}', "line 2", "['prompt'], got ['text']"),
        ('{"text": "w1"}', "a column 'prompt', got columns ['text']"),
        ('{"prompt": "w1"}\n{"prompt": ""}', "column 'prompt', row 1", "not empty"),
        (json.dumps({"prompt": "w1 " * 160}), "row 0: expected at most 154 tokens", "got 160"),
        ('{"prompt": 1}\n{"prompt": "a"}', "cannot be read"),
    ):
        path.write_text(text)
        refused(capsys, "sample x.yaml", *parts)
    toys.write_settings(Path("x.yaml"), sample__prompts="rows.txt")
    path.rename("rows.txt")
    refused(capsys, "sample x.yaml", "a .jsonl or .parquet file", "rows.txt")
    Path("rows.parquet").write_bytes(b"PAR1 this is none PAR1")
    toys.write_settings(Path("x.yaml"), out="x", sample__prompts="rows.parquet")
    refused(capsys, "sample x.yaml", "rows.parquet cannot be read")
    toys.write_settings(Path("x.yaml"), out="x", sample__max_new_tokens=toys.CONTEXT)
    refused(capsys, "sample x.yaml", "sample.max_new_tokens", "context of 160 tokens")
    toys.write_rows(path, [{"prompt": [3, 4]}])
    toys.write_settings(Path("x.yaml"), out="x", sample__prompts="rows.jsonl", sample__chat=True)
    refused(capsys, "sample x.yaml", "row 0: expected a text", "chat: true")


def test_responses(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"out": "x", "score__responses": "rows.jsonl"}
    toys.write_settings(Path("x.yaml"), **given)
    for row, *parts in (
        ({"prompt": "w1"}, "a column 'responses'"),
        ({"prompt": "w1", "responses": "w2"}, "column 'responses', row 0", "a list"),
        ({"prompt": "w1", "responses": ["w2", ""]}, "column 'responses', row 0", "not empty"),
        ({"prompt": "w1", "responses": ["w2"]}, "expected at least 2 responses", "got 1"),
        ({"prompt": "w1", "responses": ["w2", "w3 " * 170]}, "row 0", "at most 160 tokens"),
        ({"prompt": "w1", "responses": ["w2 " * 70] * 2}, "row 0: expected a question", "160"),
    ):
        toys.write_rows(Path("rows.jsonl"), [row])
        refused(capsys, "score x.yaml", *parts)
    toys.write_settings(Path("x.yaml"), **given, score__calibration="nway")
    toys.write_rows(Path("rows.jsonl"), [{"prompt": "w1", "responses": ["w2"] * 27}])
    refused(capsys, "score x.yaml", "expected 2 to 26 responses", "got 27")
    toys.write_settings(Path("x.yaml"), out="x")
    refused(capsys, "score x.yaml", "score.responses: there is no x/samples")


def test_training_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, row, *parts in (
        ("dpo", {"prompt": "w1", "chosen": "w2"}, "a column 'rejected'"),
        ("dpo", {"prompt": "w1", "chosen": "", "rejected": "w2"}, "column 'chosen', row 0"),
        ("dckd", {"prompt": "w1", "chosen": "w2", "rejected": "w3 " * 170}, "160 tokens"),
        ("pad", {"prompt": "w1", "responses": ["w2"], "rewards": [1.0]}, "at least 2 responses"),
        ("pad", {"prompt": "w1", "responses": ["a", "b"], "rewards": [1.0]}, "2 numbers"),
        ("adpa", {"prompt": "w1", "chosen": "w2"}, "a column 'responses'"),
        ("kto", {"prompt": "w1", "completion": "w2"}, "a column 'label'"),
        ("adpa+", {"prompt": "w1", "chosen": "w2"}, "a column 'rejected'"),
    ):
        toys.write_rows(Path("rows.jsonl"), [row])
        toys.write_settings(Path("x.yaml"), out="x", train__data="rows.jsonl", train__method=method)
        refused(capsys, "train x.yaml", "train.data (rows.jsonl)", *parts)
    toys.write_rows(Path("rows.jsonl"), [{"prompt": "w1", "chosen": "", "rejected": "w2"}])
    toys.write_settings(Path("x.yaml"), out="c", train__data="rows.jsonl", train__method="dckd")
    refused(capsys, "cache x.yaml", "train.data (rows.jsonl), column 'chosen', row 0")


def test_eval_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.write_rows(Path("rows.jsonl"), [{"prompt": "w1", "chosen": "w2"}])
    toys.write_settings(Path("x.yaml"), out="x", eval__pairs="rows.jsonl")
    refused(capsys, "eval x.yaml", "eval.pairs: expected a column 'rejected'")
    toys.write_settings(Path("x.yaml"), out="x", eval__scored="rows.jsonl")
    refused(capsys, "eval x.yaml", "eval.scored: expected a column 'responses'")
    toys.write_rows(Path("rows.jsonl"), [{"prompt": "w1", "chosen": "", "rejected": "w2"}])
    toys.write_settings(Path("x.yaml"), out="x", eval__pairs="rows.jsonl")
    refused(capsys, "eval x.yaml", "eval.pairs, column 'chosen', row 0")
    toys.write_settings(Path("x.yaml"), out="x", eval__models=["gone"])
    refused(capsys, "eval x.yaml", "expected a folder with a config.json", "got gone")


# Models.


def test_models_that_are_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.write_settings(Path("x.yaml"), out="x", student="gone")
    refused(capsys, "sample x.yaml", "student: expected a folder with a config.json", "got gone")
    toys.write_settings(Path("x.yaml"), out="x", teacher=None, score__responses="run/samples")
    refused(capsys, "score x.yaml", "teacher: expected a model's folder, got nothing")
    toys.write_settings(
        Path("x.yaml"), out="x", train__method="adpa", train__data="run/samples", reference=None
    )
    refused(capsys, "train x.yaml", "reference: expected a model's folder, got nothing")
    toys.write_settings(Path("x.yaml"), out="x")
    weights = Path("student/model.safetensors")
    data = weights.read_bytes()
    tensors = load(data)  # in memory: the file is about to change
    weights.write_bytes(data[: len(data) // 2])
    refused(capsys, "sample x.yaml", "student: student cannot be loaded")
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, weights, {"format": "pt"})
    refused(capsys, "sample x.yaml", "student: student has no weights for 1", name)
    Path("student/config.json").write_text("{")
    refused(capsys, "sample x.yaml", "student cannot be loaded")


@pytest.mark.parametrize("command", ["score", "cache", "train", "eval"])
def test_a_teacher_with_another_tokenizer(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys.tokenizer(-1).save_pretrained("teacher")
    changes = {"train__method": "dckd", "train__data": "pairs.jsonl"}
    toys.write_settings(Path("x.yaml"), out="x", score__responses="run/samples", **changes)
    expected = "teacher: expected a teacher with the student's tokenizer"
    refused(capsys, f"{command} x.yaml", expected, "has id 3 in the student's")
    if command == "train":  # who knows better says so
        changes |= {"teacher_tokenizer": "student", "train__arguments__max_steps": 1}
        toys.write_settings(Path("x.yaml"), out="x", **changes)
        assert cli.main(["train", "x.yaml"]) == 0


def test_a_teacher_without_letters(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("student", "teacher"):
        path = Path(name) / "tokenizer.json"
        path.write_text(path.read_text().replace('"B": ', '"b": '))
    toys.write_settings(Path("x.yaml"), out="x", score__responses="run/samples")
    refused(capsys, "score x.yaml", "vocabulary has the letter 'B'")


# Arguments of training.


def test_arguments(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value, *parts in (
        ("learning_rat", 1.0, "unknown key; did you mean 'learning_rate'?"),
        ("learning_rate", "fast", "learning_rate: expected a number, got 'fast'"),
        ("max_steps", 1.5, "max_steps: expected a whole number, got 1.5"),
        ("kind", "kendall", "kind"),
        ("alpha", 0.1, "alpha: unknown key"),
        ("overlong", "cut", "overlong: expected one of error, drop"),
        ("output_dir", "x", "output_dir: expected none, the command sets it"),
        ("save_total_limit", 1, "save_total_limit: expected at least 2"),
        ("max_length", 500, "max_length", "context"),
    ):
        changes = {"train__data": "run/scored", f"train__arguments__{name}": value}
        toys.write_settings(Path("x.yaml"), out="x", **changes)
        refused(capsys, "train x.yaml", *parts)


def test_several_processes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, "train run.yaml", "train: expected one process", "got 2")


def test_settings_that_contradict_each_other(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, *parts in (
        ({"method": "sft"}, "train.data: expected rows for sft, got nothing"),
        ({"method": "seqkd", "data": None}, "there is no x/samples"),
        ({"method": "adpa+", "data": None}, "train.data: expected rows with chosen"),
        ({"method": "adpa+", "data": "pairs.jsonl", "teacher": "cache"}, "expected model"),
        ({"method": "adpa+", "data": "pairs.jsonl", "eval_data": "p"}, "train.eval_data"),
        ({"method": "sft", "data": "pairs.jsonl", "teacher": "cache"}, "expected model for sft"),
        ({"method": "dckd", "data": "pairs.jsonl", "teacher": "cache"}, "run the command cache"),
        ({"data": "pairs.jsonl", "lora": {"rank": 4}}, "train.lora", "rank"),
        ({"data": "gone"}, "train.data: there is no gone"),
    ):
        values = {f"train__{name}": value for name, value in changes.items()}
        if "lora" in changes:
            values["train__method"] = "sft"
        toys.write_settings(Path("x.yaml"), out="x", **values)
        refused(capsys, "train x.yaml", *parts)
    toys.write_settings(Path("x.yaml"), out="x", train__method="adpa+", train__data="pairs.jsonl")
    values = yaml.safe_load(Path("x.yaml").read_text())
    Path("x.yaml").write_text(yaml.safe_dump({n: v for n, v in values.items() if n != "sample"}))
    refused(capsys, "train x.yaml", "sample: expected this section: adpa+")
    refused(capsys, "train run.yaml --method seqkd", "the teacher's responses", "got the student's")
    refused(capsys, "cache run.yaml", "rows without rewards")


# Folders that hold something else.


def test_another_configuration(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.write_settings(Path("x.yaml"), sample__temperature=0.5)
    refused(capsys, "sample x.yaml", "run/samples was begun with settings.temperature = 0.9")
    toys.write_settings(Path("x.yaml"), seed=5)
    refused(capsys, "score x.yaml", "run/scored was begun with seed = 0, not 5")
    toys.write_settings(Path("x.yaml"), train__arguments__learning_rate=0.5)
    refused(capsys, "train x.yaml", "was begun with arguments.learning_rate = 0.001, not 0.5")
    toys.write_rows(Path("pairs.jsonl"), toys.pairs(21))
    refused(capsys, "sample run.yaml", "was begun with inputs.prompts")
    assert cli.main(["train", "run.yaml"]) == 0  # scored rows are still the same


def test_folders_of_others(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x/samples").mkdir(parents=True)
    Path("x/samples/notes.txt").write_text("mine")
    toys.write_settings(Path("x.yaml"), out="x")
    refused(capsys, "sample x.yaml", "expected a new or empty folder", "notes.txt")
    held = lock(Path("run/samples/writer.lock"))
    refused(capsys, "sample run.yaml", "another writer is at work in run/samples")
    held.close()


def test_unfinished_and_damaged_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("run/samples/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "files": manifest["files"][:2]}))
    refused(capsys, "score run.yaml", "run/samples is unfinished, 12 of 20 rows")
    path.write_text(json.dumps(manifest)[:-9])
    refused(capsys, "score run.yaml", "manifest.json is damaged")
    path.write_text("[]")
    refused(capsys, "sample run.yaml", "manifest.json is damaged")
    path.write_text(json.dumps(manifest))
    part = Path("run/samples/part-00001.parquet")
    data = bytearray(part.read_bytes())
    data[60] ^= 1
    part.write_bytes(data)
    refused(capsys, "score run.yaml", "part-00001.parquet is damaged")
    refused(capsys, "sample run.yaml", "part-00001.parquet is damaged")
    part.unlink()
    refused(capsys, "sample run.yaml", "part-00001.parquet is damaged: the file is missing")


def test_damaged_checkpoints(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path("run/train/pad")
    shutil.rmtree(place / "final")
    before = (place / "log.json").read_bytes()
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        path = place / "checkpoint-6" / name
        good = path.read_bytes()
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        refused(capsys, "train run.yaml", f"{name} is damaged", "from the checkpoint before it")
        path.unlink()
        refused(capsys, "train run.yaml", f"{name} is damaged: the file is missing")
        path.write_bytes(good)
    (place / "checkpoint-6/files.json").write_text("{")
    refused(capsys, "train run.yaml", "files.json is damaged")
    shutil.rmtree(place / "checkpoint-6")  # as the message says
    assert cli.main(["train", "run.yaml"]) == 0
    assert (place / "log.json").read_bytes() == before
    assert "going on from run/train/pad/checkpoint-4" in capsys.readouterr().out


def test_what_a_kill_left_of_checkpoints_is_removed(home: Path) -> None:
    place = Path("run/train/pad")
    shutil.rmtree(place / "final")
    (place / "checkpoint-6/files.json").unlink()
    (place / "checkpoint-4/optimizer.pt").unlink()
    shutil.copytree(place / "checkpoint-4", place / "checkpoint-5")
    (place / "checkpoint-5/files.json").unlink()
    from pad_kernels.pipeline import checkpoints

    with pytest.raises(ValueError, match="damaged"):
        checkpoints.newest(place)
    checkpoints.mark(place / "checkpoint-4")
    shutil.copytree(place / "checkpoint-4", place / "checkpoint-2")
    (place / "checkpoint-2/model.safetensors").unlink()
    assert checkpoints.newest(place) == place / "checkpoint-4"
    assert sorted(each.name for each in place.glob("checkpoint-*")) == ["checkpoint-4"]
