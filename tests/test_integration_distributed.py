"""DDP and FSDP over processes: the gradients are those of one process with dense logits."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import integration_ranks as ranks
import tiny_models as tiny

from pad_kernels.integrations.transformers.head import causal_lm, head_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[str, Any]:
    """What the first of some processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    world, context = request.param, multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=ranks.run, args=(rank, world, str(folder))) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    result: dict[str, Any] = torch.load(folder / f"found{world}.pt", weights_only=False)
    return result


def dense(inputs: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """The loss that the processes share, of the whole batch, from the model's own logits."""
    labels, hidden = tiny.labels_of(inputs), []

    def loss_of(model: nn.Module) -> Tensor:
        head = head_module(causal_lm(model))
        handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        logits = model(**inputs).logits
        handle.remove()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss + 0.1 * hidden.pop().square().mean()

    return loss_of


@pytest.mark.parametrize("case", ranks.CASES)
def test_steps_are_those_of_one_process(case: str, found: dict[str, Any]) -> None:
    expected = ranks.steps(ranks.model_of(case), dense(ranks.share(0, 1)))
    assert found[case].keys() == expected.keys()
    for name, value in expected.items():
        assert (found[case][name] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


def test_fsdp_in_half_precision(found: dict[str, Any]) -> None:
    """The head arrives as the model computes, its gradient as the parameter is kept."""
    assert found["half"] == {
        "seen": [("torch.bfloat16", "torch.bfloat16")],
        "gradient": "torch.float32",
        "outside": "DTensor",
    }
