"""The table in the terminal, `results.json`, and the HTML report."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch

import pad_kernels as pk
from pad_kernels.demo import plots, wording
from pad_kernels.demo.outcome import Outcome


def table(outcome: Outcome) -> str:
    """The main figures as text."""
    columns = f"{'loss':>16}{'Kendall tau':>16}{'teacher log-prob':>20}{'text loss':>12}"
    head = f"{'held-out prompts':<18}{columns}"
    lines = [head, "-" * len(head)]
    for result in outcome.results:
        loss, tau, own = result.loss, result.tau, result.teacher_logprob
        lines.append(
            f"{plots.LABELS[result.name]:<18}{f'{loss.mean:.3f} ±{loss.error:.3f}':>16}"
            f"{f'{tau.mean:.3f} ±{tau.error:.3f}':>16}{f'{own.mean:.3f} ±{own.error:.3f}':>20}"
            f"{result.text_loss:>12.3f}"
        )
    head = f"{'one PAD step':<18}{'peak memory':>16}{'time':>16}"
    lines += ["", head, "-" * len(head)]
    for cost in outcome.costs:
        name = "dense logits" if cost.head == "dense" else "pad_kernels"
        peak = f"{cost.peak_bytes / 2**20:,.0f} MiB"
        lines.append(f"{name:<18}{peak:>16}{f'{cost.seconds:.3f} s':>16}   V = {cost.vocab_size:,}")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """Versions and machine, for the report's last section."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    backends = [name for name, state in pk.available_backends().items() if state == "available"]
    return {
        "pad_kernels": pk.__version__,
        **{name: version(name) for name in names},
        "Python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "backends": ", ".join(backends),
    }


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The content of `results.json`."""
    return {
        "settings": dataclasses.asdict(outcome.settings),
        "environment": environment(),
        "numbers": outcome.numbers(),
        "timings": outcome.timings(),
    }


def html(outcome: Outcome) -> str:
    """The report as one self-contained page."""
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(files("pad_kernels.demo").joinpath("report.html.j2").read_text("utf-8"))
    metrics = tuple(wording.METRICS)
    return template.render(
        run=outcome,
        settings=outcome.settings,
        before=outcome.result("before"),
        pad=outcome.result("pad"),
        blind=math.log(outcome.vocabulary),
        orders=math.factorial(outcome.settings.responses),
        labels=plots.LABELS,
        colours=plots.COLOURS,
        verdict=wording.verdict(outcome),
        changes=[wording.change(outcome, metric) for metric in metrics],
        comparisons=[wording.against(outcome, metric) for metric in metrics],
        price=wording.price(outcome),
        savings=wording.savings(outcome.costs),
        figures={
            "comparison": plots.comparison(outcome),
            "curves": plots.preference_curves(outcome),
            "pretraining": plots.pretraining_curves(outcome),
            "costs": plots.step_costs(outcome),
        },
        environment=environment(),
    )


def write(outcome: Outcome, out: Path) -> Path:
    """Write `results.json` and `report.html` into a folder; returns the report's path."""
    (out / "results.json").write_text(json.dumps(as_dict(outcome), indent=1), encoding="utf-8")
    path = out / "report.html"
    path.write_text(html(outcome), encoding="utf-8")
    return path
