"""Nanoseconds per logit of the C++ row passes, beside a copy of the same block.

    python benchmarks/row_pass.py --threads 2

PAD_KERNELS_SIMD=avx2 or baseline in the environment measures a lower instruction set.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pad_kernels.backends import registry


def median_ns(action: Callable[[], object], logits: int, repeats: int) -> float:
    """Median wall time of ``action`` per logit."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter_ns()
        action()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times[1:]) / logits


def measure(dtype: torch.dtype, rows: int, cols: int, threads: int, repeats: int) -> None:
    """Print one line per pass: time per logit, and bytes moved as a fraction of a copy's."""
    native = registry.native()
    if native is None:
        raise SystemExit(registry.native_error())
    acc = torch.float64  # of all that there is one of per row
    name = str(dtype).removeprefix("torch.")
    logits = (torch.randn(rows, cols) * 3).to(dtype)
    out = torch.empty_like(logits)
    maxima, sums, moment = (torch.zeros(rows, dtype=acc) for _ in range(3))
    c1, value = torch.full((rows,), -1.0, dtype=acc), torch.ones(rows, 1, dtype=acc)
    label = torch.randint(0, cols, (rows, 1))

    def reset_and_sum(softcap: float, moments: list[tuple[int, tuple[float, ...], int]]) -> None:
        maxima.fill_(-torch.inf)
        sums.zero_()
        moment.zero_()
        stream = (logits.data_ptr(), cols, 0, 1.0, softcap, 1.0)
        state = ([maxima.data_ptr()], [sums.data_ptr()])
        native.row_statistics(name, [stream], rows, cols, 0, *state, moments, threads=threads)

    def gradient(softcap: float, q: list[int]) -> None:
        stream = (logits.data_ptr(), cols, 0, 1.0, softcap, 1.0)
        state = ([maxima.data_ptr()], [sums.data_ptr()])
        terms = native.GradientTerms()
        terms.c1, terms.q = c1.data_ptr(), q
        terms.sparse, terms.sparse_values = (label.data_ptr(), 1), value.data_ptr()
        target = (out.data_ptr(), cols)
        native.row_gradient(name, [stream], rows, cols, 0, *state, *target, terms, threads=threads)

    passes: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: out.copy_(logits)),
        "statistics": (1, lambda: reset_and_sum(0.0, [])),
        "statistics + moment": (1, lambda: reset_and_sum(0.0, [(0, (1.0,), moment.data_ptr())])),
        "statistics, softcap": (1, lambda: reset_and_sum(30.0, [])),
        "gradient": (2, lambda: gradient(0.0, [])),
        "gradient + entropy": (2, lambda: gradient(0.0, [c1.data_ptr()])),
        "gradient, softcap": (2, lambda: gradient(30.0, [])),
    }
    copy_rate = 0.0
    for label_text, (blocks, action) in passes.items():
        taken = median_ns(action, rows * cols, repeats)
        rate = blocks * logits.element_size() / taken
        copy_rate = copy_rate or rate
        print(
            f"{name:9} {label_text:20} {taken:6.3f} ns   {rate / copy_rate:5.0%} of a copy's rate"
        )


def main() -> None:
    """Measure every dtype that the row passes take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=32_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native = registry.native()
    print(f"{native.simd_level() if native else 'no extension'}, {options.threads} threads")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        measure(dtype, options.rows, options.cols, options.threads, options.repeats)


if __name__ == "__main__":
    main()
