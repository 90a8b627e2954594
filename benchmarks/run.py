"""The benchmark without the command: ``python benchmarks/run.py --help``."""

import sys

from pad_kernels.bench.runner import main

if __name__ == "__main__":
    sys.exit(main())
