"""What a run leaves behind: a table, a JSON file and plots."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pad_kernels._version import __version__
from pad_kernels.bench.cases import OPS

Row = dict[str, Any]
PACKAGES = ("liger-kernel", "cut-cross-entropy", "triton", "numpy")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown"
    )


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with a + where files have changed."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "pad_kernels", "csrc"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def metadata(device: torch.device, threads: int) -> dict[str, Any]:
    """Machine, versions, commit, date and command of a run."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"pad_kernels": __version__, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["pad-kernels", "bench", *(a for a in sys.argv[1:] if a != "bench")]),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [row["implementation"], row["status"] + ": " + row["reason"], "", "", "", ""]
    spread = f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}" if row["rounds"] else "one step"
    own = f"{row['own_ratio']:.2f}" if row["own_gemms"] != row["gemms"] else ""
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    time = f"{row['time_ms']:.0f}" if row["time_ms"] >= 100 else f"{row['time_ms']:.1f}"
    return [row["implementation"], time, f"{row['ratio']:.2f}", spread, own, peak]


def table(case: dict[str, Any]) -> str:
    """One case as text: time, its ratio to the GEMM floor with quartiles, peak memory."""
    gemms = OPS[case["op"]].gemms
    own = "÷ own" if OPS[case["op"]].backward else ""
    header = ["implementation", "ms", f"÷ {gemms}NHV", "quartiles", own, "MiB"]
    rows = [_cells(row) for row in case["rows"]]
    measured = [row for row in rows if row[2]]
    widths = [max(len(r[i]) for r in [header, *measured]) for i in range(len(header))]
    widths[0] = max(len(r[0]) for r in [header, *rows])
    floor = f"floor {case['floor_ms'][str(gemms)]:.1f} ms"
    lines = [f"{case['name']}: {OPS[case['op']].text}; {floor}"]
    for cells in [header, *rows]:
        if cells in measured or cells is header:
            pairs = zip(cells[1:], widths[1:], strict=True)
            rest = "  ".join(f"{cell:>{width}}" for cell, width in pairs)
        else:
            rest = cells[1]
        lines.append(f"  {cells[0]:<{widths[0]}}  {rest}".rstrip())
    return "\n".join(lines)


def _ratio(row: Row) -> str:
    if row["status"] != "ok":
        return str(row["status"])
    own = f" ({row['own_ratio']:.2f})" if row["own_gemms"] != row["gemms"] else ""
    return f"{row['ratio']:.2f}{own}"


def _markdown_table(op: str, selected: list[dict[str, Any]]) -> list[str]:
    names = [row["implementation"] for row in selected[0]["rows"]]
    heads = [case["name"].split("/", 1)[1].replace("x", "×").replace("/", " ") for case in selected]
    weighed = [c for c in selected if any(r["peak_mib"] is not None for r in c["rows"])]
    memory_heads = [f"MiB, {case['dtype']}" for case in weighed]
    header = ["implementation", *heads, *memory_heads]
    lines = [f"{OPS[op].text[0].upper()}{OPS[op].text[1:]}, ÷ {OPS[op].gemms}·N·H·V floor:", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for name in names:
        cells = [name]
        for case in selected:
            row = next((r for r in case["rows"] if r["implementation"] == name), None)
            cells.append("" if row is None else _ratio(row))
        for case in weighed:
            row = next((r for r in case["rows"] if r["implementation"] == name), None)
            peak = None if row is None else row["peak_mib"]
            cells.append("" if peak is None else f"{peak:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    rows = [row for case in selected for row in case["rows"] if row["status"] != "ok"]
    # One reason each: that of the first case in which it occurs.
    why = {(r["implementation"], r["status"]): r["reason"] for r in reversed(rows)}
    notes = [f"{name} is {status}: {why[name, status]}" for name, status in sorted(why)]
    return [*lines, "", *([". ".join(notes) + ".", ""] if notes else [])]


def markdown(result: dict[str, Any]) -> str:
    """The whole run as Markdown tables: ratios by implementation and case, then peak memory."""
    lines: list[str] = []
    for op in OPS:
        selected = [case for case in result["cases"] if case["op"] == op]
        if selected:
            lines += _markdown_table(op, selected)
    meta = result["meta"]
    for row in result["ignored"]:
        share = f"{row['share']:.2f} of its full time with {row['ignored']:.0%} of the rows ignored"
        lines.append(f"- {row['implementation']}, {row['case']}: {share}")
    device = meta["gpu"] or f"{meta['cpu']}, {meta['cpu_capability']}, {meta['threads']} threads"
    where = f"{device}; torch {meta['versions']['torch']}; {meta['date'][:10]}; `{meta['command']}`"
    return "\n".join([*lines, "", where])


CLIP = 6.0  # a bar longer than this many floors is cut, its number stays


def _panel(axis: Any, case: dict[str, Any], key: str) -> None:
    """One case as horizontal bars, the best at the top, quartiles of ratios as whiskers."""
    rows = [r for r in case["rows"] if r["status"] == "ok" and r[key] is not None]
    rows.sort(key=lambda row: -row[key])
    limit = max((row[key] for row in rows), default=1.0)
    if key == "ratio":
        limit = min(limit, CLIP)
        axis.axvline(1.0, color="black", lw=0.8, ls="--")
    for place, row in enumerate(rows):
        value = row[key]
        axis.barh(place, min(value, limit), color="#c8553d" if row["ours"] else "#7a8b99")
        end = value
        if key == "ratio" and value < limit:
            end = min(row["ratio_high"], limit)
            axis.plot([row["ratio_low"], end], [place, place], color="black", lw=0.8)
        text = f"{value:.2f}" if key == "ratio" else f"{value:.0f}"
        axis.text(min(end, limit) + 0.01 * limit, place, text, va="center", fontsize=7)
    axis.set_xlim(0, 1.12 * limit)
    axis.set_yticks(range(len(rows)), [row["implementation"] for row in rows])
    axis.set_title(case["name"].split("/", 1)[1].replace("/", "  "), fontsize=8)
    axis.tick_params(labelsize=7)


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files: time by operation, and peak memory by operation; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for op in OPS:
        for key, label in (("ratio", "time ÷ GEMM-only floor"), ("peak_mib", "peak MiB of a step")):
            cases = [
                c
                for c in result["cases"]
                if c["op"] == op and any(r.get(key) is not None for r in c["rows"])
            ]
            if not cases:
                continue
            columns = min(2, len(cases))
            lines = -(-len(cases) // columns)
            figure, axes = plt.subplots(
                lines, columns, figsize=(5.5 * columns, 0.9 + 2.3 * lines), squeeze=False
            )
            for axis in axes.flat[len(cases) :]:
                axis.remove()
            for axis, case in zip(axes.flat, cases, strict=False):
                _panel(axis, case, key)
            figure.suptitle(f"{OPS[op].text}: {label}", fontsize=10)
            figure.tight_layout()
            path = folder / f"{op}_{'time' if key == 'ratio' else 'memory'}.png"
            figure.savefig(path, dpi=120)
            plt.close(figure)
            written.append(path)
    return written


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``bench.json`` and the plots; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return [path, *plots(result, folder)]
