"""The report's figures, as PNG images inside data URIs."""

from __future__ import annotations

import base64
import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pad_kernels.demo.outcome import Cost, Curve, Estimate, Outcome, Result

LABELS = {"before": "before", "pad": "PAD", "dpo": "DPO", "simpo": "SimPO"}
COLOURS = {"before": "#9aa3af", "pad": "#2563eb", "dpo": "#e07b39", "simpo": "#3f9a6b"}
TEACHER, STUDENT, DENSE, OURS = "#7c3aed", "#64748b", "#9aa3af", "#2563eb"
INK, MUTED = "#1f2937", "#6b7280"
DPI = 160


def _figure(columns: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.2, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#cbd5e1")
        axis.tick_params(colors=MUTED, labelsize=8.5, length=3, color="#cbd5e1")
        axis.grid(axis="y", color="#eef1f5", linewidth=1)
        axis.set_axisbelow(True)
    return figure, list(axes)


def _title(axis: Axes, title: str, subtitle: str) -> None:
    axis.set_title(title, fontsize=10.5, color=INK, fontweight="bold", loc="left", pad=19)
    axis.text(0, 1.035, subtitle, transform=axis.transAxes, fontsize=8.5, color=MUTED)


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _bars(axis: Axes, results: list[Result], values: list[Estimate], form: str) -> None:
    for place, (result, value) in enumerate(zip(results, values, strict=True)):
        colour = COLOURS[result.name]
        axis.bar(place, value.mean, width=0.66, color=colour)
        axis.errorbar(place, value.mean, value.error, color=INK, linewidth=1, capsize=3)
        up = value.mean >= 0
        end = value.mean + (value.error if up else -value.error)
        axis.annotate(
            format(value.mean, form),
            (place, end),
            (0, 4 if up else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize=8.5,
            color=INK,
        )
    axis.set_xticks(range(len(results)), [LABELS[result.name] for result in results])
    axis.margins(y=0.16)
    axis.axhline(0, color="#cbd5e1", linewidth=1)


def comparison(outcome: Outcome) -> str:
    """Loss, tau and the teacher's log-prob of every student, with standard errors."""
    figure, (left, middle, right) = _figure(3)
    results, before = outcome.results, outcome.result("before")
    _bars(left, results, [result.loss for result in results], ".3f")
    _title(left, "Preference loss", "held-out, lower is better")
    _bars(middle, results, [result.tau for result in results], ".2f")
    _title(middle, "Kendall's tau with the teacher", "held-out, higher is better")
    gains = [result.teacher_logprob - before.teacher_logprob for result in results[1:]]
    _bars(right, results[1:], gains, "+.2f")
    _title(right, "Teacher's log-prob of new text", "gain over before, nats a token")
    return _uri(figure)


def _lines(axis: Axes, curves: list[Curve]) -> None:
    for curve in curves:
        axis.plot(
            curve.x, curve.y, color=COLOURS[curve.name], label=LABELS[curve.name],
            linewidth=1.8, marker="o", markersize=3.5,
        )  # fmt: skip
    axis.set_xlabel("training step", fontsize=8.5, color=MUTED)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def preference_curves(outcome: Outcome) -> str:
    """Held-out loss and tau while the three students are trained."""
    figure, (left, right) = _figure(2)
    _lines(left, outcome.losses)
    _title(left, "Preference loss", "held-out prompts, lower is better")
    _lines(right, outcome.taus)
    _title(right, "Kendall's tau with the teacher", "held-out prompts, higher is better")
    left.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    return _uri(figure)


def smooth(values: list[float], window: int) -> list[float]:
    """Running mean over the last `window` values."""
    sums = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in sums]


def pretraining_curves(outcome: Outcome) -> str:
    """Next-token loss of teacher and student."""
    figure, (axis,) = _figure(1, 2.7)
    for curve, colour in zip(outcome.pretraining, (TEACHER, STUDENT), strict=True):
        axis.plot(curve.x, curve.y, color=colour, alpha=0.18, linewidth=1)
        smoothed = smooth(curve.y, max(1, len(curve.y) // 25))
        axis.plot(curve.x, smoothed, color=colour, linewidth=1.8, label=curve.name)
    axis.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    axis.set_xlabel("training step", fontsize=8.5, color=MUTED)
    _title(axis, "Next-token loss", "training batches, nats a token, running mean")
    return _uri(figure)


def _cost_bars(axis: Axes, costs: list[Cost], values: list[float], form: str) -> None:
    sizes = sorted({cost.vocab_size for cost in costs})
    for cost, value in zip(costs, values, strict=True):
        place = sizes.index(cost.vocab_size) + (0.19 if cost.head == "ours" else -0.19)
        axis.bar(place, value, width=0.34, color=OURS if cost.head == "ours" else DENSE)
        axis.annotate(
            format(value, form), (place, value), (0, 3), textcoords="offset points",
            ha="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axis.set_xticks(range(len(sizes)), [f"vocabulary {size:,}" for size in sizes])
    axis.margins(y=0.14)


def step_costs(outcome: Outcome) -> str:
    """Peak memory and time of a PAD step, dense and ours."""
    figure, (left, right) = _figure(2)
    costs = outcome.costs
    _cost_bars(left, costs, [cost.peak_bytes / 2**20 for cost in costs], ",.0f")
    _title(left, "Peak memory of a training step", "MiB beyond model and batch")
    _cost_bars(right, costs, [cost.seconds for cost in costs], ".2f")
    _title(right, "Time of a training step", "seconds, forward, backward and update")
    for colour, label in ((DENSE, "dense logits"), (OURS, "pad_kernels")):
        left.bar(0, 0, color=colour, label=label)
    left.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left")
    return _uri(figure)
