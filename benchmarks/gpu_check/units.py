"""What the stages are made of: names of units, the seconds each may take, and how one runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
#: A tool, and the small checks of a backend that it watches: each kernel once or twice. The tools
#: slow a process down ten to a hundred times.
TOOLS = ("memcheck", "racecheck")
WATCHED = {
    "rows": ("{}/bfloat16/early1/odd", "[every_option]"),
    "recompute": ("{}/float16/late1/odd", "logprob[every_option]"),
    "functionals": ("{}/float32/functionals", "total early distill"),
    "filter": ("{}/numerics", "filter early 1.0"),
    "filter_late": ("{}/numerics", "filter late"),
    "sequences": ("sequences", " 4"),
}
#: Most seconds of a group of parity checks, of a watched group, of a benchmark case, of a rate.
#: They are for what hangs: on a fresh machine a group compiles up to 200 kernels, and a case has a
#: dense loss compiled.
PARITY_SECONDS, WATCHED_SECONDS, BENCH_SECONDS, RATE_SECONDS = 300.0, 240.0, 200.0, 80.0


def parity(device: str) -> dict[str, float]:
    """Groups of checks."""
    import device_parity

    return dict.fromkeys(device_parity.groups(torch.device(device)), PARITY_SECONDS)


def gpu_backends(device: str) -> list[str]:
    """Backends with kernels of their own for the device."""
    from pad_kernels.backends.choice import PREFERRED, available_backends

    there = available_backends()
    return [b for b in PREFERRED[torch.device(device).type] if there[b] == "available"]


def sanitize(device: str) -> dict[str, float]:
    """A tool, a backend and a watched group; the losses over responses are of no backend."""
    found = {}
    for group in WATCHED:
        for backend in ["any"] if group == "sequences" else gpu_backends(device):
            for tool in TOOLS:
                found[f"{tool}/{backend}/{group}"] = WATCHED_SECONDS
    return found


def bench(device: str) -> dict[str, float]:
    """Rates of the device, row passes, listwise losses, the gradient filter, then the cases."""
    from pad_kernels.bench.cases import make_cases, make_gpu_cases
    from pad_kernels.bench.device_rates import LISTWISE

    found = {"rates": RATE_SECONDS}
    for kind, responses in LISTWISE:
        found[f"listwise/{kind}/{responses}"] = RATE_SECONDS
    for backend in gpu_backends(device):
        for dtype in ("bfloat16", "float32"):
            found[f"rows/{backend}/{dtype}"] = RATE_SECONDS
    for context in (1, 2, 3) if device.startswith("cuda") else (1,):
        found[f"filter/8192x4096x128256/{context}"] = BENCH_SECONDS
    small = make_cases(["cross_entropy", "forward_kl"], ((24, 16, 300),), ["bfloat16"])
    cases = make_gpu_cases() if device.startswith("cuda") else small
    return found | {case.name: BENCH_SECONDS for case in cases}


def run(stage: str, unit: str, device: str) -> Record:
    """Run one unit in this process."""
    return {"parity": _parity, "sanitize": _sanitize, "bench": _bench}[stage](unit, device)


def _parity(unit: str, device: str) -> Record:
    import device_parity

    outcome = device_parity.run(unit, torch.device(device))
    return {
        "status": "failed" if outcome.failed else "ok",
        "passed": outcome.passed,
        "refused": dict(outcome.refused),
        "failed": dict(list(outcome.failed.items())[:20]),
        "failures": len(outcome.failed),
        "figures": outcome.figures,
    }


def sanitizer() -> str | None:
    """The tool's path, on the PATH or where CUDA keeps it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def _sanitize(unit: str, device: str) -> Record:
    tool, backend, group = unit.split("/")
    program = sanitizer()
    if program is None:
        return {"status": "missing", "reason": "compute-sanitizer is not installed"}
    name, only = WATCHED[group]
    code = (
        "import sys, torch, device_parity as d\n"
        "o = d.run(sys.argv[1], torch.device(sys.argv[2]), sys.argv[3])\n"
        "print('checks passed:', o.passed, 'failed:', len(o.failed))\n"
        "sys.exit(0 if o.passed else 3)"
    )
    command = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "5"]
    command += [sys.executable, "-c", code, name.format(backend), device, only]
    # Each tensor is an allocation of its own: what lies beyond it belongs to nobody.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    text = process.stdout
    summary = [line for line in text.splitlines() if "SUMMARY" in line or "checks passed" in line]
    record = {"exit": process.returncode, "summary": summary}
    # A tool that cannot attach says so and runs nothing: that is no result of ours.
    if "Device not supported" in text or "SUMMARY:" not in text:
        return record | {"status": "unusable", "reason": text[-600:]}
    if process.returncode:
        return record | {"status": "failed", "reason": text[-3000:]}
    return record | {"status": "ok"}


def _bench(unit: str, device: str) -> Record:
    from pad_kernels.bench import device_rates as rates
    from pad_kernels.bench import peaked
    from pad_kernels.bench.cases import Case
    from pad_kernels.bench.implementations import all_implementations
    from pad_kernels.bench.measure import measure

    where, kind, *rest = torch.device(device), *unit.split("/")
    trial = where.type != "cuda"
    if kind == "rates":
        edge, nbytes = (128, 1 << 20) if trial else (rates.PRODUCT, rates.COPY)
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        found = {str(d)[6:]: rates.product_rate(where, d, edge) for d in dtypes}
        return {"status": "ok", "product": found, "copy": rates.copy_rate(where, nbytes)}
    if kind == "listwise":
        name, responses = rest[0], 3 if trial else int(rest[1])
        return {"status": "ok"} | rates.listwise(name, responses, where)
    if kind == "filter":
        tokens, hidden, vocab = (int(n) for n in rest[0].split("x"))
        size = (40, 16, 300) if trial else (tokens, hidden, vocab)
        return {"status": "ok", "filter": peaked.benchmark(size, float(rest[1]), where)}
    if kind == "rows":
        shape = (16, 500) if trial else rates.LOGITS
        passes = rates.row_passes(rest[0], where, getattr(torch, rest[1]), shape)
        return {"status": "ok", "rates": passes}
    numbers = [int(n) for n in rest[0].split("x")]
    case = Case(kind, numbers[0], numbers[1], numbers[2], rest[1])
    wanted = [i for i in all_implementations(where.type) if i.op == kind]
    if trial:
        wanted = [i for i in wanted if not i.compiled]
    record = measure(case, wanted, 2 if trial else 10, where, everything=True)
    return {"status": "ok", "case": record}
