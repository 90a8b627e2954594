"""A toy dataset and its teachers for the tests of the cache; as a program, a writer that is killed.

`python cache_toy.py DIRECTORY` forks writers that kill themselves at every system call that
matters, and others that are killed at random moments, and prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels.cache import CacheInfo, write_teacher_cache

VOCAB, WIDTH, K = 37, 12, 4
ROWS, BATCH, SHARD_BYTES = 53, 3, 600
INFO = CacheInfo("toy/teacher", "0" * 64, vocab_size=VOCAB, k=K)


def weight(seed: int, dtype: torch.dtype = torch.float32, rows: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def length(example: int) -> int:
    """0 to 6 tokens."""
    return example * example % 7


def hidden(examples: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Hidden states of some examples, packed."""
    rows = []
    for example in examples:
        generator = torch.Generator().manual_seed(1000 * seed + example)
        shape = (length(example), WIDTH)
        rows.append(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))
    return torch.cat(rows)


def run(batch: list[int]) -> tuple[pk.Head, list[int]]:
    return pk.Head(hidden(batch), weight(1)), [length(e) for e in batch]


def write(
    path: Any, run: Callable = run, info: CacheInfo = INFO, dataset: Any = None, **options: Any
) -> Any:
    options = {"batch_size": BATCH, "shard_bytes": SHARD_BYTES, "progress": False, **options}
    return write_teacher_cache(
        path, range(ROWS) if dataset is None else dataset, run, info, **options
    )


def _forked(work: Callable[[], None]) -> bool:
    """Run in a forked process; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
        return True
    assert os.WEXITSTATUS(status) == 0, "a writer failed"
    return False


def _write_and_die(path: Path, call: int, torn: bool) -> None:
    """Write, and be killed before a given call of fsync or replace; maybe with half of the file."""
    count = 0

    def deadly(function: Callable) -> Callable:
        def wrapped(*args: Any) -> None:
            nonlocal count
            if count == call:
                if torn and function is fsync and stat.S_ISREG(os.fstat(args[0]).st_mode):
                    with open(f"/proc/self/fd/{args[0]}", "r+b") as file:
                        file.truncate(os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            function(*args)

        return wrapped

    fsync = os.fsync
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)  # type: ignore[assignment]
    write(path)


def _write_and_die_later(path: Path, batch: int, delay: float) -> None:
    """Write, and be killed by an alarm that a given batch sets, in the middle of whatever."""
    count = 0

    def slow(examples: list[int]) -> tuple[pk.Head, list[int]]:
        nonlocal count
        if count == batch:
            signal.setitimer(signal.ITIMER_REAL, delay)
        count += 1
        time.sleep(0.01)  # an alarm lets no more than a few batches pass, on any machine
        return run(examples)

    write(path, slow)


def _dies_and_is_resumed(path: Path, call: int) -> bool:
    """Whether the writer got as far as the call that kills it."""
    killed = _forked(lambda: _write_and_die(path, call, torn=call % 4 < 2))
    assert not _forked(lambda: write(path))
    return killed


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda file: (
        None
    )  # a killed process loses nothing that it wrote; a power cut is not tried
    write(directory / "first")  # what torch imports at a first call is imported once, not per fork
    calls = 0
    while _dies_and_is_resumed(directory / f"call-{calls}", calls):
        calls += 1

    kills, draw, path = 0, random.Random(0), directory / "random"
    while kills < 20:
        batch, delay = draw.randint(0, 3), draw.uniform(0.001, 0.02)
        if not _forked(partial(_write_and_die_later, path, batch, delay)):
            break
        kills += 1
    assert not _forked(lambda: write(path))
    print(json.dumps({"calls": calls, "kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
