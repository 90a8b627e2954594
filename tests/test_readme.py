"""The README's Python blocks run as they stand, in order, in one namespace."""

import json
import re
from pathlib import Path

import pytest
import torch
from doc_pages import ROOT, Page

PAGE = Page("README.md")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in PAGE.blocks:
        if "transformers" in block.text:
            pytest.importorskip("transformers", minversion="5.0")
            pytest.importorskip("datasets")
            from trainer_toys import write_folders

            write_folders()
        block.run(namespace)
    assert namespace["trainer"].state.global_step == 4


def test_the_first_example_is_short_and_trains() -> None:
    namespace: dict = {}
    first = PAGE.blocks[0]
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 15
    first.run(namespace)
    assert torch.isfinite(namespace["loss"])
    assert namespace["hidden"].grad.abs().sum() > 0
    assert namespace["weight"].grad.abs().sum() > 0


def test_links_lead_somewhere() -> None:
    assert PAGE.links and not PAGE.broken_links()


@pytest.mark.parametrize("command", ["demo", "test", "bench", "lint", "coverage", "help"])
def test_make_has_the_target(command: str) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_measured_table_is_the_committed_run() -> None:
    """What the README shows is what benchmarks/results/bench.json renders to."""
    from pad_kernels.bench.report import markdown

    result = json.loads((ROOT / "benchmarks/results/bench.json").read_text())
    shown = PAGE.text.split("<!-- bench -->\n")[1].split("<!-- /bench -->")[0]
    assert shown.strip() == markdown(result).strip()
