"""What fits, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pad_kernels.fit.report import GIB, Case

INK, MUTED, LIMIT = "#1f2937", "#6b7280", "#dc2626"
DENSE, OURS = "#9aa3af", "#2563eb"
PARTS = {
    "parameters": "#334155",
    "gradients": "#64748b",
    "optimizer": "#94a3b8",
    "teachers": "#7c3aed",
    "at the worst moment": "#e07b39",
}


def save(found: list[Case], title: str, path: Path) -> None:
    """Write a PNG: where the memory goes for one group, and what a larger micro-batch needs."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=MUTED, labelsize=8.5)
        axis.set_ylabel("GiB", color=MUTED, fontsize=9)
    _composition(left, found)
    _growth(right, found)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")
    figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def _limit(axis: Axes, room: int) -> None:
    text = f"{room / GIB:.4g} GiB to use"
    axis.axhline(room / GIB, color=LIMIT, linewidth=1.2, linestyle="--", label=text)
    axis.legend(
        fontsize=8.5, ncols=2, loc="upper left", labelcolor=INK, frameon=True, framealpha=1,
        edgecolor="white",
    )  # fmt: skip


def _composition(axis: Axes, found: list[Case]) -> None:
    setup, static = found[0].step.setup, found[0].step.static
    parts = {name: getattr(static, name) for name in list(PARTS)[:-1]}
    for place, case in enumerate(found):
        base = 0.0
        sizes = parts | {"at the worst moment": case.peak - static.total}
        for name, size in sizes.items():
            label = name if place == 0 and size else None
            axis.bar(place, size / GIB, 0.66, bottom=base, color=PARTS[name], label=label)
            base += size / GIB
        axis.annotate(
            f"{case.peak / GIB:.1f}\n{case.worst}", (place, base), (0, 5), ha="center",
            textcoords="offset points", fontsize=8.5, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    names = [f"{c.head}\n{'checkpoints' if c.checkpointing else 'keeps all'}" for c in found]
    axis.set_xticks(range(len(found)), names)
    axis.set_ylim(0, max(setup.room, *(case.peak for case in found)) / GIB * 1.5)
    text = f"One group of {setup.responses} × {setup.length} tokens"
    axis.set_title(text, fontsize=9.5, color=INK, loc="left")
    _limit(axis, setup.room)


def _growth(axis: Axes, found: list[Case]) -> None:
    setup = found[0].step.setup
    last = max(2, round(1.15 * max(case.groups for case in found)))
    groups = sorted({round(last ** (i / 40)) for i in range(41)})
    for case in found:
        peaks = [case.step.peak(g * setup.responses, case.head) / GIB for g in groups]
        axis.plot(
            [g * setup.responses for g in groups], peaks, linewidth=1.8,
            color=OURS if case.head == "ours" else DENSE,
            linestyle="-" if case.checkpointing else ":",
            label=f"{case.head}, {'checkpoints' if case.checkpointing else 'keeps all'}: "
            f"{case.groups * setup.responses}",
        )  # fmt: skip
    axis.set_ylim(0, 1.6 * setup.room / GIB)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel(f"sequences of {setup.length} tokens in a micro-batch", fontsize=9, color=MUTED)
    title = "Needed by a micro-batch, and the largest that fits"
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")
    _limit(axis, setup.room)
