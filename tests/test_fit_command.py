"""`pad-kernels plan` as a user meets it: table, files, and one message for each mistake."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pad_kernels import cli
from pad_kernels.fit import command, models, report

TINY = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["plan", *map(str, argv)])
    except SystemExit as stop:  # argparse's way out
        code = int(stop.code or 0)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def numbers(out: str, row: str) -> list[str]:
    return next(x for x in out.splitlines() if x.startswith(row)).split()[-4:]


def test_table_and_json_say_the_same(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "fit.json"
    options = ("--gpu", "1", "--reserve", "0.25", "--length", "128", "--responses", "3")
    code, out, err = run(capsys, "--student", student, *options, "--json", file)
    assert (code, err) == (0, "")
    found = json.loads(file.read_text())
    assert numbers(out, "LM head") == [case["head"] for case in found["cases"]]
    largest = [case["largest"] for case in found["cases"]]
    assert numbers(out, "largest micro-batch") == [str(x["sequences"]) for x in largest]
    assert all(x["sequences"] == 3 * x["groups"] and x["groups"] for x in largest)
    assert largest[3]["groups"] > largest[2]["groups"]  # ours, then dense
    assert f"{found['entries']['student']:,} parameters" in out
    assert found["bytes"]["room"] == 0.75 * 2**30
    needed = [f"{case['one_group']['peak'] / 2**30:.2f}" for case in found["cases"]]
    assert numbers(out, "needed") == needed
    lora = run(capsys, "--student", student, *options, "--lora-rank", "4")[1]
    assert "all of them" not in lora and "of them trained" in lora


def test_one_file_is_enough_and_teachers_count(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    options = ("--student", student / "config.json", "--length", "64", "--gpu", "4")
    code, out, _ = run(capsys, *options, "--method", "adpa", "--teacher", student)
    assert code == 0 and "teachers' parameters" in out
    assert "teachers' parameters" not in run(capsys, *options)[1]


def test_picture(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    file = tmp_path / "fit.png"
    code, _, _ = run(capsys, "--student", student, "--gpu", "4", "--length", "64", "--plot", file)
    assert code == 0 and file.read_bytes().startswith(b"\x89PNG\r\n")


def test_nothing_fits_and_what_would(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    options = ("--student", student, "--length", "64", "--reserve", "0", "--gpu")
    # The smallest GPU for the student alone, in GiB. The workspace grows with the GPU.
    small, large = 0.001, 0.1
    while large - small > 0.0005:
        middle = (small + large) / 2
        fits = run(capsys, *options, f"{middle:.5f}")[0] == 0
        small, large = (small, middle) if fits else (middle, large)
    options = ("--teacher", student, *options)  # 1.1 million parameters: 0.002 GiB
    code, out, err = run(capsys, *options, f"{large:.5f}")
    assert code == 2 and numbers(out, "largest micro-batch") == ["0"] * 4
    assert err.startswith("pad-kernels: nothing fits") and "from a cache" in err
    code, _, err = run(capsys, *options, "0.001")
    assert code == 2 and "A GPU with 1 GiB would do" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--optimizer", "lion"), "--optimizer"),
        (("--gpu", "many"), "--gpu"),
        (("--gpu", "1", "--reserve", "1"), "--gpu"),
        (("--length", "0"), "--length"),
        (("--length", "2049"), "2048 positions"),
        (("--reference", "gemma-2-2b"), "--reference"),
        (("--teacher", "gemma-2-2b"), "vocabulary of 8192 entries"),
        (("--teacher", "nowhere"), "danube2-1.8b"),
        (("--json", "no/such/folder.json"), "--json"),
    ],
)
def test_a_wrong_option_is_named(
    options: tuple[str, ...], named: str, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    code, out, err = run(capsys, "--student", student, *options)
    assert code == 2 and named in err and not out and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "valid JSON"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ('{"model_type": "no-such-model"}', "no-such-model"),
        ('{"model_type": "t5"}', "causal LM"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "--student"),
        (json.dumps(TINY | {"hidden_size": 63}), "student"),
        (b"\xff\xfe", "readable"),
    ],
)
def test_a_config_that_is_none(
    text: str | bytes, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = run(capsys, "--student", file)
    assert code == 2 and named in err and not out
    assert len(err.splitlines()) == 1 and len(err) < 600


def test_missing_packages_are_named(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    for module, package in ((models, "transformers"), (command, "matplotlib")):
        monkeypatch.setattr(
            module, "find_spec", lambda name, gone=package: None if name == gone else there("json")
        )
        code, _, err = run(capsys, "--student", student, "--plot", "fit.png")
        assert code == 2 and f"pip install {package}" in err
        monkeypatch.setattr(module, "find_spec", lambda name: there("json"))


def test_help_has_examples_and_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "examples:" in out and "gemma-2-9b" in out


def test_changes_are_ever_thriftier(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    args = cli.make_parser().parse_args(["plan", "--student", str(student), "--teacher", "x"])
    args.teacher = str(student)
    setups = [setup for _, setup in report._changes(command._setup(args))]
    assert [len(setup.teachers) for setup in setups] == [0, 0, 0]
    assert [setup.lora_rank for setup in setups] == [None, None, 16]
