"""Check and measure the library on the GPU of this machine; ``make gpu-check`` runs this.

    build     the extensions for this device, in place
    parity    every op, schedule, dtype and backend of the device against float64
    sanitize  compute-sanitizer over small checks, where it is installed
    bench     speed and memory beside the device's own rates and what else is installed

Without ``--stage`` all of them. Each ends within its time; what is done is on disk and is skipped
the next time, unless the sources, the device or the versions have changed.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The package, the tests' checks and this folder's files, here and in the workers.
for folder in (ROOT, ROOT / "tests", HERE):
    sys.path.insert(0, str(folder))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*(str(p) for p in (ROOT, ROOT / "tests", HERE)), os.environ.get("PYTHONPATH", "")]
)

STAGES = ("build", "parity", "sanitize", "bench")


def options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("gpu-check", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--stage", choices=STAGES, help="one of them; default: all")
    add("--out", type=Path, default=ROOT / "benchmarks/results/gpu", metavar="DIR")
    add("--device", default="cuda", help="cuda or cuda:N; cpu for a trial of this command itself")
    add("--only", default="", metavar="TEXT", help="only units whose name has TEXT in it")
    add("--seconds", type=float, default=510.0, help="most time a stage takes (%(default)s)")
    # Most of a fresh machine's time goes into compiling kernels, on one core a worker.
    jobs = max(min(12, (os.cpu_count() or 1) * 3 // 4), 1)
    add("--jobs", type=int, default=jobs, help="workers side by side, but for bench (%(default)s)")
    add("--fresh", action="store_true", help="forget what is done")
    return parser.parse_args(words)


def device_error(name: str) -> str:
    """Why nothing can run on the device; empty if something can."""
    try:
        import torch
    except ImportError as error:
        return f"this Python ({sys.executable}) has no torch: {error}"
    if not name.startswith("cuda"):
        return ""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return f"torch {torch.__version__} (built for {built}) sees no GPU; nothing was run"
    return ""


def main(words: list[str] | None = None) -> int:
    """Run the stages; 0 if every check passed, 1 if one failed, 2 if nothing could run."""
    args = options(words)
    if reason := device_error(args.device):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    import report
    import stages

    failed = False
    for name in [args.stage] if args.stage else STAGES:
        try:
            failed |= not stages.run(name, args)
        except Exception:  # what one stage lacks, pytest for instance, is no reason to skip others
            traceback.print_exc()
            failed = True
    text = report.write(args.out)
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
