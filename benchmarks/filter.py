"""What the gradient filter leaves of peaked logits, and from where on it pays.

python benchmarks/filter.py [--tokens N] [--write]     shares of live tiles; into the page

Shares are counted from logits. That the filter pays below a share is predicted, from flops.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pad_kernels.bench.peaked import LEVEL, exponent, live_shares, make_peaked

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
VOCAB, WIDTH = 128256, 64
CONTEXTS = (1.0, 2.0, 3.0, 4.0)
TILES = ((64, 64), (128, 128), (128, 256))
#: The rate of products over live tiles over the library's.
RATES = (1.0, 0.7, 0.5)
#: Name, flops without the filter (best plan) and, with it, those of all tiles, in N·H·V; four more
#: are the two products over live tiles.
PLANS = (
    ("one number: early for early", 6, 2),
    ("one number: late for early", 6, 4),
    ("per-token outputs: late for late", 8, 4),
)


def shares(tokens: int) -> list[str]:
    """Rows of a table: live tiles by how much rows differ."""
    sizes = " | ".join(f"{a} × {b}" for a, b in TILES)
    lines = [
        f"| rows differ by | Zipf exponent | filter | 128 × 128, as they lie | in order: {sizes} |",
        "|---:|---:|---:|---:|" + "---:|" * len(TILES),
    ]
    for context in CONTEXTS:
        x = make_peaked((tokens, WIDTH, VOCAB), context, torch.float32, torch.device("cpu"))
        for level in (LEVEL, 16 * LEVEL):
            found = live_shares(x, level, [(128, 128)], ordered=False)
            found += live_shares(x, level, TILES, ordered=True)
            cells = " | ".join(f"{100 * share:.1f} %" for share in found)
            power = round(torch.tensor(level).log2().item())
            lines.append(
                f"| {context:g} nats | {exponent(VOCAB, context):.2f} | 2^{power} | {cells} |"
            )
    return lines


def break_even() -> list[str]:
    """Rows of a table: the share of live tiles below which a filtered plan is faster."""
    heads = " | ".join(f"{rate:g}: even, 1.3 ×" for rate in RATES)
    lines = [f"| filtered for unfiltered | {heads} |", "|---|" + "---:|" * len(RATES)]
    for name, without, fixed in PLANS:
        cells = []
        for rate in RATES:
            pair = (max(rate * (without / faster - fixed) / 4, 0) for faster in (1.0, 1.3))
            cells.append(", ".join(f"{100 * share:.0f} %" for share in pair))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print both tables, or put them between the page's markers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = "\n".join([*shares(args.tokens), "", *break_even()])
    if not args.write:
        print(text)
        return
    begin, end = "<!-- filter -->", "<!-- end of filter -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
