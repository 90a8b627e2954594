"""Put the tables of benchmarks/results/bench.json into the README, between its two marks."""

import json
from pathlib import Path

from pad_kernels.bench.report import markdown

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->"

if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    result = json.loads((ROOT / "benchmarks/results/bench.json").read_text())
    readme.write_text(before + BEGIN + markdown(result) + "\n" + END + after)
