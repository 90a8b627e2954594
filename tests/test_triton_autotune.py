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

from pad_kernels.backends.triton import autotune, tilings
from pad_kernels.backends.triton.launch import Device
from pad_kernels.backends.triton.tilings import Tiling

SHIPPED, FAST, TOO_LARGE = (Tiling(16, 32, 16, 4, 3, group) for group in (1, 2, 3))
LIKE = torch.empty(1)


class Clock:
    """Stands for do_bench; ``tried`` are the tilings that ran."""

    def __init__(self) -> None:
        self.tried: list[Tiling] = []

    def launches(self, tiling: Tiling) -> list[SimpleNamespace]:
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
    card = SimpleNamespace(name="A/GPU 1", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    autotune.choices.cache_clear()
    yield found
    autotune.choices.cache_clear()


def choose(clock: Clock, key: str, *more: Tiling) -> Tiling:
    return autotune.choose(key, LIKE, [SHIPPED, *more], clock.launches)


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


def test_only_who_asks_gets_trials(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    for capability in (80, 90, 100):
        shipped = tilings.statistics_tiling(capability, 1, 0, plain=True, tail=False)
        monkeypatch.delenv("PAD_KERNELS_AUTOTUNE", raising=False)
        assert autotune.candidates(Device(capability, 1), shipped) == [shipped]
        monkeypatch.setenv("PAD_KERNELS_AUTOTUNE", "1")
        found = autotune.candidates(Device(capability, 1), shipped)
        assert found[0] == shipped and len(found) > 5
        assert all(256 % t.cols == 0 for t in found), "a tile lies in one tile of the filter"
    assert choose(clock, "a") == SHIPPED
    assert not clock.tried


def test_shapes_that_share_a_choice() -> None:
    assert autotune.shape_class(8192, 128256, 4096) == autotune.shape_class(5000, 130000, 4096)
    assert autotune.shape_class(0, 1, 2) == "1x1x2"
