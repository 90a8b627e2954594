"""The table, from what the stages have left on disk."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from store import read

Record = dict[str, Any]


def write(out: Path) -> str:
    """Write ``table.md`` and ``gpu-check.json``; returns the table."""
    stages = {name: _load(out / f"{name}.jsonl") for name in ("parity", "sanitize", "bench")}
    meta = next((lines[0]["meta"] for lines in reversed(stages.values()) if lines), None)
    build = out / "build.json"
    whole: Record = {
        "meta": meta,
        "build": json.loads(build.read_text()) if build.exists() else None,
        **{name: lines[1:] for name, lines in stages.items()},
    }
    lines = [_title(meta)] if meta else []
    for name, make in (("parity", _parity), ("sanitize", _sanitize), ("bench", _bench)):
        if whole[name]:
            lines += ["", *make(whole[name])]
    text = "\n".join(lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "table.md").write_text(text + "\n")
    return text


def _load(path: Path) -> list[Record]:
    return read(path) if path.exists() else []


def _title(meta: Record) -> str:
    versions = meta["versions"]
    shown = ", ".join(f"{n} {v}" for n, v in versions.items() if v != "not installed")
    device = meta["gpu"] or meta["cpu"]
    commit = meta["commit"] or f"sources {meta['sources']}"
    return f"{device}; {shown}; CUDA {meta['cuda']}; {commit}; {meta['date'][:10]}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown that reads well as text."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    cut = ["-" * w for w in widths]
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
        for r in [header, cut, *rows]
    ]


def _parity(records: list[Record]) -> list[str]:
    """Checks by backend and dtype, then everything that failed and why backends refused."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reasons: collections.Counter[str] = collections.Counter()
    for record in records:
        parts = record["unit"].split("/")
        key = "/".join(parts[:2]) if len(parts) > 2 else record["unit"]
        own = counts[key]
        own["passed"] += record.get("passed", 0)
        own["failed"] += record.get("failures", 0)
        own["refused"] += sum(record.get("refused", {}).values())
        own["lost"] += record["status"] in ("crashed", "timeout")
        for reason, count in record.get("refused", {}).items():
            reasons[f"{parts[0]}: {reason}"] += count
    columns = ["passed", "failed", "refused", "lost"]
    rows = [[key, *(str(own[c]) for c in columns)] for key, own in counts.items()]
    lines = _table(["parity checks", *columns], rows)
    for record in records:
        if record["status"] != "ok":
            lines.append(f"- {record['unit']}: {record['status']} {record.get('reason', '')}")
            lines += [f"  - {n}: {why}" for n, why in list(record.get("failed", {}).items())[:5]]
    lines += [f"- refused {count} times, {reason}" for reason, count in reasons.most_common()]
    figures = [(r["unit"], n, f) for r in records for n, f in r.get("figures", {}).items()]
    rows = [
        [f"{unit} {name}", f"{f['peak_mib']:.0f}", f"{f['workspace_mib']:.0f}"]
        for unit, name, f in figures
    ]
    return lines + (["", *_table(["memory", "peak MiB", "planned MiB"], rows)] if rows else [])


def _sanitize(records: list[Record]) -> list[str]:
    rows = [
        [r["unit"], r["status"], " ".join(r.get("summary", [])) or r.get("reason", "")[:160]]
        for r in records
    ]
    rows = [[a, b, " ".join(c.replace("=", "").split())] for a, b, c in rows]
    return _table(["compute-sanitizer", "status", "summary"], rows)


def _bench(records: list[Record]) -> list[str]:
    found = {r["unit"]: r for r in records}
    rates = found.get("rates", {})
    lines = []
    if rates.get("status") == "ok":
        products = (f"{n} {v / 1e12:.4g}" for n, v in rates["product"].items())
        lines.append(
            f"Measured: matrix products {', '.join(products)} Tflop/s; copy "
            f"{rates['copy'] / 1e12:.4g} TB/s read + written"
        )
    lines += _rows(found, rates) + _listwise(found) + _filter(found)
    for record in records:
        if "case" in record:
            lines += ["", *_case(record["case"], rates)]
        elif record["status"] != "ok":
            lines.append(f"- {record['unit']}: {record['status']} {record.get('reason', '')}")
    return lines


def _rows(found: dict[str, Record], rates: Record) -> list[str]:
    rows = [
        [unit.split("/", 1)[1], name, f"{rate / 1e12:.4g}", _share(rate, rates.get("copy"))]
        for unit, record in found.items()
        for name, rate in record.get("rates", {}).items()
    ]
    header = ["row passes", "pass", "TB/s", "of copy"]
    return ["", *_table(header, rows)] if rows else []


def _share(value: float, whole: float | None) -> str:
    return f"{value / whole:.2f}" if whole else ""


def _listwise(found: dict[str, Record]) -> list[str]:
    rows = [
        [unit, f"{r['graph_us']:.1f}" if "graph_us" in r else r["graph"], f"{r['eager_us']:.1f}"]
        for unit, r in found.items()
        if "eager_us" in r
    ]
    header = ["64 groups, forward + backward", "µs, graph replay", "µs, eager"]
    return ["", *_table(header, rows)] if rows else []


def _filter(found: dict[str, Record]) -> list[str]:
    """Cross-entropy of peaked logits, which a row's own contribution makes less alike."""
    rows = []
    for unit, record in found.items():
        if (f := record.get("filter")) is None:
            continue
        times = [*f["unfiltered_ms"].values(), *f["filtered_ms"].values()]
        numbers = [f"{t:.2f}" for t in times] + [f"{f['speedup']:.2f}"]
        shares = [f"{f[key]:.3f}" for key in ("live", "live_unordered")]
        rows.append([unit, *numbers, *shares, f"{max(f['error'].values()):.1e}"])
    if not rows:
        return []
    header = ["filter/shape/nats that rows differ by", "ms, auto", "early", "filtered early"]
    header += ["filtered late", "speedup", "live tiles", "unordered", "error / allowed"]
    return ["", *_table(header, rows)]


def _case(case: Record, rates: Record) -> list[str]:
    """Time, the counted flops' rate over the device's, the floor, and memory.

    Twice: counted as the work that no implementation can avoid, and as the least of its schedule.
    """
    rate = rates.get("product", {}).get(case["dtype"])
    work = case["tokens"] * case["hidden"] * case["vocab"]
    rows = []
    for row in case["rows"]:
        if row["status"] != "ok":
            text = f"{row['status']}: {row['reason']}"[:100]
            rows.append([row["implementation"], text, "", "", "", ""])
            continue
        achieved = [g * work / (row["time_ms"] / 1e3) for g in (row["gemms"], row["own_gemms"])]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        shares = [_share(a, rate) for a in achieved]
        numbers = [f"{row['time_ms']:.2f}", f"{row['ratio']:.2f}", *shares, peak]
        rows.append([row["implementation"], *numbers])
    own = "of rate, own"
    header = [case["name"], "ms", "÷ floor", f"of rate, {row['gemms']}NHV", own, "MiB"]
    return _table(header, rows)
