"""How rates and options were chosen: ``python -m examples.miniature.tune``.

Every stage of :data:`~examples.miniature.methods.STAGES` gets the same two learning rates and,
where it has an option of its own, three values of that: the ones with the highest true reward on a
seed that is not in the table stand in `methods.py`. KD and SeqKD take over what was found for them
with the aligned teacher.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.miniature.jobs import Job, prepare_process
from examples.miniature.methods import STAGES
from examples.miniature.run import first_stage, second_stage
from examples.miniature.settings import Settings
from examples.miniature.store import Store

SEED = 100
RATES = (3e-3, 1e-2)
_PAD = ("beta", (0.3, 1.0, 3.0))
OPTIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "kd-aligned": ("alpha", (1.0, 4.0, 16.0)),
    "dckd": ("alpha", (1.0, 4.0, 16.0)),
    "dpo": ("beta", (0.1, 0.3, 1.0)),
    "simpo": ("beta", (0.5, 1.0, 2.0)),
    "adpa": ("gamma", (3.0, 10.0, 30.0)),
    "pad-ranking": _PAD,
    "pad-jsd": _PAD,
    "pad-decomposed": _PAD,
    "pad-kl": _PAD,
}
IMITATION = ("sft", "seqkd-aligned", "kd-aligned", "dckd")


def grid() -> list[tuple[str, float, dict[str, float]]]:
    """Stage, learning rate and options of every trial."""
    trials = []
    for name in (*IMITATION, *(each for each in OPTIONS if each not in IMITATION)):
        option, values = OPTIONS.get(name, ("", (0.0,)))
        for rate, value in product(RATES, values):
            trials.append((name, rate, {option: value} if option else {}))
    return trials


def trial(
    name: str, rate: float, options: dict[str, float], folder: Path, settings: Settings
) -> dict[str, Any]:
    """Two stages with the same settings of an imitating method, of others the second after SFT."""
    lab = Store(folder, settings).lab(SEED, "sft")
    stage = STAGES[name]
    STAGES[name] = replace(stage, rate=rate, options={**stage.options, **options})
    try:
        if name in IMITATION:
            lab.models["tuned"] = first_stage(lab, name)
            result = second_stage(lab, "tuned", name)
        else:
            result = second_stage(lab, "sft", name)
    finally:
        STAGES[name] = stage
    kept = {n: round(result[n], 4) for n in ("reward", "accuracy", "gain_accuracy", "entropy")}
    return {"stage": name, "rate": rate, **options, **kept}


def main() -> None:
    """Run the grid and write tuning.json."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="python -m examples.miniature.tune")
    parser.add_argument("--processes", type=int, default=2, help="side by side (default: 2)")
    parser.add_argument("--runs", type=Path, default=here / "runs", help="models")
    parser.add_argument("--out", type=Path, default=here / "results", help="tuning.json")
    args = parser.parse_args()
    settings, found = Settings(), []
    context = get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, prepare_process) as pool:
        for job in (Job("pretrain", SEED), Job("first", SEED, "sft")):
            if not job.done(Store(args.runs, settings)):
                pool.submit(job.work, args.runs, settings).result()
        futures = [pool.submit(trial, *each, args.runs, settings) for each in grid()]
        for future in tqdm(as_completed(futures), total=len(futures), unit="trial"):
            found.append(future.result())
            found.sort(key=lambda each: (each["stage"], -each["reward"]))
            text = "[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n"
            (args.out / "tuning.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
