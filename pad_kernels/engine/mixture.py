"""Losses against teachers, put together: which functionals, over which streams and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels._checks import check_choice, check_number, fail_type, fail_value
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.engine.call import Call, autocast_dtype
from pad_kernels.engine.candidates import candidate_logits
from pad_kernels.engine.plan import PlanLike
from pad_kernels.functionals import Advantage, Functional, TopKDivergence
from pad_kernels.functionals import TopKAdvantage as TopKAdvantageFunctional
from pad_kernels.functionals.divergence import DEFAULT_ALPHA, KINDS, divergence, outcome
from pad_kernels.heads import Head, HeadOptions
from pad_kernels.offline import TopKAdvantage, TopKTeacher


def check_kind(kind: str, alpha: float | None) -> float:
    """Check a divergence's kind and alpha; return the alpha in force (0 where there is none)."""
    check_choice("kind", kind, KINDS)
    if kind not in DEFAULT_ALPHA:
        if alpha is not None:
            fail_value("alpha", f"None for kind={kind!r}, which has no mixture", alpha)
        return 0.0
    if alpha is None:
        return DEFAULT_ALPHA[kind]
    number = check_number("alpha", alpha)
    if not 0 < number < 1:
        expected = "a number in (0, 1) (at the ends use kind='forward_kl' or 'reverse_kl')"
        fail_value("alpha", expected, alpha)
    return number


def check_pair(aligned: Head | TopKAdvantage, reference: Head | None) -> None:
    """Raise unless these are two heads, or offline log-ratios on their own."""
    if not isinstance(aligned, Head | TopKAdvantage):
        fail_type("aligned", "a pad_kernels.Head or TopKAdvantage", aligned)
    if isinstance(aligned, TopKAdvantage):
        if reference is not None:
            fail_type("reference", "None: offline log-ratios have it in them", reference)
    elif not isinstance(reference, Head):
        fail_type("reference", "a pad_kernels.Head to go with aligned", reference)


class Mixture:
    """The student, its teachers, and the functionals of one pass over them.

    Args:
        student: the head that may want gradients.
    """

    def __init__(self, student: Head) -> None:
        # First of all: what is offline is checked against the student's shapes.
        self._options = student.checked("student.", gemm=autocast_dtype(student.hidden.device))
        self.student = student
        self._teachers: list[Head] = []
        self._names = ["student."]
        self._inputs: dict[str, Tensor] = {}
        self.functionals: list[Functional] = []

    def _stream(self, head: Head, name: str) -> int:
        """The number of a teacher's stream; the same head twice is one stream."""
        for j, known in enumerate(self._teachers, 1):
            if _same(known, head):
                return j
        self._teachers.append(head)
        self._names.append(name + ".")
        return len(self._teachers)

    def add(self, functional: Functional) -> int:
        """Add a functional; returns the place of its value among the outputs."""
        self.functionals.append(functional)
        return len(self.functionals) - 1

    def add_divergence(self, teacher: Head | TopKTeacher, kind: str, alpha: float) -> int:
        """Add a divergence to a teacher that is not a renormalised offline one."""
        if isinstance(teacher, Head):
            return self.add(divergence(kind, alpha, self._stream(teacher, "teacher")))
        self._check_offline(teacher, "teacher")
        self._inputs["teacher_ids"] = _flat(teacher.ids).to(torch.int64)
        self._inputs["teacher_logprobs"] = _flat(teacher.logprobs)
        whole = teacher.ids.shape[-1] == self.student.vocab
        return self.add(TopKDivergence(kind, alpha, whole))

    def renormalized(
        self, teacher: TopKTeacher, kind: str, alpha: float, counted: Tensor, backend: str
    ) -> Tensor:
        """Divergence to a renormalised offline teacher, [N]; no pass over the vocabulary."""
        self._check_offline(teacher, "teacher")
        return _renormalized(self.student, self._options, teacher, kind, alpha, counted, backend)

    def add_advantage(self, aligned: Head | TopKAdvantage, reference: Head | None) -> int:
        """Add the expected log-ratio of an aligned and a reference teacher."""
        check_pair(aligned, reference)
        if isinstance(aligned, TopKAdvantage):
            self._check_offline(aligned, "aligned")
            self._inputs["advantage_ids"] = _flat(aligned.ids).to(torch.int64)
            self._inputs["advantage_values"] = _flat(aligned.values)
            return self.add(TopKAdvantageFunctional())
        assert reference is not None
        return self.add(
            Advantage(self._stream(aligned, "aligned"), self._stream(reference, "reference"))
        )

    def _check_offline(self, offline: TopKTeacher | TopKAdvantage, name: str) -> None:
        leading = self.student.hidden.shape[:-1]
        offline.checked(name + ".", leading, self.student.vocab)
        if offline.ids.device != self.student.hidden.device:
            expected = f"a tensor on {self.student.hidden.device}"
            fail_value(name + ".ids", expected, f"one on {offline.ids.device}")

    def call(self, labels: Tensor | None, ignore_index: int, plan: PlanLike) -> Call:
        """The call of the row engine; ``labels`` are aligned, [...]."""
        inputs = dict(self._inputs)
        if labels is not None:
            inputs["labels"] = labels.reshape(-1, 1)
        return Call(
            self.student,
            tuple(self._teachers),
            inputs,
            None if labels is None else ignore_index,
            plan,
            tuple(self._names),
        )


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _same(a: Head, b: Head) -> bool:
    """Whether two heads compute the same logits."""
    tensors = all(getattr(a, n) is getattr(b, n) for n in ("hidden", "weight", "bias"))
    names = ("softcap", "logit_scale", "temperature", "vocab_size")
    return tensors and all(getattr(a, n) == getattr(b, n) for n in names)


def _renormalized(
    student: Head,
    options: HeadOptions,
    teacher: TopKTeacher,
    kind: str,
    alpha: float,
    counted: Tensor,
    backend: str,
) -> Tensor:
    """Divergence over a teacher's k tokens alone, both sides renormalised; [N], differentiable.

    Args:
        student, options: the student and its checked options.
        teacher: ``tail`` is "renormalize"; its shapes are checked already.
        counted: bool [N], rows to compute; the others are 0.
        backend: the one that the caller named, or "".
    """
    dtype = accumulate_dtype(student.hidden.dtype)
    kept = counted.unsqueeze(1)
    ids = torch.where(kept, _flat(teacher.ids).to(torch.int64), 0)
    logprobs = torch.where(kept, _flat(teacher.logprobs), 0.0)
    hidden, weight, vocab = student.rows, student.weight, student.vocab
    raw = candidate_logits(hidden, weight, ids, logprobs, counted, vocab, backend)
    if student.bias is not None:
        raw = raw + student.bias.to(dtype)[ids]
    logits = options.transform(raw)
    with torch.no_grad():
        s, t = logits.double().log_softmax(-1), logprobs.double().log_softmax(-1)
        found = outcome(kind, alpha, s, t)
        value = (found.value + found.balance * (s.exp() - t.exp())).sum(-1).to(dtype)
        gradient = (found.slope - s.exp() * found.slope.sum(-1, keepdim=True)).to(dtype)
    # Its value is 0; what it adds is the gradient by the logits, in closed form.
    carries = (gradient != 0) & logits.isfinite()
    carrier = torch.where(carries, gradient * (logits - logits.detach()), 0.0).sum(-1)
    return torch.where(counted, value + carrier, 0.0)
