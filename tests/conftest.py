"""What every test shares: two threads, one seed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many calls on tiny tensors, which would spend their time waking the other thread up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``calls_of(owner, *names)``: the names of those functions, as they are called from then."""

    def watch(owner: Any, *names: str) -> list[str]:
        calls: list[str] = []

        def spy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls.append(name)
                return original(*arguments)

            return call

        for name in names:
            monkeypatch.setattr(owner, name, spy(name, getattr(owner, name)))
        return calls

    return watch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read of a workspace before it is written is NaN."""
    from pad_kernels.engine.workspace import account

    monkeypatch.setattr(account, "poison", True)


@pytest.fixture(params=["torch", "cpp"])
def listwise_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Listwise losses by the C++ kernels and nothing else, by their torch twin and nothing else."""
    from pad_kernels.backends.registry import native
    from pad_kernels.sequence.listwise_op import forced_backend

    if request.param == "cpp" and native() is None:
        pytest.skip("no compiled module")
    with forced_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands start from: models, prompts, settings."""
    import pipeline_toys

    folder = tmp_path_factory.mktemp("home")
    pipeline_toys.fill(folder)
    return folder


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the current folder."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def multiply_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float16 operands, as on a GPU."""
    from pad_kernels.engine import call

    monkeypatch.setattr(call, "gemm_dtype", lambda dtype, device: dtype)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every plan that an op makes, in their order."""
    from pad_kernels.engine import ops

    found: list[Any] = []
    original = ops.op_plan

    def spy(*arguments: Any, **options: Any) -> Any:
        found.append(original(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(ops, "op_plan", spy)
    return found
