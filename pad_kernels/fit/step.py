"""A training step's memory, phase by phase, and the largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pad_kernels._checks import fail_value
from pad_kernels.engine.plan import Plan
from pad_kernels.fit import heads, models, trace
from pad_kernels.fit.optimizers import state_bytes, step_bytes
from pad_kernels.fit.trace import Affine

HEADS = ("dense", "ours")
PRECISIONS = ("bf16", "fp32-master")


@dataclass(frozen=True)
class Setup:
    """What is trained, how, and on what.

    Args:
        student, teachers: configs of transformers; no teachers: their outputs come from a cache.
        method: "pad" (teachers only score responses), "dckd" or "adpa".
        length: tokens of a sequence, prompt included.
        responses: sequences of a group, n; a micro-batch is some whole groups.
        gpu_bytes: memory of the GPU.
        reserve_bytes: of it, for the CUDA context, libraries and fragmentation.
        optimizer: a key of OPTIMIZERS.
        precision: "bf16": parameters and gradients in bfloat16; "fp32-master": in float32, with
            products in bfloat16 by autocast. With LoRA the frozen model is bfloat16 in both, and
            the adapters float32.
        lora_rank: of adapters on every linear layer but the head; None: all parameters are trained.
        eager_attention: attention that stores heads × T × T numbers, not flash attention.
    """

    student: Any
    teachers: tuple[Any, ...]
    method: str
    length: int
    responses: int
    gpu_bytes: int
    reserve_bytes: int
    optimizer: str
    precision: str
    lora_rank: int | None
    eager_attention: bool

    @property
    def room(self) -> int:
        """Bytes that a step may use."""
        return self.gpu_bytes - self.reserve_bytes

    @property
    def attention(self) -> str:
        """The attention implementation in transformers' terms."""
        return "eager" if self.eager_attention else trace.FLASH


@dataclass(frozen=True)
class Static:
    """Bytes that are there during the whole step, and entries counted."""

    entries: int
    trained: int
    teacher_entries: int
    parameters: int
    gradients: int
    optimizer: int
    teachers: int
    step: int  # what the optimizer makes in passing

    @property
    def total(self) -> int:
        """Bytes of all that stays."""
        return self.parameters + self.gradients + self.optimizer + self.teachers


@dataclass(frozen=True)
class TeacherPhase:
    """One teacher's forward pass: its decoder, then its dense logits."""

    hidden: int
    decoder: Affine
    dense: Affine


@dataclass(frozen=True)
class Step:
    """One training step, with or without gradient checkpointing, for any micro-batch."""

    setup: Setup
    static: Static
    vocab: int
    hidden: int
    dtypes: tuple[torch.dtype, torch.dtype]  # hidden states, head weight
    needs: tuple[bool, bool, bool]
    tied: bool
    forward: Affine
    backward: Affine
    dense: Affine
    teachers: tuple[TeacherPhase, ...]
    needs_flash: bool  # whether transformers falls back to eager attention without flash-attn

    def activations(self, sequences: int) -> int:
        """Bytes the decoder keeps for its backward, the last hidden states included."""
        return self.forward.last(sequences)

    def head(self, sequences: int, which: str) -> int:
        """Bytes of the head at their most, its gradients of hidden states and weight included.

        "dense": logits in the products' dtype, what a soft cap keeps, their float32 copy, its
        log-softmax, and each one's gradient as PyTorch makes and frees them. "ours": the planner's
        workspace (kept logits and a float32 V×H accumulator where it plans one included) and the
        gradients [N, H] and [V, H].
        """
        if which == "dense":
            return self.dense.peak(sequences)
        tokens = sequences * self.setup.length
        gradient = tokens * self.hidden * self.dtypes[0].itemsize
        return self.plan(sequences).workspace_bytes + gradient + self._weight_gradient

    def plan(self, sequences: int) -> Plan:
        """How this library would compute the loss: PAD's couples sequences, so is per token."""
        setup, pad = self.setup, self.setup.method == "pad"
        hidden = (self.hidden, *(t.hidden for t in self.teachers if not pad))
        sizes = (setup.gpu_bytes, sequences * setup.length, self.vocab, hidden)
        return heads.our_plan(*sizes, self.dtypes, self.needs, pad)

    @property
    def _weight_gradient(self) -> int:
        return self.needs[1] * self.vocab * self.hidden * self.dtypes[1].itemsize

    def moments(self, sequences: int, which: str) -> dict[str, int]:
        """Bytes in use at the worst instant of each phase of a step."""
        static, held = self.static.total, 0
        found: dict[str, int] = {}
        for teacher in self.teachers:
            scoring, kept = self._teacher(teacher, sequences, which)
            found["teacher"] = max(found.get("teacher", 0), static + held + scoring)
            held += kept
        # A tied weight's gradient from the head waits for the embedding's.
        waiting = self._weight_gradient if self.tied else 0
        found["forward"] = static + held + self.forward.peak(sequences)
        found["head"] = static + held + self.activations(sequences) + self.head(sequences, which)
        found["backward"] = static + waiting + self.backward.peak(sequences)
        found["optimizer"] = static + self.static.step
        return found

    def _teacher(self, teacher: TeacherPhase, sequences: int, which: str) -> tuple[int, int]:
        """Bytes of a teacher's pass at its worst, and of what it leaves for the loss."""
        tokens = sequences * self.setup.length
        hidden = 2 * tokens * teacher.hidden
        scores = self.setup.method == "pad"
        if which == "dense":
            head, kept = teacher.dense.peak(sequences), teacher.dense.last(sequences)
        else:
            bf16, none = (torch.bfloat16, torch.bfloat16), (False, False, False)
            sizes = (self.setup.gpu_bytes, tokens, self.vocab, (teacher.hidden,))
            head = heads.our_plan(*sizes, bf16, none, True).workspace_bytes if scores else 0
            kept = 0 if scores else hidden
        return max(teacher.decoder.peak(sequences), hidden + head), kept

    def peak(self, sequences: int, which: str) -> int:
        """Most bytes at any time of a step."""
        return max(self.moments(sequences, which).values())

    def largest(self, which: str) -> int:
        """Groups of ``responses`` sequences in the largest micro-batch that fits; 0: none does."""

        def fits(groups: int) -> bool:
            return self.peak(groups * self.setup.responses, which) <= self.setup.room

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def prepare(setup: Setup, checkpointing: Sequence[bool] = (False, True)) -> dict[bool, Step]:
    """Trace a step without (False) and with (True) gradient checkpointing.

    Raises:
        ValueError: vocabularies differ, or a model cannot be built or traced.
    """
    check_vocabularies(setup)
    trace.register_flash()
    with models.no_weights():
        named = zip(heads.METHODS[setup.method], setup.teachers, strict=False)
        teachers = [_teacher_phase(name, config, setup) for name, config in named]
        return {wanted: _step(setup, teachers, wanted) for wanted in checkpointing}


def check_vocabularies(setup: Setup) -> None:
    """Raise unless all models speak of the same tokens."""
    for config in setup.teachers:
        if config.vocab_size != setup.student.vocab_size:
            fail_value(
                "teacher",
                f"the student's vocabulary of {setup.student.vocab_size} entries (a teacher with "
                "another tokenizer cannot be compared token by token)",
                f"{config.vocab_size} entries ({config.model_type})",
            )


def _teacher_phase(name: str, config: Any, setup: Setup) -> tuple[TeacherPhase, int]:
    """A teacher's pass, and its entries."""
    model: Any = models.build(name, config, torch.bfloat16, setup.attention)
    there = [*model.parameters(), *model.buffers()]
    keep = setup.method != "pad"

    def phases(sequences: int) -> list[list[int]]:
        body, hidden = trace.run_body(model, there, (sequences, setup.length), False, train=False)
        return [*body, heads.trace_dense_scores(model, there, hidden, keep)]

    decoder, dense = _traced(name, config, phases)
    hidden = model.get_output_embeddings().weight.shape[1]
    return TeacherPhase(hidden, decoder, dense), models.count(model.parameters())


def _traced(name: str, config: Any, phases: Any) -> list[Affine]:
    try:
        return trace.affine(phases)
    except Exception as error:  # whatever a model's code does with tensors without values
        text = f"{config.model_type}: {models.line_of(error)}"
        fail_value(name, "a model whose step can be traced", text)


def _step(setup: Setup, teachers: list[tuple[TeacherPhase, int]], checkpointing: bool) -> Step:
    lora, master = setup.lora_rank is not None, setup.precision == "fp32-master"
    dtype = torch.float32 if master and not lora else torch.bfloat16
    model: Any = models.build("student", setup.student, dtype, setup.attention)
    if setup.lora_rank is not None:
        models.add_lora(model, setup.lora_rank)
    if checkpointing:
        models.checkpoint(model)
    there, head = trace.gradients_there(model), model.get_output_embeddings()
    dtypes: set[torch.dtype] = set()

    def phases(sequences: int) -> list[list[int]]:
        body, hidden = trace.run_body(model, there, (sequences, setup.length), master, train=True)
        dtypes.add(hidden.dtype)
        others = 0 if setup.method == "pad" else len(teachers)
        return [*body, heads.trace_dense(model, there, hidden, others, master)]

    forward, backward, dense = _traced("student", setup.student, phases)
    return Step(
        setup,
        _static(setup, model, sum(entries for _, entries in teachers)),
        vocab=head.weight.shape[0],
        hidden=head.weight.shape[1],
        dtypes=(dtypes.pop(), head.weight.dtype),
        needs=(True, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad),
        tied=head.weight is model.get_input_embeddings().weight,
        forward=forward,
        backward=backward,
        dense=dense,
        teachers=tuple(phase for phase, _ in teachers),
        needs_flash=not getattr(model, "_supports_sdpa", True),
    )


def _static(setup: Setup, model: nn.Module, teacher_entries: int) -> Static:
    own = list(model.parameters())
    trained = [p for p in own if p.requires_grad]
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return Static(
        entries=models.count(own),
        trained=models.count(trained),
        teacher_entries=teacher_entries,
        parameters=sum(p.nbytes for p in own),
        gradients=sum(p.nbytes for p in trained),
        optimizer=state_bytes(setup.optimizer, trained, tables),
        teachers=2 * teacher_entries,
        step=step_bytes(setup.optimizer, trained),
    )
