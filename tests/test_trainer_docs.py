"""The snippets of docs/trainers.md run as they stand, in a folder with two models and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doc_pages import Page

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("safetensors")
from trainer_toys import write_folders

PAGE = Page("docs/trainers.md")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_folders()
    namespace: dict[str, Any] = {}
    for block in PAGE.blocks:
        block.run(namespace)
        losses = [e["loss"] for e in namespace["trainer"].state.log_history if "loss" in e]
        assert len(losses) in (0, 4)
    assert Path("dckd/final/config.json").exists()
    assert len(PAGE.blocks[0].text.strip().splitlines()) <= 20
    assert len(PAGE.blocks) == 2


def test_links_lead_somewhere() -> None:
    assert PAGE.links and not PAGE.broken_links()
