"""Mistakes in the settings' file and on the command line: one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from pipeline_toys import refused

from pad_kernels import cli
from pad_kernels.pipeline import settings

TEXTS = [
    ("sample: [1, 2", "line 1", "not valid YAML"),
    ("student: a\n\tout: b", "line 2", "not valid YAML"),
    ("student: a\nout: b\nstudent: c", "line 3", "'student' comes twice"),
    ("- student\n- out", "expected a mapping of settings"),
    ("", "expected a mapping of settings, got nothing"),
    ("student: a", "out: expected a text, got none"),
    ("student: a\nout: b\nteahcer: c", "teahcer: unknown key; did you mean 'teacher'?"),
    ("student: a\nout: b\nqqq: c", "qqq: unknown key; expected one of", "reference"),
    ("student: 3\nout: b", "student: expected a text, got 3"),
    ("student: a\nout: b\nseed: -1", "seed: expected an integer >= 0, got -1"),
    ("student: a\nout: b\nseed: true", "seed: expected a whole number, got True"),
    ("student: a\nout: b\nseed: 4294967296", "seed: expected less than 2^32"),
    ("student: a\nout: b\ndtype: int8", "dtype: expected one of float32, bfloat16, float16"),
    ("student: a\nout: b\nsample: x", "sample: expected a mapping, got 'x'"),
    ("student: a\nout: b\nsample:", "sample: expected a mapping, got nothing"),
    ("student: a\nout: b\nsample: {n: 2}", "sample.prompts: expected a text, got none"),
    ("student: a\nout: b\nsample: {prompts: p, n: 0}", "sample.n: expected an integer >= 1, got 0"),
    ("student: a\nout: b\nsample: {prompts: p, n: two}", "sample.n: expected a whole number"),
    ("student: a\nout: b\nsample: {prompts: p, temperature: 0}", "sample.temperature", "> 0"),
    ("student: a\nout: b\nsample: {prompts: p, top_k: 0}", "sample.top_k", ">= 1"),
    ("student: a\nout: b\nsample: {prompts: p, prompst: q}", "sample.prompst: unknown key"),
    ("student: a\nout: b\nscore: {calibration: two}", "score.calibration: expected one of"),
    ("student: a\nout: b\nscore: {calibration: nway, alpha: 2}", "score.alpha", "<= 1"),
    ("student: a\nout: b\nscore: {calibration: none, alpha: 1}", "none without calibration"),
    ("student: a\nout: b\ncache: {keep: all}", "cache.keep: expected a whole number or one of"),
    ("student: a\nout: b\ncache: {keep: 0}", "cache.keep: expected an integer >= 1"),
    ("student: a\nout: b\ntrain: {method: pda}", "train.method: expected one of pad, dckd"),
    ("student: a\nout: b\ntrain: {method: pad, methods: {x: {}}}", "train.methods: expected one"),
    ("student: a\nout: b\ntrain: {method: pad, methods: {pad: 3}}", "train.methods: expected"),
    ("student: a\nout: b\neval: {models: [3], pairs: p}", "eval.models: expected a list"),
    ("student: a\nout: b\neval: {}", "eval.pairs: expected held-out rows"),
    ("student: a\nout: b", "sample: expected this section in the file"),
]


@pytest.mark.parametrize("text", TEXTS, ids=[each[0].replace("\n", ";") for each in TEXTS])
def test_yaml(
    text: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text[0])
    refused(capsys, "sample bad.yaml", *text[1:])


def test_no_file_or_not_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, "sample gone.yaml", "No such file")
    Path("folder.yaml").mkdir()
    refused(capsys, "train folder.yaml", "directory")
    Path("bytes.yaml").write_bytes(b"student: \xff\xfe\x00")
    refused(capsys, "score bytes.yaml", "not valid YAML")


def test_numbers_that_yaml_takes_for_texts(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: a\nout: b\nscore: {calibration: nway, floor: 1e-5, alpha: 1}")
    found = settings.read(path).score
    assert found is not None and (found.floor, found.alpha) == (1e-5, 1)


@pytest.mark.parametrize("command", ["sample", "score", "train", "cache", "eval"])
def test_a_section_is_missing(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.yaml").write_text("student: a\nout: b")
    section = "train" if command == "cache" else command
    refused(capsys, f"{command} bare.yaml", f"{section}: expected this section in the file")
    assert not Path("b").exists()


def test_methods_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("student: a\nout: b\ntrain: {method: pad}")
    refused(capsys, "train run.yaml --method pda", "--method: expected one of pad", "'pda'")
    refused(capsys, "cache run.yaml --method dpo", "train.method: expected one of dckd")


def test_debug_shows_where() -> None:
    with pytest.raises(ValueError, match="No such file"):
        cli.main(["sample", "gone.yaml", "--debug"])
