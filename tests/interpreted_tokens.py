"""Largest and given tokens' logits under the interpreter."""

from collections.abc import Callable

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import pytest
import torch
from oracles import GRADIENTS, VALUES, assert_by_norm
from torch import Tensor

import pad_kernels as pk
from pad_kernels.backends import choice
from pad_kernels.backends.triton import topk
from pad_kernels.backends.triton.backend import TritonBackend
from pad_kernels.engine import candidates
from pad_kernels.engine.candidates import candidate_logits
from pad_kernels.engine.problem import Stream
from pad_kernels.functionals.statistics import Block, Largest, empty_stats, measure
from pad_kernels.heads import HeadOptions

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("dtype", "rows", "vocab", "k"),
    [
        *((torch.bfloat16, 3, 500, 17), (torch.float16, 2, 300, 1)),
        *((dtype, 2, 9, 16) for dtype in DTYPES),
        (torch.float32, 1, 1, 4),
    ],
)
def test_largest(dtype: torch.dtype, rows: int, vocab: int, k: int) -> None:
    """Chunks in any order; many equal values, -inf and both zeros among them."""
    raw = torch.randint(-4, 5, (rows, vocab + 3)).to(dtype)[:, :vocab] / 2
    raw[torch.rand(rows, vocab) < 0.3] = -torch.inf
    raw[torch.rand(rows, vocab) < 0.1] = -0.0
    head = HeadOptions(3.0, 1.0, 0.5)
    bias = torch.randint(-1, 2, (vocab,)).float()
    stream = Stream(torch.empty(0), torch.empty(0), bias, head)
    statistic = Largest(k)
    state = empty_stats([statistic], 2 * rows, {}, torch.device("cpu"))[statistic][:, rows:]
    cuts = [0, vocab // 3, vocab // 3 + vocab // 2, vocab]
    for i in (2, 0, 1):
        a, b = cuts[i], cuts[i + 1]
        if a < b:
            topk.merge_largest(stream, raw[:, a:b], a, state, tile=64).run()
    logits = head.transform(raw.float() + bias)
    exact = measure([statistic], Block({0: logits}, 0, {}), None)[statistic]
    assert torch.equal(state[k:], exact[k:])
    torch.testing.assert_close(state[:k], exact[:k], rtol=1e-6, atol=1e-6)


def test_topk_op() -> None:
    hidden, weight = torch.randn(2, 24), torch.randn(515, 24)
    found = pk.linear_topk(hidden, weight, 3, plan="triton")
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).topk(3)
    assert torch.equal(found.ids, exact.indices)
    torch.testing.assert_close(found.logprobs.double(), exact.values, rtol=1e-6, atol=2e-6)


#: Rows, vocabulary, features, ids a row: nothing divides; one of each; more ids than a step takes.
GATHERED = [(9, 50, 133, 21), (1, 1, 1, 1), (3, 507, 123, 5), (40, 7, 16, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GATHERED)
def test_candidate_logits(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Only the rows that count are looked at; -inf weights; ids of several rows."""
    rows, vocab, size, k = shape
    hidden = torch.randn(rows, size + 3).to(dtype)[:, :size]
    weight = torch.randn(vocab + 2, size).t().contiguous().t().to(dtype)
    ids, logprobs = torch.rand(rows, vocab).argsort(1)[:, :k], torch.full((rows, k), -4.0)
    counted = torch.rand(rows) < 0.7
    counted[0] = True
    ids[~counted], logprobs[~counted] = -7, torch.nan  # nobody looks
    if vocab > 1:
        weight[int(ids[0, 0]), 0] = -torch.inf
        hidden[:, 0] = hidden[:, 0].abs() + 0.1
    upstream, found = torch.randn(rows, k), []
    upstream[(ids == ids[0, 0]) & counted[:, None]] = 0.25
    for working in (dtype, torch.float64, torch.float32):
        h, w = (x.detach().to(working).requires_grad_() for x in (hidden, weight))
        if working == dtype:
            z = candidate_logits(h, w, ids, logprobs, counted, vocab, "triton")
            assert not z[~counted].any()
        else:
            z = (h.unsqueeze(1) * w[ids.clamp(0)]).sum(-1).masked_fill(~counted[:, None], 0.0)
        z.backward(upstream)
        assert h.grad is not None and w.grad is not None
        found.append((z.detach().double(), h.grad.double(), w.grad.double()))
    for i, (got, exact, dense) in enumerate(zip(*found, strict=True)):
        fine = torch.isfinite(exact)
        torch.testing.assert_close(got[~fine], exact[~fine], rtol=0, atol=0, equal_nan=True)
        eps = torch.finfo(torch.float32 if i == 0 else dtype).eps
        got, exact, dense = got[fine], exact[fine], dense[fine]
        assert_by_norm(got, exact, dense, GRADIENTS if i else VALUES, 2 * eps)


@pytest.mark.parametrize(("plan", "gathers"), [(None, True), ("triton", True), ("cpp", False)])
def test_a_named_backend_does_it(
    monkeypatch: pytest.MonkeyPatch,
    calls_of: Callable[..., list[str]],
    plan: str | None,
    gathers: bool,
) -> None:
    """Forward and backward, of a divergence alone and of one beside a pass."""
    calls = calls_of(TritonBackend, "gather_logits", "gather_gradients")
    monkeypatch.setitem(choice.PREFERRED, "cpu", choice.PREFERRED["cuda"])
    hidden, weight = torch.randn(2, 16, requires_grad=True), torch.randn(9, 16)
    teacher = pk.TopKTeacher(
        torch.tensor([[1, 2], [3, 4]]), torch.full((2, 2), -1.0), "renormalize"
    )
    student = pk.Head(hidden, weight)
    pk.linear_divergence(student, teacher, plan=plan).backward()
    both = pk.linear_distill(
        student, torch.tensor([1, 2]), teacher=teacher, divergence_weight=1.0, plan=plan
    )
    both.loss.backward()
    assert calls == ["gather_logits", "gather_gradients"] * 2 * gathers


def test_a_wrong_candidate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, counted = torch.randn(2, 4), torch.randn(9, 4), torch.tensor([True, False])
    logprobs = torch.full((2, 1), -1.0)

    def logits_of(ids: list[list[int]]) -> Tensor:
        return candidate_logits(hidden, weight, torch.tensor(ids), logprobs, counted, 8, "triton")

    with pytest.raises(ValueError, match=r"teacher.ids: expected token ids in \[0, 8\)"):
        logits_of([[8], [0]])
    found = logits_of([[7], [8]])
    torch.testing.assert_close(found[0, 0], hidden[0] @ weight[7])
    assert found[1, 0] == 0
    monkeypatch.setattr(candidates, "capturing", lambda *_: True)  # nobody can be told
    for ids in ([[8], [0]], [[-1], [0]]):
        assert logits_of(ids).isnan().all()
