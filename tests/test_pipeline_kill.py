"""Killed at any moment, a command that is run again leaves what it would have left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

STAGES = ("sample", "score", "cache", "train", "adpa+")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Any:
    program = Path(__file__).with_name("pipeline_kills.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("kills"))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(stage: str, story: Any) -> None:
    found = story[stage]
    assert len(found["peace"]) >= 4
    assert found["moments"] == found["peace"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_each_file_takes_its_place(stage: str, story: Any) -> None:
    found = story[stage]
    assert found["kills, files"] >= 3
    assert found["files"] == found["peace"]


def test_random_moments_were_in_the_middle(story: Any) -> None:
    assert sum(story[stage]["kills, moments"] for stage in STAGES) >= 3


@pytest.mark.parametrize("stage", ["train", "adpa+"])
def test_training_went_on_from_checkpoints(stage: str, story: Any) -> None:
    assert "going on from" in story[stage]["log"]
