"""The command line: help, version, explain, what is missing, wrong calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pad_kernels
from pad_kernels import cli
from pad_kernels import demo as demo_package

COMMANDS = ("sample", "score", "cache", "train", "eval", "demo", "explain", "plan", "bench")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's way out
        code = int(stop.code or 0)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in COMMANDS:
        assert f"\n    {name} " in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: pad-kernels {name}")
    description = out.split("\n\n")[1]
    assert len(description.split()) > 15
    parser = cli.make_parser()._subparsers._group_actions[0].choices[name]
    assert all(action.help for action in parser._actions)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"pad-kernels {pad_kernels.__version__}\n")


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pad_kernels.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"pad-kernels {pad_kernels.__version__}\n"


def test_no_command_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys)
    assert code == 2 and "COMMAND" in err


SIZES = ("explain", "--tokens", "4096", "--hidden", "512", "--vocab", "65536")


def test_explain_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *SIZES)
    assert code == 0 and out.startswith("early on ")
    assert "4096 tokens x 65536 entries" in out
    assert run(capsys, *SIZES, "--per-token")[1].startswith(("late on ", "kept on "))


def test_explain_hands_its_options_on(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *SIZES, "--plan", "late:torch_blocked", "--workspace", "64")
    assert out.startswith("late on torch_blocked") and "of 64.0 MiB allowed" in out
    trained = run(capsys, *SIZES)[1].splitlines()[-2]
    frozen = run(capsys, *SIZES, "--frozen-weight")[1].splitlines()[-2]
    assert "work" in trained and trained != frozen
    assert "predicted for h200" in run(capsys, *SIZES, "--device", "h200")[1]
    both = run(capsys, *SIZES, "--frozen-weight", "--frozen-hidden")[1].splitlines()[-1]
    assert both not in (trained, frozen)
    assert run(capsys, *SIZES, "--dtype", "bfloat16")[1] != run(capsys, *SIZES)[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--plan", "quickly"), "plan"),
        (("--workspace", "1"), "budget"),
        (("--workspace", "0"), "--workspace"),
        (("--tokens", "-3"), "--tokens"),
        (("--vocab", "many"), "--vocab"),
        (("--dtype", "int8"), "--dtype"),
    ],
)
def test_explain_says_what_is_wrong(
    options: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *SIZES, *options)
    assert code == 2 and named in err and not out
    assert "Traceback" not in err


def test_demo_names_the_missing_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        demo_package, "find_spec", lambda name: None if name in ("transformers", "tqdm") else 1
    )
    code, out, err = run(capsys, "demo", "--out", str(tmp_path / "new"))
    assert code == 2 and not out
    assert err.splitlines() == [
        "pad-kernels: the demo needs transformers>=5, tqdm; install with: "
        "pip install 'pad-kernels[demo]'"
    ]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("installed", "found"), [("4.57.1", ["transformers>=5"]), ("5.0.0", [])])
def test_demo_needs_a_new_transformers(
    installed: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_package, "find_spec", lambda name: 1)
    monkeypatch.setattr(demo_package, "version", lambda name: installed)
    assert demo_package.missing_packages() == found


@pytest.mark.parametrize("seed", ["-1", "x", str(2**31)])
def test_demo_refuses_a_bad_seed(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "demo", f"--seed={seed}")
    assert code == 2 and "--seed" in err


def test_demo_refuses_a_file_as_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_package, "missing_packages", list)
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run(capsys, "demo", "--out", str(file))
    assert code == 2 and str(file) in err


def test_ctrl_c_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_package, "missing_packages", interrupted)
    code, _, err = run(capsys, "demo")
    assert code == 130 and "interrupted" in err
