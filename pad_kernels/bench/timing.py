"""Interleaved timing, with the GEMM-only floor measured in the same rounds."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels.bench.cases import Case, Inputs

# So that a run stays short: rounds end after PATIENCE seconds, but not before the second; what
# takes over SLOW times the floor is timed in SLOW_ROUNDS rounds, and over HOPELESS times the floor,
# if that is seconds, in one step.
PATIENCE = 30.0
SLOW, SLOW_ROUNDS = 2.5, 2
HOPELESS, SECONDS = 5.0, 1.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``action`` takes."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Products:
    """Seconds of bare matrix products: hidden · weightᵀ once, and the two of the backward pass."""

    logits: float
    gradients: float

    def of(self, gemms: int) -> float:
        """Seconds of ``gemms`` N·H·V of products.

        2 is the forward pass alone; 6 or more has the 4 of the backward pass, and the rest are
        products of a hidden and a weight: a teacher's, or one that is done again.
        """
        if gemms < 6:
            return self.logits * gemms / 2
        return self.logits * (gemms - 4) / 2 + self.gradients


class Floor:
    """The three matrix products that a student's step cannot avoid, and nothing else.

    Logits and their gradient share one N×V buffer made beforehand; the two gradients are allocated
    afresh each time, as autograd has to hand out new ones. A teacher has the student's shape, so
    that its product takes the time of the first and is not measured again.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.logits = self.hidden.new_empty(case.tokens, case.vocab)
        self.forward()

    def forward(self) -> None:
        """Logits = hidden · weightᵀ into the shared buffer."""
        torch.mm(self.hidden, self.weight.T, out=self.logits)

    def backward(self) -> tuple[Tensor, Tensor]:
        """The gradients of hidden and weight, with the buffer as the gradient of the logits."""
        return torch.mm(self.logits, self.weight), torch.mm(self.logits.T, self.hidden)

    def round(self, device: torch.device) -> Products:
        """Measure each product once."""
        return Products(clock(self.forward, device), clock(self.backward, device))


@dataclass
class Measured:
    """Seconds of every round by name, and the floor's by round."""

    seconds: dict[str, list[float | None]]
    floors: list[Products]

    def times(self, name: str) -> Spread:
        """Seconds of one implementation."""
        return Spread.of([s for s in self.seconds[name] if s is not None])

    def ratios(self, name: str, gemms: int) -> Spread:
        """Its time divided by the floor's of the same round."""
        pairs = zip(self.seconds[name], self.floors, strict=True)
        return Spread.of([s / floor.of(gemms) for s, floor in pairs if s is not None])

    def summary(self, name: str, gemms: int, own_gemms: int) -> dict[str, float]:
        """The JSON-able figures of one implementation; times in ms."""
        time, ratio = self.times(name), self.ratios(name, gemms)
        return {
            "rounds": sum(s is not None for s in self.seconds[name]),
            "time_ms": 1e3 * time.median,
            "time_low_ms": 1e3 * time.low,
            "time_high_ms": 1e3 * time.high,
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "own_ratio": self.ratios(name, own_gemms).median,
        }

    def floor(self, gemms: int) -> Spread:
        """Seconds of the floor."""
        return Spread.of([floor.of(gemms) for floor in self.floors])


def time_rounds(
    steps: Mapping[str, Callable[[], object]],
    floor: Floor,
    inputs: Inputs,
    repeats: int,
    gemms: int,
) -> Measured:
    """Run every step once a round, in an order drawn for each, and the floor at its start.

    Each step is run twice, and the second is timed: in training a step follows its like, and what
    another left behind in memory and caches would be its neighbour's cost or gain.

    Args:
        steps: name → one warmed-up step.
        floor: the matrix products of the same case.
        inputs: their gradients are dropped, outside the clock, before every step.
        repeats: rounds.
        gemms: which floor decides who is slow.

    Returns:
        Seconds by name and round; None where a slow implementation sat a round out.
    """
    device, names, began = inputs.hidden.device, list(steps), time.perf_counter()
    measured = Measured({name: [] for name in names}, [])
    gc.collect()
    gc.disable()
    try:
        for index in range(repeats):
            if index >= 2 and time.perf_counter() - began > PATIENCE:
                break
            inputs.clear()
            floor.round(device)
            measured.floors.append(floor.round(device))
            for name in random.Random(index).sample(names, len(names)):
                done = [s for s in measured.seconds[name] if s is not None]
                limit = SLOW * measured.floors[0].of(gemms)
                if len(done) >= SLOW_ROUNDS and min(done) > limit:
                    measured.seconds[name].append(None)
                    continue
                for _ in range(2):
                    inputs.clear()
                    seconds = clock(steps[name], device)
                measured.seconds[name].append(seconds)
    finally:
        gc.enable()
    inputs.clear()
    return measured
