"""The parity product on any device, in groups that can be run one at a time.

The checks are those of the other test files. Here they get tensors of a device, the backends that
it has, and names, so that a group can be asked for, timed and skipped once it is done. What only a
device needs is added: more than 2³¹ logits in one op, and teachers that live on the CPU.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import device_capture
import device_large
import filter_cases
import functional_cases
import parity_cases
import pytest
import test_distill
import test_divergence
import test_half_precision
import test_listwise
import test_parity
import test_parity_candidates
import test_sequence_rewards
import torch
from parity_cases import Route

import pad_kernels as pk
from pad_kernels._dtypes import gemm_dtype
from pad_kernels.engine.call import Call
from pad_kernels.engine.workspace import account

#: Most trusted last: a time limit should cut off what is least likely to be wrong.
BACKENDS = ("triton", "cuda", "cpp", "torch_blocked", "reference")
DTYPES = {str(d)[6:]: d for d in (torch.bfloat16, torch.float32, torch.float16, torch.float64)}
_OPS = ("linear_logprob", "linear_token_stats", "linear_cross_entropy", "linear_topk")
_OPS += ("option_logprobs", "linear_divergence", "linear_expected_advantage", "linear_distill")

Check = Callable[[], object]


@dataclass
class Outcome:
    """What became of a group's checks: how many passed, why others did not run, what failed."""

    passed: int = 0
    refused: dict[str, int] = field(default_factory=collections.Counter)
    failed: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, check: Check) -> None:
        """Run one check. A backend that says it cannot is no failure, but is counted by reason."""
        try:
            found = check()
        except pytest.skip.Exception as skipped:
            self.refused[str(skipped)] += 1
        except (Exception, pytest.fail.Exception) as error:
            reason = str(error).split("which cannot: ")
            if isinstance(error, ValueError) and len(reason) == 2:
                self.refused[reason[1]] += 1
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"
            self.failed[name] = " ".join(text.split())[:500]
        else:
            self.passed += 1
            if isinstance(found, dict):
                self.figures[name] = found


def backends(device: torch.device) -> list[str]:
    """Those that are there, and that take tensors of the device."""
    there = pk.available_backends()
    elsewhere = "cpp" if device.type != "cpu" else ""
    return [b for b in BACKENDS if there.get(b) == "available" and b != elsewhere]


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with torch's usual default device: only the tests' tensors go elsewhere."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Tensors that tests make lie on the device; what the library allocates is up to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _OPS:
            patch.setattr(pk, name, _plain(getattr(pk, name)))
        for name in ("tokens", "total"):
            patch.setattr(Call, name, _plain(getattr(Call, name)))
        for module, name in (
            (test_listwise, "listwise_preference_loss"),
            (test_sequence_rewards, "linear_preference_loss"),
            (test_sequence_rewards, "listwise_preference_loss"),
        ):
            patch.setattr(module, name, _plain(getattr(module, name)))
        patch.setattr(account, "poison", True)
        with torch.device(device):
            yield


# --- groups ---


def _routes(backend: str) -> list[Route]:
    if backend == "reference":
        return [Route(backend, None, odd=False)]
    kinds = (("late", 1.0), ("early", 1.0), ("kept", 1.0), ("kept", 0.5))
    return [Route(backend, s, kept, odd) for odd in (True, False) for s, kept in kinds]


def _one_head(route: Route, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    """Every op of one head on every awkward input."""
    tests: list[Callable[..., None]] = [test_parity.test_cross_entropy]
    if route.schedule != "early":
        tests += [test_parity.test_logprob, test_parity.test_token_stats]
        if route.odd or route.schedule is None:
            tests.append(test_parity.test_cross_entropy_per_token)
    for test in tests:
        for name in parity_cases.NAMES:
            yield f"{test.__name__}[{name}]", functools.partial(test, route, dtype, name)


def _losses(route: Route, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    names = ("every_option", "all_ignored", "none_ignored")
    losses = [n for n in test_parity.LOSSES if n != "none_weighted"]
    for name, loss in itertools.product(names, losses):
        yield (
            f"{loss}[{name}]",
            functools.partial(test_parity.test_every_loss, route, dtype, name, loss),
        )


def _candidates(backend: str, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    for name in test_parity_candidates.CASES:
        routes = (r for r in _routes(backend) if r.schedule != "early")
        for route in (r for r in routes if r.odd or r.schedule is None):
            for shared in (True, False):
                yield (
                    f"options-{route}-{shared}[{name}]",
                    functools.partial(
                        test_parity_candidates.test_option_logprobs, route, shared, dtype, name
                    ),
                )
        if backend == "reference":  # it has no top-k
            continue
        for k, block in itertools.product((1, 5, 150, None), (97, None)):
            plan = pk.PlanRequest(None, backend, vocab_block=block)
            yield (
                f"top-{k}-{block}[{name}]",
                functools.partial(test_parity_candidates.test_topk, k, plan, dtype, name),
            )


def _functionals(backend: str, dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    """Every functional of the registry, and mixtures of them."""
    tokens = functional_cases.TOKENS
    settings = (("early", None), ("late", None), ("kept", tokens), ("kept", 6))
    plans = [pk.PlanRequest(s, backend, None, 0.0, 5, 71, kept) for s, kept in settings]
    if backend == "reference":
        plans = [pk.PlanRequest(None, backend)]
    sets = {str(f): (f,) for f in functional_cases.EXAMPLES} | functional_cases.MIXTURES
    for plan, (name, functionals) in itertools.product(plans, sets.items()):
        label = f"{plan.schedule}{plan.kept_rows or ''} {name}"
        if plan.schedule != "early":
            yield (
                f"tokens {label}",
                functools.partial(functional_cases.check_tokens, functionals, dtype, plan),
            )
        yield (
            f"total {label}",
            functools.partial(functional_cases.check_total, functionals, dtype, plan),
        )


def _numerics(backend: str, device: torch.device) -> Iterator[tuple[str, Check]]:
    """Divergences that nearly vanish, infinities, flat softmaxes, many chunks, the filter."""
    kinds, module = test_divergence.KINDS, test_divergence
    # Roundings that a flat softmax's gradient may lose: see the two tests of it.
    lost = 4.0 if gemm_dtype(torch.float16, device.type) == torch.float16 else 1.5
    for kind in kinds:
        for spread in (0.3, 1.0, 4.0):
            yield (
                f"tiny {kind} {spread}",
                functools.partial(
                    module.test_tiny_divergences_are_right_to_a_tenth, kind, backend, spread
                ),
            )
        for reduction in ("mean", "sum", "none"):
            yield (
                f"minus infinity {kind} {reduction}",
                functools.partial(module.test_minus_infinity, kind, backend, reduction),
            )
    yield "tiny bfloat16", functools.partial(module.test_tiny_divergences_in_bfloat16, backend)
    yield "overflow", functools.partial(module.test_products_that_overflow, backend)
    half = test_half_precision
    for schedule in ("early", "late", "kept"):
        for kind in ("forward_kl", "jsd"):
            yield (
                f"mixture {kind} {schedule}",
                functools.partial(
                    test_distill.test_a_mixture_is_the_sum_of_its_parts, kind, schedule, backend
                ),
            )
        for scale in (1.0, 65536.0):
            yield (
                f"flat {schedule} {scale}",
                functools.partial(
                    half.test_a_flat_softmax_keeps_its_gradients, scale, schedule, backend, lost
                ),
            )
        for chunks in (half.CHUNKS, half.HALF_BLOCKS):
            yield (
                f"{chunks} chunks {schedule}",
                functools.partial(half.test_bfloat16_in_chunks, schedule, chunks, backend),
            )
        if backend == "triton" and schedule != "kept":
            for biased in (False, True):
                for dtype in (torch.bfloat16, torch.float16):
                    yield (
                        f"filter {schedule} tiles {biased} {dtype}",
                        functools.partial(
                            filter_cases.check_schedule, schedule, backend, biased, dtype
                        ),
                    )
        for scale in (1.0, 100.0):
            yield (
                f"filter {schedule} {scale}",
                functools.partial(
                    half.test_the_filter_keeps_its_bound, scale, torch.float32, schedule, backend
                ),
            )


def _sequences() -> Iterator[tuple[str, Check]]:
    """The losses over whole responses, on whatever the library picks for the device."""
    for kind, n in itertools.product(test_listwise.KINDS, range(2, 7)):
        yield (
            f"listwise {kind} {n}",
            functools.partial(test_listwise.test_enumeration, kind, n, None),
        )
    for kind, n in itertools.product(("jsd", "jsd_released"), (7, 8)):
        yield (
            f"all rankings {kind} {n}",
            functools.partial(test_listwise.test_all_rankings_at_the_limit, kind, n, None),
        )
    for kind in test_listwise.KINDS:
        yield (
            f"valid {kind}",
            functools.partial(test_listwise.test_valid_is_leaving_responses_out, kind, None),
        )
    for normalize in ("length", "none"):
        yield (
            f"packed {normalize}",
            functools.partial(
                test_sequence_rewards.test_packed_is_padded_without_the_padding,
                normalize,
                torch.int32,
            ),
        )
    for options in ({}, {"kind": "kl", "normalize": "none"}, {"softcap": 2.0, "reduction": "sum"}):
        yield (
            f"preference {options}",
            functools.partial(
                test_sequence_rewards.test_preference_loss_from_hidden_states, options
            ),
        )


Group = Callable[[], Iterator[tuple[str, Check]]]


def groups(device: torch.device) -> dict[str, Group]:
    """Every group by name, what matters most first."""
    found: dict[str, Group] = {"sequences": _sequences}
    for backend in backends(device):
        for kind, dtype in DTYPES.items():
            for route in (r for r in _routes(backend) if r.odd or r.schedule is None):
                key = f"{backend}/{kind}/{route.schedule}{route.kept:g}"
                found[f"{key}/odd"] = functools.partial(_one_head, route, dtype)
                found[f"{key}/losses"] = functools.partial(_losses, route, dtype)
            found[f"{backend}/{kind}/candidates"] = functools.partial(_candidates, backend, dtype)
            found[f"{backend}/{kind}/functionals"] = functools.partial(_functionals, backend, dtype)
        if backend != "reference":
            found[f"{backend}/numerics"] = functools.partial(_numerics, backend, device)
            if device.type == "cuda":
                found |= device_capture.groups(backend, device)
            found |= device_large.groups(backend, device)
        for kind, dtype in DTYPES.items():
            for route in (r for r in _routes(backend) if not r.odd and r.schedule):
                key = f"{backend}/{kind}/{route.schedule}{route.kept:g}/planned"
                found[key] = functools.partial(_one_head, route, dtype)
    return found


def run(key: str, device: torch.device, only: str = "") -> Outcome:
    """Run a group: the checks with ``only`` in their name."""
    outcome = Outcome()
    group = groups(device)[key]
    with on(device):
        for name, check in group():
            if only in name:
                torch.manual_seed(0)
                outcome.run(name, check)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return outcome
