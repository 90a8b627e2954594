"""The snippets of docs/trainers.md run as they stand, in a folder with two models and rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("safetensors")
from trainer_toys import llama, tokenizer

TEXT = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name, hidden in (("student", 32), ("teacher", 48)):
        llama(3, hidden=hidden).save_pretrained(name)
        tokenizer().save_pretrained(name)
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f"w{i + 2}", "rejected": f"w{i} w{i}"}
        for i in range(16)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/trainers.md", "exec"), namespace)
        losses = [e["loss"] for e in namespace["trainer"].state.log_history if "loss" in e]
        assert len(losses) in (0, 4)
    assert Path("dckd/final/config.json").exists()
    assert len(BLOCKS[0].strip().splitlines()) <= 20
    assert len(BLOCKS) == 2
