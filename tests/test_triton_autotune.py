"""Measured block sizes: what is tried, kept, read again and ignored; the clock is the test's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
# isort: split
from triton.runtime.errors import OutOfResources

from pad_kernels.backends.triton import autotune, configs, tilings
from pad_kernels.backends.triton.configs import RowConfig
from pad_kernels.backends.triton.tilings import Tiling
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.workspace import Workspace, account

SHIPPED, FAST, TOO_LARGE = (Tiling(16, 32, 16, 4, 3, group) for group in (1, 2, 3))
LIKE = torch.empty(1)


class Clock:
    """Stands for do_bench; ``tried`` are the tilings that ran."""

    def __init__(self) -> None:
        self.tried: list[Tiling] = []

    def launches(self, tiling: Tiling, scratch: Workspace) -> list[SimpleNamespace]:
        scratch.empty(1000, dtype=torch.float32)
        assert account.current == 4000, "what the last trial took is given back"
        if tiling == TOO_LARGE:
            raise OutOfResources(1 << 20, 1 << 17, "shared memory")
        return [SimpleNamespace(run=lambda: self.tried.append(tiling))]

    def __call__(self, trial: Callable[[], None], return_mode: str) -> float:
        trial()
        return 1.0 if self.tried[-1] == FAST else 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    found = Clock()
    monkeypatch.setattr(autotune, "do_bench", found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PAD_KERNELS_AUTOTUNE", "1")
    card = SimpleNamespace(name="A/GPU 1", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    autotune.choices.cache_clear()
    yield found
    autotune.choices.cache_clear()


def choose(clock: Clock, key: str, *more: Tiling) -> Tiling:
    found = autotune.choose(key, LIKE, SHIPPED, more, clock.launches)
    assert account.current == 0
    return found


def file_in(folder: Path) -> Path:
    (found,) = (folder / "pad_kernels").iterdir()
    assert found.name.startswith("A-GPU-1-sm_90-triton-")
    return found


def test_the_fastest_is_measured_once(clock: Clock, tmp_path: Path) -> None:
    assert choose(clock, "a", FAST, TOO_LARGE) == FAST
    assert clock.tried == [SHIPPED, FAST]
    autotune.choices.cache_clear()  # another process
    assert choose(clock, "a", FAST, TOO_LARGE) == FAST
    assert len(clock.tried) == 2
    assert choose(clock, "b", FAST) == FAST
    assert set(json.loads(file_in(tmp_path).read_text())) == {"a", "b"}


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(clock: Clock) -> None:
    assert choose(clock, "a", FAST) == FAST
    assert choose(clock, "a", Tiling(64, 64, 64, 4, 3)) == SHIPPED
    assert len(clock.tried) == 4


def test_processes_do_not_forget_what_others_kept(clock: Clock, tmp_path: Path) -> None:
    choose(clock, "a", FAST)
    first = autotune.choices(LIKE.device)
    autotune.choices.cache_clear()
    choose(clock, "b", FAST)
    first.put("c", SHIPPED)
    assert set(json.loads(file_in(tmp_path).read_text())) == {"a", "b", "c"}


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_named_and_replaced(clock: Clock, tmp_path: Path, text: str) -> None:
    choose(clock, "a", FAST)
    file_in(tmp_path).write_text(text, encoding="latin-1")
    autotune.choices.cache_clear()
    with pytest.warns(UserWarning, match="expected measured block sizes as JSON.*ignored"):
        assert choose(clock, "a", FAST) == FAST
    assert len(clock.tried) == 4
    assert list(json.loads(file_in(tmp_path).read_text())) == ["a"]


def test_a_directory_that_cannot_be_written(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "pad_kernels").write_text("a file")
    with pytest.warns(UserWarning):
        assert choose(clock, "a", FAST) == FAST
    assert choose(clock, "a", FAST) == FAST
    assert len(clock.tried) == 2


@pytest.mark.parametrize("kept", [{"rows": 16}, {**vars(FAST), "clusters": 2}, 7, None, [1, 2]])
def test_a_choice_of_another_version_is_measured_again(
    clock: Clock, tmp_path: Path, kept: object
) -> None:
    """Block sizes that lost or gained a field, and what nobody here has written."""
    choose(clock, "other", FAST)
    file = file_in(tmp_path)
    file.write_text(json.dumps({"a": kept, "b": vars(FAST)}), encoding="utf-8")
    autotune.choices.cache_clear()
    assert choose(clock, "a", FAST) == FAST
    assert choose(clock, "b", FAST) == FAST
    assert len(clock.tried) == 4, "b was kept"
    assert set(json.loads(file.read_text())) == {"a", "b"}


def test_one_file_for_every_kind_of_block_sizes(clock: Clock) -> None:
    choose(clock, "a", FAST)
    rows = RowConfig(4, 2)

    def attempt(config: RowConfig, scratch: Workspace) -> list[SimpleNamespace]:
        return [SimpleNamespace(run=lambda: clock.tried.append(SHIPPED))]

    for _ in range(2):
        assert autotune.choose("rows", LIKE, rows, [RowConfig(8, 2)], attempt) == rows
    assert len(clock.tried) == 4
    assert autotune.choices(LIKE.device).found["rows"] == {"warps": 4, "depth": 2}


def test_only_who_asks_gets_trials(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    for value in ("0", ""):
        monkeypatch.setenv("PAD_KERNELS_AUTOTUNE", value)
        assert choose(clock, "a", FAST) == SHIPPED
    assert not clock.tried


def test_nothing_is_measured_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    like = SimpleNamespace(is_cuda=True, device=LIKE.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune.choose("a", like, SHIPPED, [FAST], clock.launches) == SHIPPED
    assert not clock.tried and not autotune.choices(LIKE.device).found
    choose(clock, "a", FAST)
    assert autotune.choose("a", like, SHIPPED, [FAST], clock.launches) == FAST, "it is known"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_is_tried(capability: int) -> None:
    """Tiles of no more sums; of the filter; rows of whole filter tiles."""
    for streams in (1, 2, 3):
        for extras in (0, 3):
            shipped = tilings.statistics_tiling(
                capability, streams, extras, plain=not extras, tail=False
            )
            found = tilings.tiling_trials(capability, shipped)
            assert found, "there is something to try for every kernel"
            assert all(t.rows * t.cols <= shipped.rows * shipped.cols * 2 for t in found)
        for plain in (True, False):
            shipped = tilings.gradient_tiling(capability, streams, plain=plain, filtered=True)
            assert tilings.tiling_trials(capability, shipped)
            for t in tilings.tiling_trials(capability, shipped, filtered=True):
                assert (t.rows, t.cols) == (shipped.rows, shipped.cols)
                assert FILTER_TILE % t.rows == FILTER_TILE % t.cols == 0
    for live in (tilings.LIVE[capability], *tilings.LIVE_TRIALS[capability]):
        assert FILTER_TILE % live.depth == 0
    for trials in configs.TRIALS.values():
        for itemsize in (2, 4):
            assert all(config.tile(itemsize) % FILTER_TILE == 0 for config in trials)


def test_shapes_that_share_a_choice() -> None:
    assert autotune.shape_class(8192, 128256, 4096) == autotune.shape_class(5000, 130000, 4096)
    assert autotune.shape_class(0, 1, 2) == "1x1x2"
