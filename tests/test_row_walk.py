"""Statistics, second sweep and gradient in one walk, which overwrites the teacher's logits."""

import pytest
import torch
from row_pass_harness import (
    DTYPES,
    HEADS,
    INF,
    NAN,
    C,
    State,
    Stream,
    acc_of,
    assert_as_good,
    make_streams,
)
from torch import Tensor

KINDS = {
    "jsd": 0.3,
    "symmetric jsd": 0.5,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.2,
    "tvd": 0.5,
    "forward_kl": 0.0,
}
# one entry; less than a vector; odd; more than a tile; several segments of a row
WIDTHS = [1, 7, 507, 2051, 16500]
# Two threads walk over groups of 16 rows from 64 rows on; the last group is not full.
ROWS = 70


def divergence(kind: str, alpha: float, a_s: Tensor, a_t: Tensor) -> Tensor:
    """The value of every row, densely."""
    log_s, log_t = a_s.log_softmax(-1), a_t.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()

    def kl(log_p: Tensor, log_m: Tensor) -> Tensor:
        ratio = torch.where(log_p == -INF, 0.0, log_p) - torch.where(log_p == -INF, 0.0, log_m)
        return (log_p.exp() * ratio).sum(-1)

    def log(p: Tensor) -> Tensor:
        return p.clamp(min=torch.finfo(p.dtype).tiny).log()

    if kind == "tvd":
        return (s - t).abs().sum(-1) / 2
    if kind == "forward_kl":
        return kl(log_t, log_s)
    if kind == "skew_reverse_kl":
        return kl(log_s, log((1 - alpha) * t + alpha * s))
    mean = log(alpha * t + (1 - alpha) * s)
    if kind == "skew_forward_kl":
        return kl(log_t, mean)
    return alpha * kl(log_t, mean) + (1 - alpha) * kl(log_s, mean)


class Case:
    """A block of two streams, and the coefficients of its gradient."""

    def __init__(self, kind: str, rows: int, cols: int, dtype: torch.dtype, head: str) -> None:
        self.kind, self.alpha = kind, KINDS[kind]
        self.streams = make_streams(2, rows, cols, dtype, HEADS[head])
        number = torch.float64
        self.weight, self.c0, self.c1 = (torch.randn(rows, dtype=number) for _ in range(3))
        if kind == "forward_kl":  # which has no loop that adds a constant
            self.c0.zero_()
        self.label = torch.randint(cols, (rows, 1))
        self.sparse = torch.randn(rows, 1, dtype=number)

    def walk(self, threads: int = 2, tile: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Values, the gradient, and the largest magnitudes of column tiles."""
        streams = [
            Stream(s.logits.clone(), s.bias, s.scale, s.softcap, s.temperature)
            for s in self.streams
        ]
        rows, cols = streams[0].logits.shape
        one_sweep = self.kind == "forward_kl"
        moments = [(1, (-1.0, 1.0))] if one_sweep else []
        state = State(streams, moments)
        value, slope = torch.zeros(2, rows, dtype=torch.float64)
        c1 = self.c1 + self.weight if one_sweep else self.c1
        of_teacher = -self.weight
        out = torch.full_like(streams[0].logits, NAN)
        peaks = torch.full((-(-cols // tile) if tile else 0,), NAN)
        terms = C.GradientTerms()
        terms.c1 = c1.data_ptr()
        terms.sparse, terms.sparse_values = (self.label.data_ptr(), 1), self.sparse.data_ptr()
        if one_sweep:
            terms.p = [0, of_teacher.data_ptr()]
        else:
            terms.c0 = self.c0.data_ptr()
            terms.divergence = (self.kind.split()[-1], self.alpha, 1)
            terms.divergence_weight = self.weight.data_ptr()
            terms.divergence_slope = slope.data_ptr()
        C.row_walk(
            *(state.dtype, [s.packed() for s in streams], rows, cols),
            *([m.data_ptr() for m in state.maxima], [s.data_ptr() for s in state.sums]),
            [(w, c, m.data_ptr()) for (w, c), m in zip(moments, state.moment, strict=True)],
            *([0] * len(moments), 0 if one_sweep else value.data_ptr()),
            *(out.data_ptr(), out.stride(0), terms),
            *(tile, peaks.data_ptr() if tile else 0, threads),
        )
        alone = State(self.streams, moments)
        C.row_statistics(
            *(state.dtype, [s.packed() for s in self.streams], rows, cols, 0),
            *([m.data_ptr() for m in alone.maxima], [s.data_ptr() for s in alone.sums]),
            [(w, c, m.data_ptr()) for (w, c), m in zip(moments, alone.moment, strict=True)],
        )
        assert state.maxima.equal(alone.maxima)
        rtol = 4 * torch.finfo(acc_of(out.dtype)).eps  # loops that keep something are compiled anew
        torch.testing.assert_close(state.sums, alone.sums, rtol=rtol, atol=0)
        if one_sweep:
            torch.testing.assert_close(state.moment, alone.moment, rtol=4 * rtol, atol=40 * rtol)
            student, teacher = state.sums
            value = state.moment[0] / teacher + (student / teacher).log()
        self.overwritten = not streams[1].logits.equal(self.streams[1].logits)
        return value, out, peaks

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values and gradient by autograd in ``dtype``."""
        (a_s, chain), (a_t, _) = (s.transformed(dtype) for s in self.streams)
        a_s = a_s.requires_grad_()
        value = divergence(self.kind, self.alpha, a_s, a_t)
        (d,) = torch.autograd.grad((value * self.weight.to(dtype)).sum(), a_s)
        share = a_s.detach().softmax(-1)
        d = d + self.c0.to(dtype)[:, None] + share * self.c1.to(dtype)[:, None]
        d.scatter_add_(1, self.label, self.sparse.to(dtype))
        return value.detach(), d * chain

    def judge(self, value: Tensor, out: Tensor) -> None:
        """The accuracy rule."""
        exact, exact_gradient = self.dense(torch.float64)
        dense, dense_gradient = self.dense(acc_of(out.dtype))
        # The float64 oracle is not exact itself.
        of_values, of_gradients = (8, 8) if out.dtype == torch.float64 else (2, 3)
        assert_as_good(value, exact, dense, of_values)
        assert_as_good(out, exact_gradient, dense_gradient.to(out.dtype), of_gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "cols"),
    # A float64 oracle is no more exact than the pass itself over a long row.
    [(d, n) for d in DTYPES for n in WIDTHS if d != torch.float64 or n < 5000],
)
def test_values_and_gradient(dtype: torch.dtype, kind: str, cols: int) -> None:
    torch.manual_seed(cols)
    case = Case(kind, ROWS, cols, dtype, "plain")
    value, out, _ = case.walk()
    assert case.overwritten
    case.judge(value, out)


@pytest.mark.parametrize("kind", ["symmetric jsd", "skew_forward_kl", "forward_kl"])
@pytest.mark.parametrize("slope", [30.0, -30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_has_a_maximum_of_its_own(dtype: torch.dtype, slope: float, kind: str) -> None:
    """Logits that rise, fall or vanish along the row: what is kept of a tile is scaled later."""
    torch.manual_seed(5)
    case = Case(kind, 64, 17000, dtype, "plain")
    for stream in case.streams:
        stream.logits += torch.linspace(0, slope, 17000).to(dtype)
    value, out, _ = case.walk()
    assert case.overwritten
    case.judge(value, out)


@pytest.mark.parametrize("head", ["bias", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_heads_keep_nothing(dtype: torch.dtype, head: str) -> None:
    torch.manual_seed(1)
    case = Case("jsd", ROWS, 507, dtype, head)
    value, out, _ = case.walk()
    assert not case.overwritten
    case.judge(value, out)


@pytest.mark.parametrize("rows", [1, 5, 63])
def test_few_rows_make_one_pass_after_the_other(rows: int) -> None:
    torch.manual_seed(rows)
    case = Case("jsd", rows, 507, torch.float32, "plain")
    value, out, _ = case.walk()
    assert not case.overwritten
    case.judge(value, out)


@pytest.mark.parametrize("kind", ["jsd", "forward_kl"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(2)
    case = Case(kind, ROWS, 2051, dtype, "plain")
    one, two = case.walk(threads=1), case.walk(threads=2)
    assert one[0].equal(two[0]) and one[1].equal(two[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_without_mass(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    case = Case("jsd", ROWS, 507, dtype, "plain")
    neither, student, teacher = 3, 5, 8
    for stream, gone in ((0, [neither, student]), (1, [neither, teacher])):
        case.streams[stream].logits[:, gone] = -INF
    case.c0.zero_()
    case.sparse.zero_()
    value, out, _ = case.walk()
    exact, exact_gradient = case.dense(torch.float64)
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    assert (out[:, [neither, student]] == 0).all()
    seen = exact_gradient[:, teacher].norm()
    assert (out[:, teacher].double() - exact_gradient[:, teacher]).norm() < 0.01 * seen


# Of three streams: an entropy's, a reverse KL's, an advantage's.
CENTRED = [(1.0, 0.0, 0.0), (1.0, -1.0, 0.0), (0.0, 1.0, -1.0)]


def centred_dense(
    streams: list[Stream], weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of the weighted means under the student, and the size of what it is a difference of.

    The factors are held, and so are the teachers.
    """
    (a, chain), *teachers = (s.transformed(dtype) for s in streams)
    a = a.requires_grad_()
    logits = [a, *(t for t, _ in teachers)]
    share = a.softmax(-1)
    total, size = torch.zeros((), dtype=dtype), torch.zeros_like(a)
    for weight, coefficients in zip(weights, CENTRED, strict=True):
        factor = sum(c * z.detach() for c, z in zip(coefficients, logits, strict=True))
        total = total + ((share * factor).sum(-1) * weight.to(dtype)).sum()
        size += (share * (factor - factor.mean()).abs() * weight[:, None].abs()).detach()
    (d,) = torch.autograd.grad(total, a)
    return d * chain, 2 * size * chain


@pytest.mark.parametrize(
    ("rows", "cols", "head"),
    [
        *[(5, 507, "plain"), (ROWS, 1, "plain"), (ROWS, 507, "plain"), (ROWS, 507, "all")],
        *[(ROWS, 2051, "plain"), (ROWS, 16500, "plain")],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_centred_moments(dtype: torch.dtype, rows: int, cols: int, head: str) -> None:
    """Their means, which the first sweep finds, are taken off inside the row."""
    torch.manual_seed(rows + cols)
    streams = make_streams(3, rows, cols, dtype, HEADS[head])
    weights = torch.randn(len(CENTRED), rows, dtype=torch.float64)
    state = State(streams)
    found = torch.zeros(len(CENTRED), rows, dtype=torch.float64)
    c1 = torch.zeros(rows, dtype=torch.float64)
    q = torch.tensor(CENTRED, dtype=torch.float64).t() @ weights
    out = torch.full_like(streams[0].logits, NAN)
    terms = C.GradientTerms()
    terms.c1, terms.q = c1.data_ptr(), [x.data_ptr() for x in q]
    C.row_walk(
        *(state.dtype, [s.packed() for s in streams], rows, cols),
        *([m.data_ptr() for m in state.maxima], [s.data_ptr() for s in state.sums]),
        [(0, c, m.data_ptr()) for c, m in zip(CENTRED, found, strict=True)],
        [w.data_ptr() for w in weights],
        *(0, out.data_ptr(), out.stride(0), terms),
        threads=2,
    )
    exact, size = centred_dense(streams, weights, torch.float64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dense, _ = centred_dense(streams, weights, acc)
    # A float64 oracle is no more exact than the pass.
    assert_as_good(out, exact, dense.to(dtype), 3, size if dtype == torch.float64 else None)
    mean = -(weights * found / state.sums[0]).sum(0)
    torch.testing.assert_close(c1, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centred": []}, r"centred: expected one pointer per moment, got 0"),
        ({"weight": 1}, r"centred\[0\]: expected a moment of stream 0, got one of stream 1"),
        ({"c1": 0}, "c1"),
    ],
    ids=str,
)
def test_what_is_centred_is_checked(change: dict[str, object], message: str) -> None:
    streams = make_streams(2, 5, 7, torch.float32, {})
    state, number = State(streams), torch.zeros(5, dtype=torch.float64)
    given = {"centred": [number.data_ptr()], "weight": 0, "c1": number.data_ptr()} | change
    terms = C.GradientTerms()
    terms.c1 = given["c1"]
    out = torch.empty(5, 7)
    with pytest.raises(ValueError, match=message):
        C.row_walk(
            *(state.dtype, [s.packed() for s in streams], 5, 7),
            *([m.data_ptr() for m in state.maxima], [s.data_ptr() for s in state.sums]),
            *([(given["weight"], (1.0, -1.0), number.data_ptr())], given["centred"]),
            *(0, out.data_ptr(), out.stride(0), terms),
        )


@pytest.mark.parametrize("tile", [100, 2048, 3000])
def test_tile_magnitudes(tile: int) -> None:
    torch.manual_seed(4)
    case = Case("jsd", ROWS, 5000, torch.bfloat16, "plain")
    _, out, peaks = case.walk(tile=tile)
    assert peaks.tolist() == [part.abs().max().item() for part in out.split(tile, dim=1)]
