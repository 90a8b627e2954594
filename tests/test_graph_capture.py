"""What a CUDA graph's capture forbids, looked for on the CPU: whatever waits for the device.

Reading a number on the host, sizes that depend on values, tensors made from Python's numbers (they
are copied over from pageable memory). The op bodies run as plain functions, as if captured. Not
seen: ``tolist`` and ``numpy``, which read a CPU's memory without an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import device_capture
import pytest
import torch
from cpu_backends import BACKENDS
from engine_probe import Probe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pad_kernels as pk
from pad_kernels.bench.cases import OPS
from pad_kernels.engine import candidates, rows

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 6, 16, 37
aten = torch.ops.aten
FORBIDDEN = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2),
    *(aten.unique_dim, aten.lift_fresh, aten.equal, aten.is_nonzero, aten.repeat_interleave),
}


class Captured(TorchDispatchMode):
    """Raises where a capture would."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func.overloadpacket
        chosen = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
        masks = [x for x in chosen if x is not None and x.dtype == torch.bool]
        assert packet not in FORBIDDEN and not masks, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    for module in (rows, candidates):
        monkeypatch.setattr(module, "capturing", lambda *_: True)
    return Probe.install(monkeypatch)


def _labels() -> Tensor:
    labels = torch.arange(N)
    labels[2] = -100
    return labels


LABELS, WEIGHTS = _labels(), torch.linspace(0, 1, N)
BUCKETS = pk.TopKTeacher(torch.arange(3).expand(N, 3), torch.full((N, 3), -2.0), "bucket")
CHOSEN = pk.TopKAdvantage(torch.arange(3).expand(N, 3), torch.linspace(-1, 1, 3).expand(N, 3))

Step = Callable[[pk.Head, pk.Head, pk.Head, Any], object]
TOTALS: dict[str, Step] = {
    "cross_entropy": lambda s, t, r, plan: pk.linear_cross_entropy(
        *(s.hidden, s.weight, LABELS),
        label_smoothing=0.1,
        z_loss=0.01,
        token_weights=WEIGHTS,
        plan=plan,
    ),
    "shifted": lambda s, t, r, plan: pk.linear_cross_entropy(
        s.hidden[None], s.weight, LABELS[None], shift=True, plan=plan
    ),
    **{
        kind: lambda s, t, r, plan, kind=kind: pk.linear_divergence(  # type: ignore[misc]
            s, t, kind=kind, labels=LABELS, plan=plan
        )
        for kind in ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl")
    },
    "bucket": lambda s, t, r, plan: pk.linear_divergence(s, BUCKETS, labels=LABELS, plan=plan),
    "advantage": lambda s, t, r, plan: pk.linear_expected_advantage(
        s, t, r, labels=LABELS, plan=plan
    ),
    "offline advantage": lambda s, t, r, plan: pk.linear_expected_advantage(
        s, CHOSEN, labels=LABELS, plan=plan
    ),
    "distill": lambda s, t, r, plan: pk.linear_distill(
        *(s, LABELS),
        teacher=t,
        aligned=t,
        reference=r,
        ce_weight=WEIGHTS,
        divergence_weight=0.5,
        advantage_weight=WEIGHTS,
        plan=plan,
    ),
}
TOKENS: dict[str, Step] = {
    "cross_entropy none": lambda s, t, r, plan: pk.linear_cross_entropy(
        *(s.hidden, s.weight, LABELS), label_smoothing=0.1, reduction="none", plan=plan
    ),
    "logprob": lambda s, t, r, plan: pk.linear_logprob(s.hidden, s.weight, LABELS, plan=plan),
    "stats": lambda s, t, r, plan: pk.linear_token_stats(s.hidden, s.weight, LABELS, plan=plan),
    "options": lambda s, t, r, plan: pk.option_logprobs(s.hidden, s.weight, LABELS[:2], plan=plan),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["early", "late", "kept"])
@pytest.mark.parametrize("name", [*TOTALS, *TOKENS])
def test_nothing_waits_for_the_device(probe: Probe, name: str, schedule: str, backend: str) -> None:
    if schedule == "early" and name in TOKENS:
        schedule = "late"
    widths = (H, H + 8, H)
    student, teacher, reference = (pk.Head(torch.randn(N, h), torch.randn(V, h)) for h in widths)
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    plan = pk.PlanRequest(schedule, backend)
    with Captured():
        (TOTALS | TOKENS)[name](student, teacher, reference, plan)
        values = probe.outputs[0]
        probe.backward(torch.ones_like(values) if name in TOKENS else torch.ones(()))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x * torch.tensor([2.0]),
        lambda x: x.unique(),
    ],
)
def test_what_waits_is_seen(wrong: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), Captured():
        wrong(torch.arange(3.0))


@pytest.mark.parametrize("op", [*OPS, "smoothed", "preference"])
def test_the_checks_of_a_device(op: str) -> None:
    backend = BACKENDS[[*OPS, "smoothed", "preference"].index(op) % len(BACKENDS)]
    for name, check in device_capture.groups(backend, torch.device("cpu"))[f"{backend}/capture"]():
        if name.startswith(f"{op} "):
            check()
