"""Block sizes measured on the device at hand: only if asked for, and once.

``PAD_KERNELS_AUTOTUNE=1`` asks for it. What was fastest is kept in a file of the user's cache
directory for each device, compute capability and Triton version. Other block sizes add up in
another order: results may differ in their last bits from those of the shipped sizes, but not from
one run to the next once a choice is in the file.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import TritonError
from triton.testing import do_bench

from pad_kernels.backends.triton.launch import Launch, run
from pad_kernels.engine.workspace import Workspace

#: Most that a trial takes for what it writes in the place of what matters, bytes: some ten times
#: the L2 cache when read and written, and rows enough to keep every processor busy for a while.
SCRATCH = 128 << 20

#: Block sizes of one kind of kernel: a frozen dataclass.
Config = TypeVar("Config")


def enabled() -> bool:
    """Whether block sizes are to be measured."""
    return os.environ.get("PAD_KERNELS_AUTOTUNE", "0") == "1"


def shape_class(*sizes: int) -> str:
    """Sizes that share a choice: those with the same next power of two."""
    return "x".join(str(triton.next_power_of_2(max(size, 1))) for size in sizes)


@dataclass
class Choices:
    """What was fastest, by key, in memory and in a file."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"a {type(found).__name__} and no object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{self.path}: expected measured block sizes as JSON, got {error}; the file is "
                "ignored, and written anew with what is measured from now on",
                stacklevel=2,
            )
            return {}
        return found

    def get(self, key: str, configs: Sequence[Config]) -> Config | None:
        """The choice, if there is one and it is still a candidate, field by field."""
        kept = self.found.get(key)
        return next((config for config in configs if vars(config) == kept), None)

    def put(self, key: str, config: object) -> None:
        """Keep a choice, beside what other processes have kept in the meantime."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.found = {**self.found, **self._read(), key: vars(config)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # In full under another name first: nobody ever reads half a file.
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.found, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except OSError as error:
            warnings.warn(f"measured block sizes are not kept: {error}", stacklevel=2)


@functools.cache
def choices(device: torch.device) -> Choices:
    """Those for a device, from the directory that XDG_CACHE_HOME or ~/.cache says."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    found = torch.cuda.get_device_properties(device)
    name = f"{found.name}-sm_{found.major}{found.minor}-triton-{triton.__version__}"
    return Choices(Path(home) / "pad_kernels" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json")


def choose(
    key: str,
    like: Tensor,
    shipped: Config,
    trials: Sequence[Config],
    attempt: Callable[[Config, Workspace], Sequence[Launch]],
) -> Config:
    """The shipped block sizes, or, where that is asked for, those with the shortest run.

    Args:
        key: kernel, dtype, shape class and whatever else makes it another kernel.
        like: a tensor of the device.
        shipped: block sizes.
        trials: what to measure them against.
        attempt: launches with some block sizes. They run many times, so that nothing they write
            may matter: neither what they read again nor what they add to. In its place there is
            scratch, at most ``SCRATCH`` bytes, which is given back before the next trial.
    """
    if not enabled():
        return shipped
    kept, configs = choices(like.device), list(dict.fromkeys((shipped, *trials)))
    if (known := kept.get(key, configs)) is not None:
        return known
    if like.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can be measured
        return shipped
    times = {}
    for config in configs:
        with Workspace(like.device) as scratch:
            try:
                trial = functools.partial(run, like, *attempt(config, scratch))
                times[config] = float(do_bench(trial, return_mode="median"))
            except TritonError:  # more shared memory or registers than there are
                continue
    best = min(times, key=lambda config: times[config], default=shipped)
    kept.put(key, best)
    return best
