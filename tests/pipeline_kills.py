"""Commands that are killed again and again. `python pipeline_kills.py FOLDER` prints JSON.

Modules are imported once; each command runs in a fork, which dies at a random moment or just before
a file takes its place, and is run again until it is through. What it leaves must be what a command
leaves that nobody disturbed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_toys as toys
from tqdm import tqdm
from transformers.utils import logging

from pad_kernels import cli
from pad_kernels.integrations.transformers import offline, pad, token_distillation  # noqa: F401
from pad_kernels.pipeline import evaluate, sample, score, teacher_cache, train  # noqa: F401

#: A command, its settings, the folder that it leaves and the files in it that say what it did.
STAGES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "sample": ("sample", {}, ("samples/*",)),
    "score": ("score", {}, ("scored/*",)),
    "cache": (
        "cache",
        {"train__method": "dckd", "train__data": "pairs.jsonl"},
        ("cache/dckd/*",),
    ),
    "train": ("train", {}, ("train/pad/final/*", "train/pad/log.json")),
    "adpa+": (
        "train",
        {"train__method": "adpa+", "train__data": "pairs.jsonl", "train__arguments__max_steps": 2},
        ("train/adpa+*/final/*", "train/adpa+*/log.json", "train/adpa+.samples/*"),
    ),
}


def forked(command: list[str], log: Path, prepare: Callable[[], None], after: float | None) -> bool:
    """Run a command in a fork, killed after some seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        offline.write_teacher_cache = functools.partial(
            offline.write_teacher_cache, shard_bytes=2000
        )
        prepare()
        code = 1
        try:
            code = cli.main(command)
        finally:
            sys.stdout.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, log.read_text()
    return True


def dying(call: int) -> None:
    """From now on, die before the given call of os.replace."""
    replace, left = os.replace, iter(range(call))

    def instead(*args: Any, **kwargs: Any) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args, **kwargs)

    os.replace = instead


def contents(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file() and path.name != "writer.lock"
    }


def abused(name: str, rng: random.Random) -> dict[str, Any]:
    """Run a stage in peace, killed at random moments, and killed before files take their place."""
    command, changes, patterns = STAGES[name]
    found: dict[str, Any] = {}
    log = Path(f"{name}.log")
    for way in ("peace", "moments", "files"):
        file = Path(f"{name}-{way}.yaml")
        toys.write_settings(file, out=f"run-{way}", **changes)
        run = functools.partial(forked, [command, str(file)], log)
        begun, kills, done = time.monotonic(), 0, False
        while way == "moments" and kills < 3 and not done:
            done = run(lambda: None, rng.uniform(0.0, found["seconds"]))
            kills += not done
        while way == "files" and not done:
            done = run(functools.partial(dying, 1 + kills % 2), None)
            kills += not done
        if not done:
            run(lambda: None, None)
        if way == "peace":
            found["seconds"] = time.monotonic() - begun
        found[way] = contents(Path(f"run-{way}"), patterns)
        found[f"kills, {way}"] = kills
    found["log"] = log.read_text()
    return found


def main() -> None:
    os.chdir(sys.argv[1])
    toys.fill(Path())
    # Progress bars share a semaphore between processes: one who dies with it stops all that follow.
    tqdm.set_lock(threading.RLock())
    logging.disable_progress_bar()
    rng = random.Random(0)
    print(json.dumps({name: abused(name, rng) for name in STAGES}))


if __name__ == "__main__":
    main()
