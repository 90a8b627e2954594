"""The benchmark: what passes the gate, what it writes, and that it never hides a peer."""

import argparse
import json
import pathlib
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F

import pad_kernels as pk
from pad_kernels.bench import cases, measure, memory, report, runner, timing
from pad_kernels.bench.cases import OPS, Case, make_inputs
from pad_kernels.bench.implementations import (
    Implementation,
    Unavailable,
    all_implementations,
    step,
)
from pad_kernels.bench.peers import dense

CPU = torch.device("cpu")
NEED_CPP = pytest.mark.skipif(
    pk.available_backends()["cpp"] != "available", reason="the extension is not built"
)


def _case(op: str, dtype: str = "float32", ignored: float = 0.0) -> Case:
    return Case(op, 24, 16, 300, dtype, ignored)


def _options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser.parse_args(words)


def _wrong(case: Case):
    right = dense(case)
    return lambda x: right(x) * 1.001


def _raises(case: Case):
    def function(x):
        raise RuntimeError("out of luck")

    return function


def _missing(case: Case):
    raise Unavailable("not here")


def test_what_fails_is_listed_and_not_timed() -> None:
    case = _case("cross_entropy")
    builders = {"right": dense, "wrong": _wrong, "raises": _raises, "missing": _missing}
    implementations = [Implementation(n, "cross_entropy", b) for n, b in builders.items()]
    implementations.append(Implementation("long", "cross_entropy", dense, largest=1.0))
    record = measure.measure(case, implementations, 2, CPU)
    rows = {row["implementation"]: row for row in record["rows"]}
    states = {name: row["status"] for name, row in rows.items()}
    assert states == {
        "right": "ok",
        "wrong": "inaccurate",
        "raises": "failed",
        "missing": "missing",
        "long": "skipped",
    }
    assert "value: error" in rows["wrong"]["reason"]
    assert rows["raises"]["reason"] == "RuntimeError: out of luck"
    assert [name for name, row in rows.items() if "time_ms" in row] == ["right"]
    text = report.table(record)
    assert all(name in text for name in builders) and "missing: not here" in text


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_passes_the_gate_or_says_why(op: str, dtype: str) -> None:
    chosen = [i for i in all_implementations() if i.op == op and not i.compiled]
    record = measure.measure(_case(op, dtype), chosen, 2, CPU)
    for row in record["rows"]:
        if row["ours"]:
            assert row["status"] == "ok" or "cpp" in row["implementation"], row
        else:
            assert row["status"] == "ok" or row["reason"], row


def _named(name: str, op: str = "cross_entropy") -> list[Implementation]:
    found = [i for i in all_implementations() if i.name == name and i.op == op]
    assert len(found) == 1
    return found


def _only_row(implementations: list[Implementation]) -> dict:
    # Eight sequences of three tokens, for the peer that wants sequences.
    op = implementations[0].op
    return measure.measure(_case(op), implementations, 1, CPU)["rows"][0]


@pytest.mark.parametrize(
    "name, module, op",
    [
        ("Cut Cross-Entropy", "cut_cross_entropy", "cross_entropy"),
        ("Liger fused", "liger_kernel.transformers", "cross_entropy"),
        (
            "Liger chunked",
            "liger_kernel.chunked_loss.fused_linear_preference",
            "cross_entropy",
        ),
        ("Liger chunked", "liger_kernel.chunked_loss", "jsd"),
    ],
)
def test_a_peer_that_is_not_installed_is_listed_as_missing(
    name: str, module: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    row = _only_row(_named(name, op))
    assert row["status"] == "missing" and "pad-kernels[peers]" in row["reason"]


def test_a_torch_without_its_own_function_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert _only_row(_named("F.linear_cross_entropy"))["status"] == "missing"


def test_a_machine_without_a_compiler_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    row = _only_row(_named("dense torch.compile"))
    assert row["status"] == "missing" and "compiler" in row["reason"]


def test_a_backend_that_is_missing_is_listed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pk, "available_backends", lambda: {"cpp": "no compiler was found"})
    row = _only_row(_named("pad_kernels early:cpp"))
    assert (row["status"], row["reason"]) == ("missing", "no compiler was found")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, package, op",
    [
        ("dense torch.compile", "torch", "cross_entropy"),
        ("dense torch.compile", "torch", "logprob"),
        ("dense torch.compile", "torch", "advantage"),
        ("Liger chunked", "liger_kernel", "jsd"),
        ("Liger chunked", "liger_kernel", "distill"),
        ("Cut Cross-Entropy", "cut_cross_entropy", "cross_entropy"),
        ("Liger chunked", "liger_kernel", "cross_entropy"),
    ],
)
def test_what_compiles_passes_the_gate(name: str, package: str, op: str) -> None:
    pytest.importorskip(package)
    assert _only_row(_named(name, op))["status"] in ("ok", "missing")


def test_cut_cross_entropy_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the peer's signature, so that its adapter runs where it is not installed."""

    def linear_cross_entropy(e, c, targets, ignore_index=-100, *, impl):
        assert impl == "torch_compile"
        return F.cross_entropy(F.linear(e, c), targets)

    module = types.ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    assert _only_row(_named("Cut Cross-Entropy"))["status"] == "ok"


def test_gradients_do_not_leak_from_one_implementation_into_the_next() -> None:
    """An implementation that makes no gradients must not pass on those of the one before."""

    def idle(case: Case):
        right = dense(case)
        return lambda x: right(x).detach().requires_grad_()

    case = _case("cross_entropy")
    implementations = [
        Implementation("right", case.op, dense),
        Implementation("idle", case.op, idle),
    ]
    record = measure.measure(case, implementations, 2, CPU)
    assert [row["status"] for row in record["rows"]] == ["ok", "failed"]


def test_slow_ones_sit_rounds_out_and_the_order_changes() -> None:
    inputs = make_inputs(_case("cross_entropy"), CPU)
    floor = timing.Floor(_case("cross_entropy"), inputs)
    floor.round = lambda device: timing.Products(1e-9, 1e-9)
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    measured = timing.time_rounds(steps, floor, inputs, 4, 6)
    assert order[::2] == order[1::2]  # each twice in a row
    first, second = order[:6:2], order[6::2]
    assert sorted(first) == sorted(second) == ["a", "b", "c"]
    assert first != second
    assert [s is None for s in measured.seconds["a"]] == [False, False, True, True]


def test_patience_ends_after_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    inputs = make_inputs(_case("cross_entropy"), CPU)
    floor = timing.Floor(_case("cross_entropy"), inputs)
    measured = timing.time_rounds({"a": lambda: None}, floor, inputs, 9, 6)
    assert len(measured.floors) == len(measured.seconds["a"]) == 2


def test_what_is_far_too_slow_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleepy(case: Case):
        right = dense(case)

        def function(x):
            time.sleep(0.2)
            return right(x)

        return function

    monkeypatch.setattr(timing, "SECONDS", 0.1)
    case = _case("cross_entropy")
    implementations = [Implementation("sleepy", case.op, sleepy)]
    row = measure.measure(case, implementations, 3, CPU)["rows"][0]
    assert row["rounds"] == 0 and row["time_ms"] > 200 and row["ratio"] > 5
    assert "one step" in report._cells(row)


def test_spread_of_one_value_and_of_many() -> None:
    assert timing.Spread.of([2.0]) == timing.Spread(2.0, 2.0, 2.0)
    assert timing.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0)


def test_ignored_share_is_measured_for_each() -> None:
    case = _case("cross_entropy")
    implementations = [
        Implementation("dense", case.op, dense),
        Implementation("broken", case.op, _raises),
    ]
    rows = measure.measure_ignored(case, implementations, 2, CPU)
    assert [row["implementation"] for row in rows] == ["dense"]
    assert rows[0]["share"] > 0 and rows[0]["ignored"] == 0.8


@pytest.mark.memory
def test_peak_memory_of_dense_logits_is_seen() -> None:
    """Float32 log-softmax and its gradient: at least two N×V buffers, at most four."""
    case = Case("cross_entropy", 512, 8, 16384, "float32")
    seen = memory.finish(memory.start(case, "dense eager", "cpu", 2))
    buffer = case.tokens * case.vocab * 4 / memory.MIB
    assert seen is not None and 1.9 * buffer < seen < 4 * buffer


@pytest.mark.memory
def test_a_broken_child_has_no_figure(capfd: pytest.CaptureFixture) -> None:
    child = memory.start(_case("cross_entropy"), "nothing of that name", "cpu", 1)
    assert memory.finish(child) is None
    assert "IndexError" in capfd.readouterr().err


@NEED_CPP
def test_a_run_writes_table_json_and_plots(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cases, "QUICK_SHAPES", ((16, 8, 200),))
    ops = ["cross_entropy", "logprob", "score", "advantage"]
    options = _options("--quick", "--repeats", "2", "--dtype", "float32", "--op", *ops)
    options.out = tmp_path
    # Each has its process for the memory; a few are enough.
    few = ("pad_kernels early:cpp", "pad_kernels kept:cpp", "dense eager", "Liger fused")
    monkeypatch.setattr(
        runner,
        "all_implementations",
        lambda device: [i for i in all_implementations(device) if i.name in few],
    )
    assert runner.run(options) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [case["op"] for case in result["cases"]] == ops
    assert result["meta"]["versions"]["pad_kernels"] == pk.__version__
    assert {"commit", "cpu", "date", "command", "threads"} <= set(result["meta"])
    first = result["cases"][0]["rows"][0]
    assert first["ours"] and first["ratio"] > 0 and first["peak_mib"] is not None
    assert result["ignored"] and all(row["share"] > 0 for row in result["ignored"])
    pngs = {path.name for path in tmp_path.glob("*.png")}
    assert {"cross_entropy_time.png", "logprob_memory.png", "score_time.png"} <= pngs
    assert {"advantage_time.png", "advantage_memory.png"} <= pngs
    shown = capsys.readouterr().out
    assert "pad_kernels early:cpp" in shown and "dense eager" in shown
    assert report.markdown(result).count("| pad_kernels") == 3


@pytest.mark.parametrize(
    "words, count",
    [([], 2), (["--all"], 6), (["--op", "jsd"], 6), (["--case", "jsd/512"], 2), (["--quick"], 2)],
)
def test_naming_an_operation_asks_for_all_its_shapes(words: list[str], count: int) -> None:
    found = [case.op for case in runner._select(_options(*words))]
    assert found.count("jsd") == count


@pytest.mark.parametrize("words", [["--case", "nothing"], ["--impl", "nothing", "--quick"]])
def test_filters_that_leave_nothing_say_so(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="nothing"):
        runner.run(_options(*words))


def test_cuda_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        runner.run(_options("--device", "cuda"))


def test_help_of_the_script(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--help"])
    assert "--no-memory" in capsys.readouterr().out


def test_a_step_without_gradient_makes_none() -> None:
    case = _case("score")
    inputs = make_inputs(case, CPU)
    value = step(dense(case), case, inputs)
    assert not value.requires_grad and inputs.hidden.grad is None
