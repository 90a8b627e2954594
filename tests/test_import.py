"""Importing the package is quick, touches nothing it need not, and agrees with its metadata."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import pad_kernels

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import pad_kernels
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def probe() -> dict:
    out = subprocess.run(
        [sys.executable, "-W", "error:::pad_kernels", "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stderr == ""
    return json.loads(out.stdout)


def test_import_adds_little_to_torch(probe: dict) -> None:
    # 0.15 s on an idle machine; an accidental import of transformers alone would be several.
    assert probe["seconds"] < 1.5


@pytest.mark.parametrize(
    "package", ["transformers", "triton", "tokenizers", "matplotlib", "numpy", "jinja2", "tqdm"]
)
def test_import_needs_no(package: str, probe: dict) -> None:
    found = [m for m in probe["modules"] if m == package or m.startswith(package + ".")]
    assert not found


@pytest.mark.parametrize("part", ["bench", "demo", "cli"])
def test_import_leaves_out(part: str, probe: dict) -> None:
    assert f"pad_kernels.{part}" not in probe["modules"]


def test_import_does_not_initialise_cuda(probe: dict) -> None:
    assert probe["cuda"] is False


def test_version_agrees_with_the_metadata() -> None:
    assert importlib.metadata.version("pad-kernels") == pad_kernels.__version__


def test_the_changelog_knows_the_version() -> None:
    changelog = pathlib.Path(__file__).parents[1] / "CHANGELOG.md"
    assert re.search(rf"^## {re.escape(pad_kernels.__version__)}\b", changelog.read_text(), re.M)


def test_torch_is_the_only_requirement() -> None:
    required = [r for r in importlib.metadata.requires("pad-kernels") if "extra ==" not in r]
    assert [re.match(r"[\w-]+", r)[0] for r in required] == ["torch"]


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert sorted(pad_kernels.__all__) == sorted(set(pad_kernels.__all__))
    for name in pad_kernels.__all__:
        value = getattr(pad_kernels, name)
        assert name == "__version__" or value.__doc__


def test_works_without_the_extension() -> None:
    """A machine without a compiler: cpp is missing with a reason, everything else is there."""
    code = """
import sys
sys.modules["pad_kernels._C"] = None
import torch, pad_kernels as pk
state = pk.available_backends()
assert state["cpp"] != "available" and len(state["cpp"]) > 10, state
loss = pk.linear_cross_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2]))
assert abs(loss.item() - 2.0794415) < 1e-6
student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
assert abs(pk.listwise_preference_loss(student, teacher, kind="kl").item() - 0.1109) < 1e-4
try:
    pk.linear_cross_entropy(
        torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2]), plan="cpp"
    )
except ValueError as error:
    assert "cpp" in str(error)
else:
    raise AssertionError("a named backend fell back")
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
