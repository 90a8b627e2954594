"""The checks that ``make gpu-check`` runs on a GPU, a few of them on the CPU.

``PAD_KERNELS_TEST_DEVICE=cuda`` runs the same on that device.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import cuda_on_cpu
import device_large
import device_parity
import parity_cases
import pytest
import torch
from device_large import Large

import pad_kernels as pk
from pad_kernels.bench.cases import OPS

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device(os.environ.get("PAD_KERNELS_TEST_DEVICE", "cpu"))
TESTED = [b for b in device_parity.backends(DEVICE) if b != "reference"]

#: A part of the name of a group, of its checks, and how many checks that makes at least.
FEW = [
    ("/bfloat16/late1/odd", "[every_option]", 4),
    ("/float32/early1/losses", "none_ignored", 4),
    ("/float64/kept0.5/planned", "logprob[minus_infinity]", 1),
    ("/float16/candidates", "[every_option]", 6),
    ("/float16/early1/odd", "[every_option]", 1),
    ("/float16/late1/losses", "all_ignored", 4),
    ("/float32/functionals", "total late", 20),
    ("/numerics", "minus infinity jsd", 3),
    ("/teachers on the CPU", "advantage", 2),
]


@pytest.fixture(autouse=True)
def _own_cases() -> None:
    """Other tests' cached inputs may be of another device."""
    parity_cases.case.cache_clear()


@pytest.mark.parametrize(("group", "only", "least"), FEW, ids=lambda x: str(x))
def test_a_few_checks_of_every_group(group: str, only: str, least: int) -> None:
    """The backends take turns; what each computes is for the tests that these checks call."""
    backend = TESTED[FEW.index((group, only, least)) % len(TESTED)]
    outcome = device_parity.run(backend + group, DEVICE, only)
    assert not outcome.failed
    assert outcome.passed + sum(outcome.refused.values()) >= least


@pytest.mark.parametrize("group", ["early1/odd", "kept0.5/planned"])
def test_a_backend_that_only_a_gpu_has(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are made for whatever backend they are asked for, not only for those of a CPU."""
    monkeypatch.setattr(device_parity, "backends", lambda device: ["cuda"])
    with cuda_on_cpu.in_place_of_a_gpu(cuda_on_cpu.load()):
        outcome = device_parity.run(f"cuda/bfloat16/{group}", DEVICE, "every_option")
    assert outcome.passed and not outcome.failed


@pytest.mark.usefixtures("multiply_float16")
def test_a_device_that_multiplies_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own bound on a flat softmax's gradient, which a CPU's would fail; its own range."""
    monkeypatch.setattr(device_parity, "gemm_dtype", lambda dtype, device: dtype)
    for group, only, count in (("numerics", "flat", 6), ("float16/kept1/odd", "[huge_logits]", 4)):
        outcome = device_parity.run(f"torch_blocked/{group}", DEVICE, only)
        assert outcome.passed == count and not outcome.failed, outcome.failed


def test_losses_over_responses_and_the_reference() -> None:
    outcome = device_parity.run("sequences", DEVICE, "jsd")
    assert not outcome.failed and outcome.passed > 10
    outcome = device_parity.run("reference/float32/None1/odd", DEVICE, "[bias]")
    assert not outcome.failed and outcome.passed == 4


@pytest.mark.parametrize("op", OPS)
def test_the_large_check_in_small(op: str) -> None:
    backend = TESTED[[*OPS].index(op) % len(TESTED)]
    for name, check in device_large._large(op, backend, "bfloat16", DEVICE):
        large = check.args[0]  # type: ignore[attr-defined]
        small = Large(op, large.schedule, backend, "bfloat16", large.whole, (1100, 16, 301))
        figures = device_large.check(small, DEVICE)
        assert figures["workspace_mib"] > 0, name


def test_a_large_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = device_large.call_ours
    monkeypatch.setattr(device_large, "call_ours", lambda *x: right(*x) * 1.05)
    device_large._reference.cache_clear()
    with pytest.raises(AssertionError, match="grad_weight: error"):
        device_large.check(
            Large("cross_entropy", "early", "torch_blocked", "bfloat16", True, (600, 16, 301)),
            DEVICE,
        )


def test_all_of_the_large_ones_are_over_the_limit() -> None:
    for op in OPS:
        for whole in (True, False):
            large = Large(op, "late", "triton", "bfloat16", whole)
            assert large.case.tokens * large.case.vocab > 2**31
            assert large.memory() < 80 << 30


def test_only_on_a_gpu_there_are_large_ones() -> None:
    names = device_large.groups("triton", torch.device("cuda"))
    assert sum("over 2^31" in name for name in names) >= len(OPS)
    assert not any("2^31" in name for name in device_large.groups("triton", torch.device("cpu")))


def test_what_becomes_of_a_check() -> None:
    outcome = device_parity.Outcome()

    def unsupported() -> None:
        raise ValueError("plan: expected a backend that can do this, got 'x', which cannot: why")

    checks: dict[str, Callable[[], object]] = {
        "fine": lambda: None,
        "measures": lambda: {"peak_mib": 1},
        "skips": lambda: pytest.skip("too small"),
        "refuses": unsupported,
        "wrong": lambda: pytest.fail("no", pytrace=False),
        "broken": lambda: {}["absent"],
    }
    for name, check in checks.items():
        outcome.run(name, check)
    assert outcome.passed == 2 and outcome.figures == {"measures": {"peak_mib": 1}}
    assert outcome.refused == {"too small": 1, "why": 1}
    assert set(outcome.failed) == {"wrong", "broken"} and "KeyError" in outcome.failed["broken"]


def test_only_the_tests_own_tensors_go_to_the_device() -> None:
    """What the library allocates without naming a device lies where it would for a user."""
    before = pk.linear_logprob

    def spy(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.empty(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, "linear_logprob", spy)
        with device_parity.on(torch.device("meta")):
            assert torch.empty(1).device.type == "meta"
            assert pk.linear_logprob().device.type == "cpu"  # type: ignore[call-arg]
    assert pk.linear_logprob is before
