"""Run what is missing and write the table: ``python -m examples.miniature``."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.miniature.jobs import run_missing
from examples.miniature.report import write
from examples.miniature.settings import Settings
from examples.miniature.store import Store

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    """Run the experiment and write its report."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.miniature",
        description="Compare the methods on a task with a known reward. Stopped at any point, the "
        "same command goes on where it was.",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--processes", type=int, default=2, help="side by side (default: 2)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=HERE / "runs",
        help="models and one JSON file for each run (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        help="table.md, results.json and plots (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds: at least 2, or there is no standard error")
    seeds, settings = list(range(args.seeds)), Settings()
    run_missing(seeds, args.runs, settings, args.processes)
    write(Store(args.runs, settings).read(seeds), args.out, settings)
    print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
