"""Gate, time and weigh one case; :mod:`pad_kernels.bench.runner` decides which."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pad_kernels.bench import gate, memory, timing
from pad_kernels.bench.cases import OPS, Case, Inputs, make_inputs
from pad_kernels.bench.implementations import Function, Implementation, Unavailable, step

IGNORED_SHARE = 0.8
Row = dict[str, Any]


def _runner(
    function: Function, case: Case, inputs: Inputs, values: list[Tensor] | None = None
) -> Callable[[], None]:
    """One step as a thunk; it leaves the value in ``values``."""

    def action() -> None:
        value = step(function, case, inputs)
        if values is not None:
            values.append(value)

    return action


def _row(implementation: Implementation, status: str = "ok", reason: str = "") -> Row:
    return {
        "implementation": implementation.name,
        "ours": implementation.ours,
        "note": implementation.note,
        "status": status,
        "reason": " ".join(reason.split()),
        "peak_mib": None,
    }


def _admit(
    implementation: Implementation, case: Case, inputs: Inputs, reference: gate.Reference
) -> tuple[Function, dict[str, float], float]:
    """Build, run once, return the function, its errors and the seconds; raises what goes wrong."""
    function = implementation.build(case)
    inputs.clear()
    values: list[Tensor] = []
    action = _runner(function, case, inputs, values)
    seconds = timing.clock(action, inputs.hidden.device)
    errors = reference.errors(gate.outputs_of(values[0], inputs))
    inputs.clear()
    return function, errors, seconds


def _gate(
    implementations: list[Implementation], case: Case, inputs: Inputs, everything: bool
) -> tuple[dict[str, Function], list[Row]]:
    """Pass every implementation through the accuracy gate; rows for all of them, in order."""
    from pad_kernels.bench.peers import dense

    reference = gate.oracle(case, inputs)
    baseline = Implementation("dense", case.op, dense)
    allowed = gate.bounds(case, reference, _admit(baseline, case, inputs, reference)[1])
    functions: dict[str, Function] = {}
    rows = []
    for implementation in implementations:
        if case.work > implementation.largest and not everything:
            rows.append(
                _row(implementation, "skipped", "takes minutes at this size; --all runs it")
            )
            continue
        try:
            function, errors, seconds = _admit(implementation, case, inputs, reference)
        except Unavailable as error:
            rows.append(_row(implementation, "missing", str(error)))
            continue
        except Exception as error:  # a peer may fail in any way; the table says how
            text = f"{type(error).__name__}: {error}"[:300]
            rows.append(_row(implementation, "failed", text))
            if inputs.hidden.is_cuda:
                torch.cuda.empty_cache()  # what ran out of memory leaves it in pieces
            continue
        reasons = gate.failures(errors, allowed)
        row = _row(implementation, "inaccurate" if reasons else "ok", "; ".join(reasons))
        row |= {"errors": errors, "allowed": allowed, "gate_ms": 1e3 * seconds}
        rows.append(row)
        if not reasons:
            functions[implementation.name] = function
    return functions, rows


def _drop_hopeless(
    steps: dict[str, Callable[[], None]], rows: list[Row], inputs: Inputs, floor_ms: float
) -> None:
    """Take what is far too slow out of the rounds: a second step is all the time it gets."""
    for row in rows:
        name = row["implementation"]
        limit = max(timing.HOPELESS * floor_ms, 1e3 * timing.SECONDS)
        if name not in steps or row["gate_ms"] < limit:
            continue
        inputs.clear()
        spent = 1e3 * timing.clock(steps[name], inputs.hidden.device)
        if spent < limit:  # it was the first step that took so long: compiling, for instance
            continue
        del steps[name]
        ratio = spent / floor_ms
        row |= {"time_ms": spent, "ratio": ratio, "rounds": 0}
        row |= {"ratio_low": ratio, "ratio_high": ratio, "own_ratio": ratio}


def measure(
    case: Case,
    implementations: list[Implementation],
    repeats: int,
    device: torch.device,
    everything: bool = False,
) -> dict[str, Any]:
    """Gate and time one case; on a CPU memory is filled in later.

    Args:
        case: what to measure.
        implementations: those of its operation.
        repeats: timed rounds.
        device: where the tensors live.
        everything: also run what takes minutes.

    Returns:
        A JSON-able record: the case, the floor in ms by GEMM count, one row per implementation.
        Peak memory is in it on a GPU alone, where it takes no process of its own.
    """
    op = OPS[case.op]
    inputs = make_inputs(case, device)
    floor = timing.Floor(case, inputs)
    first_floor = floor.round(device)
    functions, rows = _gate(implementations, case, inputs, everything)
    steps = {name: _runner(function, case, inputs) for name, function in functions.items()}
    _drop_hopeless(steps, rows, inputs, 1e3 * first_floor.of(op.gemms))
    measured = timing.time_rounds(steps, floor, inputs, repeats, op.gemms)
    if device.type == "cuda":
        del floor  # a whole N×V buffer
        for row in rows:
            if row["implementation"] in steps:
                row["peak_mib"] = memory.device_peak(steps[row["implementation"]], case, inputs)
    gemms = {i.name: max(i.gemms, op.gemms) for i in implementations}
    for row in rows:
        name = row["implementation"]
        row |= {"gemms": op.gemms, "own_gemms": gemms[name]}
        if name in steps:
            row |= measured.summary(name, op.gemms, gemms[name])
    shape = {"tokens": case.tokens, "hidden": case.hidden, "vocab": case.vocab}
    floors = {
        str(g): 1e3 * measured.floor(g).median for g in sorted({2, 6, op.gemms, *gemms.values()})
    }
    return {
        "name": case.name,
        "op": case.op,
        "dtype": case.dtype,
        **shape,
        "floor_ms": floors,
        "rows": rows,
    }


def fill_memory(case: Case, record: dict[str, Any], device: str, threads: int) -> None:
    """Measure peak memory of every implementation that was timed, two processes at a time."""
    rows = [row for row in record["rows"] if row.get("rounds")]
    for start in range(0, len(rows), 2):
        pair = rows[start : start + 2]
        children = [memory.start(case, r["implementation"], device, threads) for r in pair]
        for row, child in zip(pair, children, strict=True):
            row["peak_mib"] = memory.finish(child)


def measure_ignored(
    case: Case, implementations: list[Implementation], repeats: int, device: torch.device
) -> list[Row]:
    """Time with 80 % of the rows ignored, as a share of the time with none, in the same rounds."""
    full, sparse = (make_inputs(replace(case, ignored=i), device) for i in (0.0, IGNORED_SHARE))
    rows = []
    for implementation in implementations:
        try:
            function = implementation.build(case)
            pair = [_runner(function, case, inputs) for inputs in (full, sparse)]
            seconds: tuple[list[float], list[float]] = ([], [])
            for index in range(repeats + 1):
                for inputs, action, into in zip((full, sparse), pair, seconds, strict=True):
                    inputs.clear()
                    spent = timing.clock(action, device)
                    if index:  # the first one warms up
                        into.append(spent)
        except Exception as error:  # as above: the table says how
            print(f"  {implementation.name}: {error}", file=sys.stderr)
            continue
        share = timing.Spread.of([b / a for a, b in zip(*seconds, strict=True)])
        rows.append(
            {
                "implementation": implementation.name,
                "case": case.name,
                "ignored": IGNORED_SHARE,
                "share": share.median,
                "share_low": share.low,
                "share_high": share.high,
            }
        )
    return rows
