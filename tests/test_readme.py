"""The README's Python blocks run as they stand, in order, in one namespace."""

import json
import pathlib
import re

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_python_blocks_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BLOCKS
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in BLOCKS:
        if "transformers" in block:
            pytest.importorskip("transformers", minversion="5.0")
            pytest.importorskip("datasets")
            _make_folders()
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step == 4


def _make_folders() -> None:
    """A student, a teacher and pairs, here."""
    from trainer_toys import llama, tokenizer

    for name, hidden in (("student", 32), ("teacher", 48)):
        llama(3, hidden=hidden).save_pretrained(name)
        tokenizer().save_pretrained(name)
    rows = [{"prompt": f"w{i}", "chosen": f"w{i + 2}", "rejected": f"w{i} w{i}"} for i in range(16)]
    lines = [json.dumps(row) + "\n" for row in rows]
    pathlib.Path("pairs.jsonl").write_text("".join(lines))


def test_the_first_example_is_short_and_trains() -> None:
    namespace: dict = {}
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    exec(compile(BLOCKS[0], "README.md", "exec"), namespace)
    assert torch.isfinite(namespace["loss"])
    assert namespace["hidden"].grad.abs().sum() > 0
    assert namespace["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http|#)([^)#]+)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", ["demo", "test", "bench", "lint", "coverage", "help"])
def test_make_has_the_target(command: str) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_measured_table_is_the_committed_run() -> None:
    """What the README shows is what benchmarks/results/bench.json renders to."""
    from pad_kernels.bench.report import markdown

    result = json.loads((ROOT / "benchmarks/results/bench.json").read_text())
    shown = README.split("<!-- bench -->\n")[1].split("<!-- /bench -->")[0]
    assert shown.strip() == markdown(result).strip()
