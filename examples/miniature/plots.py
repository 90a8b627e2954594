"""Figures of the result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.miniature.lab import SHARED
from examples.miniature.methods import METHODS
from examples.miniature.settings import Settings

INK, MUTED = "#1f2937", "#6b7280"
#: One colour for a family of methods.
FAMILIES = {
    "imitation": ("#9aa3af", ("SFT", "KD", "KD, aligned", "SeqKD", "SeqKD, aligned")),
    "preferences": ("#e07b39", ("DPO", "SimPO")),
    "DCKD and ADPA": ("#2563eb", ("DCKD", "ADPA", "ADPA+")),
    "PAD": ("#3f9a6b", ("PAD ranking", "PAD jsd", "PAD decomposed", "PAD kl")),
}
COLOURS = {name: colour for colour, names in FAMILIES.values() for name in names}
TEACHERS = {"reference": "reference teacher", "aligned": "aligned teacher", "base": "base"}


def _style(axis: Axes, title: str, subtitle: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#cbd5e1")
    axis.tick_params(colors=MUTED, labelsize=8.5, length=3, color="#cbd5e1")
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize=10.5, color=INK, fontweight="bold", loc="left", pad=19)
    axis.text(0, 1.02, subtitle, transform=axis.transAxes, fontsize=8.5, color=MUTED)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


def _bars(axis: Axes, table: dict[str, Any], names: list[str], measure: str) -> None:
    for place, name in enumerate(names):
        value = table[name][measure]
        axis.barh(place, value.mean, height=0.68, color=COLOURS.get(name, INK))
        axis.errorbar(value.mean, place, xerr=value.error, color=MUTED, linewidth=1, capsize=2.5)
        axis.annotate(
            f"{value.mean:.2f}", (value.mean + value.error, place), (5, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), [TEACHERS.get(name, name) for name in names])
    axis.grid(axis="x", color="#eef1f5", linewidth=1)
    axis.margins(x=0.12)


def ranked(table: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those in the table, by true reward."""
    return sorted((name for name in names if name in table), key=lambda n: -table[n]["reward"].mean)


def ranking(table: dict[str, Any], folder: Path) -> None:
    """True reward and accuracy of every student and teacher, with standard errors."""
    names = ranked(table, (*SHARED, *METHODS))
    figure = Figure(figsize=(9.2, 0.28 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _bars(left, table, names, "reward")
    _style(left, "True reward", "of what is written to held-out prompts, mean over seeds")
    _bars(right, table, names, "accuracy")
    right.set_xlim(left=0.5)
    _style(right, "Preference accuracy", "better of two held-out responses likelier")
    left.invert_yaxis()
    _save(figure, folder / "ranking.png")


def by_seed(results: list[dict[str, Any]], table: dict[str, Any], folder: Path) -> None:
    """Each seed's reward beside SFT's of that seed, and reward against entropy."""
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sft = {each["seed"]: each["reward"] for each in results if each["method"] == "SFT"}
    names = ranked(table, METHODS)
    for place, name in enumerate(names):
        found = [r for r in results if r["method"] == name and r["seed"] in sft]
        over = [each["reward"] - sft[each["seed"]] for each in found]
        left.scatter(over, [place] * len(over), s=16, color=COLOURS[name], alpha=0.85)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.axvline(0, color="#cbd5e1", linewidth=1)
    left.grid(axis="x", color="#eef1f5", linewidth=1)
    _style(left, "Reward over SFT's", "a point for each seed")
    everyone = ranked(table, (*METHODS, *SHARED))
    column = max(table[name]["entropy"].mean for name in everyone) + 0.15
    height = table[everyone[0]]["reward"].mean
    gap = (height - table[everyone[-1]]["reward"].mean) / len(everyone)
    for name in everyone:  # names stand in a column, far enough apart to be read
        x, y = table[name]["entropy"].mean, table[name]["reward"].mean
        colour = COLOURS.get(name, INK)
        right.plot([x, column], [y, height], color=colour, linewidth=0.5, alpha=0.5)
        right.scatter(x, y, s=26, color=colour)
        right.text(column, height, f" {TEACHERS.get(name, name)}", fontsize=7, va="center")
        height -= gap
    right.set_xlim(right=column + 0.75)
    right.grid(color="#eef1f5", linewidth=1)
    right.set_xlabel("entropy, nats a word", fontsize=8.5, color=MUTED)
    _style(right, "Reward and variety", "true reward against the entropy of what is written")
    _save(figure, folder / "seeds.png")


def curves(table: dict[str, Any], folder: Path, settings: Settings) -> None:
    """True reward in the second stage, a panel for each family."""
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    axes = figure.subplots(1, len(FAMILIES), sharey=True)
    every = settings.steps // settings.curve_points
    for axis, (family, (_, names)) in zip(axes, FAMILIES.items(), strict=True):
        for i, name in enumerate(n for n in names if n in table):
            values = table[name]["curve"]
            steps = [every * (i + 1) for i in range(len(values))]
            axis.plot(
                steps, values, label=name, linewidth=1.6, marker="osD^v"[i], markersize=3.5,
                color=COLOURS[name], alpha=1 - 0.15 * i,
            )  # fmt: skip
        axis.legend(frameon=False, fontsize=7.5, labelcolor=INK)
        axis.set_xlabel("step of the second stage", fontsize=8.5, color=MUTED)
        axis.grid(axis="y", color="#eef1f5", linewidth=1)
        _style(axis, family, "true reward")
    _save(figure, folder / "curves.png")


def save_plots(
    table: dict[str, Any], results: list[dict[str, Any]], folder: Path, settings: Settings
) -> None:
    """Write ranking.png, seeds.png and curves.png."""
    ranking(table, folder)
    by_seed(results, table, folder)
    curves(table, folder, settings)
