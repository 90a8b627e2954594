"""The table: means over seeds, as markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.miniature.lab import SHARED
from examples.miniature.methods import METHODS, STAGES
from examples.miniature.plots import ranked, save_plots
from examples.miniature.settings import Settings

MEASURES = ("reward", "over_sft", "accuracy", "gain_accuracy", "entropy", "repeats")


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its standard error, NaN of a single seed."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> Estimate:
        """From one value for each seed."""
        if len(values) < 2:
            return cls(values[0], math.nan)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method, in the table's order, an Estimate of each measure and the ``curve``.

    ``over_sft`` is a method's reward less that of SFT with the same seed: seeds differ in how much
    there is to earn, which this takes out.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for name in (*SHARED, *METHODS):
        found = [each for each in results if each["method"] == name]
        if found:
            by_name[name] = found
    sft = {each["seed"]: each["reward"] for each in by_name.get("SFT", [])}
    table: dict[str, dict[str, Any]] = {}
    for name, found in by_name.items():
        row: dict[str, Any] = {"seeds": len(found)}
        for measure in MEASURES:
            if measure == "over_sft":
                values = [r["reward"] - sft[r["seed"]] for r in found if r["seed"] in sft]
            else:
                values = [r[measure] for r in found]
            if values:
                row[measure] = Estimate.of(values)
        curves = [each["curve"] for each in found if "curve" in each]
        row["curve"] = [statistics.fmean(point) for point in zip(*curves, strict=True)]
        table[name] = row
    return table


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table of :func:`summary`, students by reward."""
    shared = [name for name in SHARED if name in table]
    head = (
        "| | stages | true reward | over SFT | accuracy | accuracy of the gain | entropy |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    lines = [_line(name, table[name]) for name in [*shared, *ranked(table, METHODS)]]
    return head + "".join(lines)


def _line(name: str, row: dict[str, Any]) -> str:
    titles = {"reference": "reference teacher", "aligned": "aligned teacher", "base": "base"}
    stages = " → ".join(METHODS[name]) if name in METHODS else ""
    cells = [
        titles.get(name, name),
        stages,
        _cell(row.get("reward"), ".2f"),
        "" if name in SHARED else _cell(row.get("over_sft"), "+.2f"),
        _cell(row["accuracy"], ".3f"),
        "" if name in ("base", "reference") else _cell(row["gain_accuracy"], ".3f"),
        _cell(row["entropy"], ".2f"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _cell(value: Estimate | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value.mean:{form}} ± {value.error:{form.lstrip('+')}}"


def write(results: list[dict[str, Any]], folder: Path, settings: Settings) -> None:
    """Write table.md, results.json and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    table = summary(results)
    (folder / "table.md").write_text(markdown(table), encoding="utf-8")
    content = {
        "settings": dataclasses.asdict(settings),
        "stages": {
            name: {"trainer": each.trainer, "rate": each.rate, **each.options}
            for name, each in STAGES.items()
        },
        "summary": {name: _plain(row) for name, row in table.items()},
        "runs": [_rounded(each) for each in results],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    save_plots(table, results, folder, settings)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: dataclasses.asdict(value) if isinstance(value, Estimate) else value
        for name, value in row.items()
        if name != "curve"
    }


def _rounded(run: dict[str, Any]) -> dict[str, Any]:
    """Without what the machine decides, and short."""
    numbers = {n: round(v, 5) if isinstance(v, float) else v for n, v in run.items()}
    numbers.pop("seconds", None)
    if "curve" in numbers:
        numbers["curve"] = [round(each, 3) for each in numbers["curve"]]
    return numbers
