"""Sentences of the report that depend on the numbers.

Nothing here assumes that PAD wins: a difference is called one only beyond two standard errors of
the prompt-by-prompt difference.
"""

from __future__ import annotations

from pad_kernels.demo.outcome import Cost, Estimate, Outcome
from pad_kernels.demo.plots import LABELS

METRICS = {
    "loss": ("the preference loss", -1, ".3f"),
    "tau": ("Kendall's tau", 1, ".2f"),
    "teacher_logprob": ("the teacher's log-prob of new text", 1, ".2f"),
}


def clear(difference: Estimate) -> bool:
    """Whether a difference is more than chance: beyond two standard errors."""
    return abs(difference.mean) > 2 * difference.error


def change(outcome: Outcome, metric: str, method: str = "pad") -> str:
    """How a figure moved, as a sentence.

    For example: "Kendall's tau rose from 0.41 to 0.58 (change +0.17 ± 0.03)."
    """
    name, _, form = METRICS[metric]
    before = getattr(outcome.result("before"), metric)
    after = getattr(outcome.result(method), metric)
    difference = after - before
    verb = "rose" if difference.mean > 0 else "fell"
    if not clear(difference):
        verb = "stayed within chance: it went"
    figures = f"from {before.mean:{form}} to {after.mean:{form}}"
    size = f"{difference.mean:+{form}} ± {difference.error:{form}}"
    return f"{name[0].upper()}{name[1:]} {verb} {figures} ({size})."


def listed(names: list[str]) -> str:
    """Join names as in a sentence.

    >>> listed(["one", "two", "three"])
    'one, two and three'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def verdict(outcome: Outcome, method: str = "pad") -> str:
    """Which figures a method improved, worsened or left within chance, as one sentence.

    For example: "PAD improved the preference loss; Kendall's tau stayed within chance."
    """
    groups: dict[str, list[str]] = {"improved": [], "worsened": [], "same": []}
    for metric, (name, direction, _) in METRICS.items():
        before = getattr(outcome.result("before"), metric)
        difference = getattr(outcome.result(method), metric) - before
        kind = "improved" if difference.mean * direction > 0 else "worsened"
        groups[kind if clear(difference) else "same"].append(name)
    parts = [f"{kind} {listed(groups[kind])}" for kind in ("improved", "worsened") if groups[kind]]
    text = f"{LABELS[method]} {' but '.join(parts)}" if parts else ""
    if groups["same"]:
        chance = f"{listed(groups['same'])} stayed within chance"
        text = f"{text}; {chance}" if text else f"With {LABELS[method]} {chance}"
    return f"{text}."


def against(outcome: Outcome, metric: str) -> str:
    """PAD beside the other methods on one figure, as a sentence."""
    name, direction, form = METRICS[metric]
    pad = getattr(outcome.result("pad"), metric)
    parts = []
    for result in outcome.results:
        if result.name in ("before", "pad"):
            continue
        difference = pad - getattr(result, metric)
        gap = f"({difference.mean:+{form}} ± {difference.error:{form}})"
        if not clear(difference):
            parts.append(f"level with {LABELS[result.name]} {gap}")
        else:
            better = difference.mean * direction > 0
            parts.append(f"{'ahead of' if better else 'behind'} {LABELS[result.name]} {gap}")
    return f"On {name} PAD is {' and '.join(parts)}."


def price(outcome: Outcome) -> list[str]:
    """What preference training cost each student elsewhere, as sentences."""
    before = outcome.result("before")
    after = [result for result in outcome.results if result.name != "before"]
    text = ", ".join(f"{result.text_loss:.2f} ({LABELS[result.name]})" for result in after)
    pairs = ", ".join(f"{result.distinct:.0%} ({LABELS[result.name]})" for result in after)
    length = ", ".join(f"{result.length:.0f} ({LABELS[result.name]})" for result in after)
    return [
        f"Next-token loss on text that people wrote: {before.text_loss:.2f} before, {text} after. "
        "None of the three losses looks at such text, so some forgetting is expected.",
        f"Different neighbouring token pairs in what the students write: {before.distinct:.0%} "
        f"before, {pairs} after. Lower means more repetition, which a reward per token invites.",
        f"Tokens of a response: {before.length:.0f} before, {length} after.",
    ]


def savings(costs: list[Cost]) -> list[str]:
    """Memory and time, ours beside dense, as a sentence for each vocabulary."""
    sentences = []
    for size in sorted({cost.vocab_size for cost in costs}):
        pair = {cost.head: cost for cost in costs if cost.vocab_size == size}
        dense, ours = pair["dense"], pair["ours"]
        logits = dense.rows * size * 4 / 2**20
        memory = dense.peak_bytes / max(1, ours.peak_bytes)
        time = dense.seconds / ours.seconds
        speed = f"{time:.1f} times as fast" if time >= 1.05 else f"{time:.2f} times the speed"
        sentences.append(
            f"With {size:,} vocabulary entries, {dense.rows:,} response tokens make "
            f"{logits:,.0f} MiB of float32 logits a copy. The dense step peaks at "
            f"{dense.peak_bytes / 2**20:,.0f} MiB, ours at {ours.peak_bytes / 2**20:,.0f} MiB: "
            f"{memory:.1f} times less, at {speed}."
        )
    return sentences
