"""The ready configurations, against models of the true shapes that have no weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from transformers import AutoModelForCausalLM

from pad_kernels.fit.models import SHAPES
from pad_kernels.integrations.transformers import head_of
from pad_kernels.pipeline import methods, models, settings

FILES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
#: The configurations' folders and the shapes they stand for.
FOLDERS = {
    "gemma-2-2b-it": "gemma-2-2b",
    "gemma-2-9b-it": "gemma-2-9b",
    "llama-3.2-1b-instruct": "llama-3.2-1b",
    "llama-3-8b-instruct": "llama-3-8b",
    "danube2-1.8b": "danube2-1.8b",
    "danube2-1.8b-sft": "danube2-1.8b",
    "danube2-1.8b-dpo": "danube2-1.8b",
    "danube3-500m": "danube3-500m",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, shape in FOLDERS.items():
        place = tmp_path / "models" / folder
        place.mkdir(parents=True)
        shutil.copy(SHAPES / f"{shape}.json", place / "config.json")
    monkeypatch.chdir(tmp_path)


def test_all_pairs_are_there() -> None:
    names = {path.stem for path in FILES}
    assert names == {"pad-gemma-2", "pad-llama-3", "adpa-danube", "dpo-danube-2"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_models_fit_each_other_and_the_settings(path: Path) -> None:
    found = settings.read(path)
    names = [n for n in ("student", "teacher", "reference") if getattr(found, n) is not None]
    configs = {name: models.config(name, getattr(found, name)) for name in names}
    with torch.device("meta"):
        heads = {n: head_of(AutoModelForCausalLM.from_config(c)) for n, c in configs.items()}
    for name, head in heads.items():
        shape = json.loads((Path(getattr(found, name)) / "config.json").read_text())
        assert head.weight.shape == (shape["vocab_size"], shape["hidden_size"])
        assert head.softcap == shape.get("final_logit_softcapping")
        assert head.tied == shape["tie_word_embeddings"]
    assert len({head.weight.shape[0] for head in heads.values()}) == 1
    room = models.context(*configs.values())
    assert room is not None
    if found.sample is not None:
        assert found.sample.max_new_tokens <= room // 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arguments_are_the_trainers(path: Path, tmp_path: Path) -> None:
    found = settings.read(path)
    section = found.train
    wanted = {"adpa+": ("dckd", "adpa")}.get(section.method, (section.method,))
    for name in {*wanted, *section.methods}:
        args: Any = methods.arguments(found, name, section.arguments_of(name), tmp_path)
        assert args.save_total_limit == 2 and args.learning_rate in (1e-6, 5e-6, 1e-5)
        assert args.seed == found.seed and args.gradient_checkpointing
    if found.score is not None:
        args = methods.arguments(found, "pad", section.arguments_of("pad"), tmp_path)
        assert (args.beta, args.kind) == (10.0, "jsd")


def test_the_page_s_other_settings(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
    block = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)[1]
    path = tmp_path / "run.yaml"
    path.write_text(f"student: a\nout: b\n{block}")
    section = settings.read(path).train
    assert section.arguments_of("dckd")["learning_rate"] == 5e-6
    args = methods.arguments(settings.read(path), "adpa", section.arguments_of("adpa"), tmp_path)
    assert (args.gamma, args.learning_rate) == (1.0, 1e-6)


@pytest.mark.parametrize("method", ["sft", "dckd", "adpa"])
def test_one_file_serves_several_methods(method: str) -> None:
    path = next(each for each in FILES if each.stem == "adpa-danube")
    found = settings.read(path, method=method)
    assert found.train.method == method
