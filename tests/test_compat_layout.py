"""The adapters' module trees: where existing code looks for names, it finds them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pad_kernels.compat import cut_cross_entropy, liger
from pad_kernels.compat.cut_cross_entropy import linear_cross_entropy

#: package -> what stands in for it
STAND_INS = {"cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger}

LOSSES = ("cpo", "dpo", "jsd", "kto", "orpo", "simpo")
CLASSES = {"cpo": "CPO", "dpo": "DPO", "jsd": "JSD", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO"}

#: module below liger_kernel -> names
_LIGER = {
    "chunked_loss": [f"LigerFusedLinear{CLASSES[x]}Loss" for x in LOSSES],
    "chunked_loss.functional": [f"liger_fused_linear_{x}" for x in LOSSES],
    "transformers": ["LigerFusedLinearCrossEntropyLoss", "LigerFusedLinearJSD"],
    "transformers.functional": [
        "CrossEntropyOutput",
        "liger_fused_linear_cross_entropy",
        "liger_fused_linear_jsd",
    ],
    "transformers.fused_linear_cross_entropy": ["LigerFusedLinearCrossEntropyLoss"],
    "transformers.fused_linear_jsd": ["LigerFusedLinearJSD"],
    "ops": ["LigerFusedLinearCrossEntropyFunction", "LigerFusedLinearJSDFunction"],
    "utils": ["infer_device", "is_npu_available"],
} | {
    f"chunked_loss.{x}_loss": [
        f"LigerFusedLinear{CLASSES[x]}Function",
        f"LigerFusedLinear{CLASSES[x]}Loss",
    ]
    for x in LOSSES
}

#: module of another package -> names
NAMES = {f"liger_kernel.{module}": names for module, names in _LIGER.items()} | {
    "cut_cross_entropy": ["LinearCrossEntropy", "LinearCrossEntropyImpl", "linear_cross_entropy"],
    "cut_cross_entropy.constants": ["IGNORE_INDEX"],
    "cut_cross_entropy.utils": ["compute_z_loss", "softcapping"],
}


@pytest.fixture
def swapped() -> Iterator[None]:
    """The other packages are ours for a while, as the documentation has it."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_swapped(name)}
    sys.modules.update(STAND_INS)
    yield
    for name in list(sys.modules):
        if _is_swapped(name):
            del sys.modules[name]
    sys.modules.update(kept)


def _is_swapped(name: str) -> bool:
    return name.split(".")[0] in STAND_INS


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    package, dot, below = module.partition(".")
    found = importlib.import_module(STAND_INS[package].__name__ + dot + below)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize("module", NAMES)
def test_whole_package_swapped(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


@pytest.mark.usefixtures("swapped")
def test_swapped_package_works() -> None:
    functional = importlib.import_module("liger_kernel.chunked_loss.functional")
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4)
    loss, _ = functional.liger_fused_linear_cpo(hidden, weight, torch.zeros(2, 3).long())
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_modules_keep_their_settings_as_attributes() -> None:
    """Trainers read and change them, so that they count at the time of the call."""
    module = liger.LigerFusedLinearCPOLoss(beta=0.5)
    hidden, weight = torch.randn(2, 3, 4), torch.randn(9, 4)
    target = torch.randint(9, (2, 3))
    before, _ = module(weight, hidden, target)
    module.beta = 2.0
    after, _ = module(weight, hidden, target)
    assert after == liger.LigerFusedLinearCPOLoss(beta=2.0)(weight, hidden, target)[0] != before


def _dpo(hidden: Tensor, weight: Tensor) -> Tensor:
    target = torch.arange(20).reshape(4, 5)
    module = liger.LigerFusedLinearDPOLoss(compute_nll_loss=True)
    return module(weight, hidden, target, None, hidden.detach() * 2, weight.detach())[0]


def _kto(hidden: Tensor, weight: Tensor) -> Tensor:
    target, good = torch.arange(20).reshape(4, 5), torch.arange(4) < 2
    loss, metrics = liger.LigerFusedLinearKTOLoss()(hidden, weight, target, None, good)
    return loss + metrics[2]


def _jsd(hidden: Tensor, weight: Tensor) -> Tensor:
    rows, labels = hidden.reshape(20, -1), torch.arange(20)
    return liger.LigerFusedLinearJSDLoss(temperature=2.0)(
        rows, weight, rows.detach(), 2 * weight.detach(), labels
    )


def _cce(hidden: Tensor, weight: Tensor) -> Tensor:
    targets = torch.arange(20).reshape(4, 5)
    return linear_cross_entropy(hidden, weight, targets, shift=True, return_lse=True)[0]


@pytest.mark.parametrize("call", [_dpo, _kto, _jsd, _cce])
def test_compiles_in_one_graph(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    results = []
    hidden, weight = torch.randn(4, 5, 8), torch.randn(23, 8)
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[1], results[0])
