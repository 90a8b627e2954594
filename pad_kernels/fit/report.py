"""What fits, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pad_kernels.engine.planner import default_budget
from pad_kernels.fit.step import HEADS, Setup, Static, Step, prepare

GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """One column: gradient checkpointing or not, dense logits or ours."""

    checkpointing: bool
    head: str
    step: Step
    groups: int  # of the largest micro-batch that fits

    @property
    def moments(self) -> dict[str, int]:
        """Bytes in each phase of a step of one group."""
        return self.step.moments(self.step.setup.responses, self.head)

    @property
    def peak(self) -> int:
        """Most bytes of a step of one group."""
        return max(self.moments.values())

    @property
    def worst(self) -> str:
        """The phase where that is."""
        return max(self.moments, key=self.moments.__getitem__)


def cases(setup: Setup) -> list[Case]:
    """All four columns."""
    return [
        Case(checkpointing, head, step, step.largest(head))
        for checkpointing, step in prepare(setup).items()
        for head in HEADS
    ]


def as_dict(found: list[Case], names: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` writes; sizes in bytes.

    Args:
        found: the columns.
        names: the options as they were given.
    """
    static, setup = found[0].step.static, found[0].step.setup
    n = setup.responses
    return {
        "options": names,
        "entries": {
            "student": static.entries,
            "trained": static.trained,
            "teachers": static.teacher_entries,
        },
        "bytes": {
            "gpu": setup.gpu_bytes,
            "room": setup.room,
            "parameters": static.parameters,
            "gradients": static.gradients,
            "optimizer": static.optimizer,
            "teachers": static.teachers,
        },
        "cases": [
            {
                "checkpointing": case.checkpointing,
                "head": case.head,
                "one_group": {
                    "activations": case.step.activations(n),
                    "head": case.step.head(n, case.head),
                    "moments": case.moments,
                    "peak": case.peak,
                },
                "largest": {
                    "groups": case.groups,
                    "sequences": case.groups * n,
                    "tokens": case.groups * n * setup.length,
                },
            }
            for case in found
        ],
    }


def table(found: list[Case], student: str) -> str:
    """The columns as text."""
    setup, static = found[0].step.setup, found[0].step.static
    n, length = setup.responses, setup.length
    lines = [
        _trained(student, static),
        f"{_gib(setup.gpu_bytes)} GiB, {_gib(setup.reserve_bytes)} of it kept free. Sizes in GiB, "
        f"for one group of {n} × {length} tokens:",
        "",
        _row("gradient checkpointing", ["on" if case.checkpointing else "off" for case in found]),
        _row("LM head", [case.head for case in found]),
    ]

    def row(name: str, size: Callable[[Case], int]) -> None:
        lines.append(_row(name, [_gib(size(case)) for case in found]))

    row("student's parameters", lambda _: static.parameters)
    row("gradients", lambda _: static.gradients)
    row(f"optimizer ({setup.optimizer})", lambda _: static.optimizer)
    if setup.teachers:
        row("teachers' parameters", lambda _: static.teachers)
    row("activations kept for backward", lambda case: case.step.activations(n))
    row("head, at its most", lambda case: case.step.head(n, case.head))
    lines.append("")
    for moment in found[0].moments:
        sizes = [_gib(case.moments[moment]) for case in found]
        lines.append(_row(f"during {_MOMENTS[moment]}", sizes))
    row("needed", lambda case: case.peak)
    fits = ["yes" if case.groups else "no" for case in found]
    lines += [_row(f"fits in {_gib(setup.room)}", fits), ""]
    lines.append(_row(f"largest micro-batch, × {length}", [str(case.groups * n) for case in found]))
    lines.append(_row(f"  in groups of {n}", [str(case.groups) for case in found]))
    return "\n".join(lines + _notes(found))


_MOMENTS = {
    "teacher": "teachers' forward",
    "forward": "decoder's forward",
    "head": "head and loss",
    "backward": "decoder's backward",
    "optimizer": "optimizer's step",
}


def _trained(student: str, static: Static) -> str:
    trained = "all" if static.trained == static.entries else f"{static.trained:,}"
    return f"{student}: {static.entries:,} parameters, {trained} of them trained"


def _notes(found: list[Case]) -> list[str]:
    """What the largest micro-batch takes for granted that is not so by default."""
    setup, notes = found[0].step.setup, []
    if found[0].step.needs_flash and not setup.eager_attention:
        notes.append("Needs flash-attn: without it transformers runs this model's attention eagerly"
                     " (--eager-attention).")  # fmt: skip
    ours = [case for case in found if case.head == "ours" and case.groups]
    need = [case.step.plan(case.groups * setup.responses).workspace_bytes for case in ours]
    if max(need, default=0) > default_budget(setup.gpu_bytes):
        notes.append(f"Needs pad_kernels.workspace_limit({-(-max(need) // 2**20)} << 20).")
    return ["", *notes] if notes else []


def _row(name: str, values: list[str]) -> str:
    return f"{name:<32}" + "".join(f"{value:>10}" for value in values)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}".removesuffix(".00")


def nothing_fits(found: list[Case]) -> str:
    """Why not even one group fits, and the first change that would let one fit."""
    setup = found[0].step.setup
    best = min(found, key=lambda case: case.peak)
    head = "our head" if best.head == "ours" else "dense logits"
    group = f"{setup.responses} × {setup.length} tokens"
    lines = [
        f"nothing fits: one group of {group} needs at least {_gib(best.peak)} GiB (during "
        f"{_MOMENTS[best.worst]}, checkpointing {'on' if best.checkpointing else 'off'}, "
        f"{head}), and there are {_gib(setup.room)}."
    ]
    for words, changed in _changes(setup):
        need = prepare(changed, (True,))[True].peak(setup.responses, "ours")
        if need <= setup.room:
            return "\n".join([*lines, f"It would fit {words}: {_gib(need)} GiB."])
    gib = -(-(best.peak + setup.reserve_bytes) // GIB)
    return "\n".join([*lines, f"A GPU with {gib} GiB would do, or fewer or shorter responses."])


def _changes(setup: Setup) -> list[tuple[str, Setup]]:
    """Ever thriftier setups, in words."""
    found, words = [], []
    if setup.teachers:
        words.append("teachers' outputs from a cache")
        setup = replace(setup, teachers=())
        found.append(("with " + " and ".join(words), setup))
    if setup.lora_rank is None:
        lean = replace(setup, optimizer="adafactor", precision="bf16")
        if lean != setup:
            found.append(("with " + " and ".join([*words, "bf16 and adafactor"]), lean))
        lora = replace(setup, lora_rank=16)
        found.append(("with " + " and ".join([*words, "LoRA (rank 16)"]), lora))
    return found
