"""``make gpu-check`` where there is no GPU: it says so, and its machinery runs on the CPU."""

from __future__ import annotations

import json
import pathlib
import runpy
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

import pad_kernels as pk

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu_check"
NEED_CPP = pytest.mark.skipif(
    pk.available_backends()["cpp"] != "available", reason="the extension is not built"
)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Modules of the command, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import report
    import store
    import units
    import worker

    import build

    return types.SimpleNamespace(
        build=build, report=report, store=store, units=units, worker=worker
    )


@pytest.fixture
def built(tmp_path: pathlib.Path, parts: types.SimpleNamespace) -> pathlib.Path:
    """An output folder that says that the extensions of this tree are built."""
    record = {"status": "ok", "of": parts.build._circumstances("cpu"), "modules": {}}
    (tmp_path / "build.json").write_text(json.dumps(record))
    return tmp_path


def _command(*words: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    found = _command("--out", tmp_path / "new")
    assert found.returncode == 2 and "sees no GPU; nothing was run" in found.stderr
    assert not (tmp_path / "new").exists()


@NEED_CPP
def test_parity_runs_resumes_and_starts_afresh(built: pathlib.Path) -> None:
    words = ("--device", "cpu", "--stage", "parity", "--out", built, "--jobs", "2")
    words += ("--only", "cpp/float32/early1/losses")
    first = _command(*words)
    assert first.returncode == 0, first.stderr
    assert "1 units, 0 of them done before" in first.stderr and "12 passed" in first.stderr
    assert "| cpp/float32   | 12     | 0      | 0       | 0    |" in first.stdout
    assert "1 of them done before" in _command(*words).stderr
    again = _command(*words, "--fresh", "--seconds", "1")
    assert "1 left for the next run" in again.stderr, "too little time: nothing starts"
    result = json.loads((built / "gpu-check.json").read_text())
    assert result["meta"]["versions"]["torch"] == torch.__version__ and result["meta"]["sources"]


@NEED_CPP
@pytest.mark.slow
def test_bench_in_miniature(built: pathlib.Path) -> None:
    found = _command("--device", "cpu", "--stage", "bench", "--out", built)
    assert found.returncode == 0, found.stderr
    table = (built / "table.md").read_text()
    assert table.strip() == found.stdout.strip()
    for text in (
        "Measured: matrix products bfloat16",
        "| gradient",
        "| listwise/jsd/8",
        "| filter/",
    ):
        assert text in table
    assert "| cross_entropy/24x16x300/bfloat16" in table and "| dense eager" in table
    rows = [
        r["case"]["rows"]
        for r in json.loads((built / "gpu-check.json").read_text())["bench"]
        if "case" in r
    ]
    assert len(rows) == 2 and all(row[0]["status"] == "ok" for row in rows)


def test_a_failed_check_is_in_the_table(
    tmp_path: pathlib.Path, parts: types.SimpleNamespace
) -> None:
    meta = {
        "meta": {
            "versions": {"torch": "2"},
            "gpu": "G",
            "cuda": "13",
            "commit": None,
            "sources": "abc",
            "date": "2026-01-01T00",
        }
    }
    records = [
        {"unit": "triton/bfloat16/late1/odd", "status": "failed", "passed": 3, "failures": 1,
         "refused": {"no kernel": 2}, "failed": {"logprob[bias]": "error 1 over 2"}},
        {"unit": "cuda/bfloat16/late1/odd", "status": "crashed", "reason": "exit status -9"},
    ]  # fmt: skip
    lines = "".join(json.dumps(x) + "\n" for x in [meta, *records])
    (tmp_path / "parity.jsonl").write_text(lines)
    text = parts.report.write(tmp_path)
    assert "logprob[bias]: error 1 over 2" in text and "exit status -9" in text
    assert "refused 2 times, triton: no kernel" in text and "sources abc" in text


# --- results on disk ---


def _meta(**more: Any) -> dict[str, Any]:
    return {"sources": "a", "gpu": None, "versions": {}, "backends": {}, **more}


def test_results_of_other_sources_do_not_count(
    tmp_path: pathlib.Path, parts: types.SimpleNamespace
) -> None:
    path = tmp_path / "x.jsonl"
    parts.store.Store(path, _meta()).add({"unit": "one", "status": "ok"})
    with path.open("a") as file:
        file.write('{"unit": "cut o')
    assert list(parts.store.Store(path, _meta()).done) == ["one"]
    assert not parts.store.Store(path, _meta(sources="b")).done
    assert not parts.store.Store(path, _meta()).done


# --- stages ---


def test_what_ran_out_of_time_is_tried_again_and_is_no_success(
    built: pathlib.Path, parts: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages

    answers = {"compiles": "timeout", "fine": "ok"}
    asked: list[str] = []

    class Worker:
        def __init__(self, stage: str, device: str) -> None: ...

        def run(self, unit: str, seconds: float) -> dict[str, Any]:
            asked.append(unit)
            return {"unit": unit, "status": answers[unit], "passed": 1, "refused": {}}

        def stop(self) -> None: ...

    monkeypatch.setattr(stages, "Worker", Worker)
    monkeypatch.setattr(stages, "circumstances", lambda device: _meta())
    monkeypatch.setattr(stages.build, "stale", lambda *x: False)
    monkeypatch.setattr(parts.units, "parity", lambda device: dict.fromkeys(answers, 5.0))
    args = types.SimpleNamespace(
        device="cpu", out=built, only="", fresh=False, jobs=2, seconds=100.0
    )
    assert not stages.run("parity", args)
    assert sorted(asked) == ["compiles", "fine"]
    answers["compiles"] = "ok"
    asked.clear()
    assert stages.run("parity", args) and asked == ["compiles"]


def test_what_a_stage_lacks_is_said_and_there_is_a_table(
    built: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytest.py").write_text("raise ImportError('there is no pytest')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = _command("--device", "cpu", "--stage", "parity", "--out", built)
    assert found.returncode == 1 and "there is no pytest" in found.stderr
    assert (built / "table.md").exists()


def test_the_benchmark_needs_no_pytest(
    parts: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.setitem(sys.modules, "device_parity", None)
    assert "rates" in parts.units.bench("cpu")


# --- workers ---

#: Answers what it is asked, as a worker does, and misbehaves when it is told to.
STAND_IN = """
import json, os, sys, time
for line in sys.stdin:
    unit = line.strip()
    if unit == "die":
        os._exit(3)
    if unit == "hang":
        time.sleep(60)
    print("something else")
    print("@@ " + json.dumps({"unit": unit, "status": "ok", "pid": os.getpid(),
                              "fatal": unit == "fatal"}), flush=True)
"""


def test_a_worker_survives_what_its_units_do(parts: types.SimpleNamespace) -> None:
    worker = parts.worker.Worker("parity", "cpu")
    worker._command = [sys.executable, "-c", STAND_IN]
    try:
        first = worker.run("a", 30)
        assert worker.run("b", 30)["pid"] == first["pid"]
        assert worker.run("die", 30) == {
            "unit": "die", "status": "crashed", "reason": "exit status 3",
        }  # fmt: skip
        second = worker.run("c", 30)
        assert second["status"] == "ok" and second["pid"] != first["pid"]
        assert worker.run("hang", 0.5)["status"] == "timeout"
        third = worker.run("fatal", 30)["pid"]
        assert worker.run("d", 30)["pid"] not in (second["pid"], third)
    finally:
        worker.stop()


def test_errors_that_end_a_cuda_context(parts: types.SimpleNamespace) -> None:
    assert parts.worker._fatal("CUDA error: an illegal memory access was encountered")
    assert not parts.worker._fatal("CUDA out of memory")


# --- sanitizer ---

SANITIZERS = {
    "ok": ("echo '========= ERROR SUMMARY: 0 errors'", "ok"),
    "finds": ("echo 'Invalid write'; echo '========= ERROR SUMMARY: 1 error'; exit 99", "failed"),
    "refuses": ("echo 'Device not supported'; exit 1", "unusable"),
}


@pytest.mark.parametrize("kind", SANITIZERS)
def test_what_the_sanitizer_says(
    kind: str,
    tmp_path: pathlib.Path,
    parts: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, status = SANITIZERS[kind]
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(parts.units, "sanitizer", lambda: str(program))
    assert parts.units.run("sanitize", "memcheck/any/sequences", "cpu")["status"] == status


def test_the_sanitizer_watches_checks_that_exist(
    tmp_path: pathlib.Path, parts: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run for real, by a tool that only passes on what it is given."""
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\nshift 6\n"$@" && echo "ERROR SUMMARY: 0 errors"\n')
    program.chmod(0o755)
    monkeypatch.setattr(parts.units, "sanitizer", lambda: str(program))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    backend = parts.units.gpu_backends("cpu")
    wanted = list(parts.units.WATCHED) if backend else ["sequences"]
    for group in wanted:
        unit = f"memcheck/{backend[0] if backend else 'any'}/{group}"
        record = parts.units.run("sanitize", unit, "cpu")
        assert record["status"] == "ok", record
        assert "failed: 0" in record["summary"][0], record


def test_no_sanitizer_is_reported(
    parts: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.units, "sanitizer", lambda: None)
    record = parts.units.run("sanitize", "racecheck/any/sequences", "cpu")
    assert record["status"] == "missing" and "not installed" in record["reason"]


# --- build ---


@pytest.mark.parametrize("where", ["CUDA_HOME", "PATH", "usual place", "nowhere"])
def test_where_nvcc_is_looked_for(
    where: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **x: None)
    names = runpy.run_path(str(ROOT / "setup.py"))
    program = tmp_path / "cuda" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(program.parent) if where == "PATH" else str(tmp_path))
    if where == "CUDA_HOME":
        monkeypatch.setenv(where, str(tmp_path / "cuda"))
    usual = program.parent if where == "usual place" else tmp_path
    names["find_nvcc"].__globals__["CUDA_BIN"] = str(usual)
    if where == "nowhere":
        with pytest.raises(FileNotFoundError, match="no nvcc on the path"):
            names["find_nvcc"]()
    else:
        assert names["find_nvcc"]() == str(program)


SETUP = """
import os, pathlib, pybind11
text = os.environ["PAD_KERNELS_CUDA_ARCHS"] + " " + pybind11.get_include()
pathlib.Path("pad_kernels", "written").write_text(text)
assert not pathlib.Path("pyproject.toml").exists()
"""


def _tree(folder: pathlib.Path, setup: str) -> None:
    for name in ("csrc", "pad_kernels"):
        (folder / name).mkdir()
    (folder / "setup.py").write_text(setup)
    (folder / "pyproject.toml").write_text("not for an old setuptools")


def test_the_build_names_the_device_and_needs_no_pybind11(
    tmp_path: pathlib.Path, parts: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tree(tmp_path, SETUP)
    monkeypatch.setattr(parts.build, "ROOT", tmp_path)
    monkeypatch.setattr(parts.build.importlib.util, "find_spec", lambda name: None)
    assert parts.build._compile("90a", 60)["status"] == "ok"
    archs, include = (tmp_path / "pad_kernels" / "written").read_text().split()
    assert archs == "90a" and pathlib.Path(include, "pybind11", "pybind11.h").exists()


def test_a_build_that_fails_says_how(
    tmp_path: pathlib.Path, parts: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tree(tmp_path, "raise SystemExit('no compiler')")
    monkeypatch.setattr(parts.build, "ROOT", tmp_path)
    record = parts.build._compile("90a", 60)
    assert record["status"] == "failed" and "no compiler" in record["reason"]


def test_a_build_of_other_sources_is_stale(
    built: pathlib.Path, parts: types.SimpleNamespace
) -> None:
    if parts.build.stale("cpu", built):
        pytest.skip("the extension is not built")
    record = json.loads((built / "build.json").read_text())
    record["of"]["sources"] = "others"
    (built / "build.json").write_text(json.dumps(record))
    assert parts.build.stale("cpu", built) and parts.build.stale("cpu", built / "nothing")
