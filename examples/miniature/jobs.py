"""What is to be done, in three rounds, and the processes that do it."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from examples.miniature.lab import SHARED
from examples.miniature.methods import FIRST, METHODS
from examples.miniature.run import first_stage, measure, second_stage
from examples.miniature.settings import Settings
from examples.miniature.store import Store


@dataclass(frozen=True)
class Job:
    """Pretraining, a first stage, or a method's second stage, of one seed.

    Each leaves files that tell the next run that it is done.
    """

    kind: str  # "pretrain", "first" or "second"
    seed: int
    name: str = ""

    def done(self, store: Store) -> bool:
        """Whether its files are there."""
        if self.kind == "pretrain":
            return all(store.path(self.seed, name).exists() for name in SHARED)
        if self.kind == "first":
            return store.has_model(self.seed, self.name)
        return store.path(self.seed, self.name).exists()

    def work(self, folder: Path, settings: Settings) -> Job:
        """Do it, in another process."""
        self.run(Store(folder, settings))
        return self

    def run(self, store: Store) -> None:
        """Do it."""
        if self.kind == "pretrain":
            lab = store.lab(self.seed)
            lab.pretrain()
            for name in SHARED:
                lab.save(name, store.models(self.seed))
                since = "base" if name == "base" else "reference"
                store.write(self.seed, name, measure(lab, lab.models[name], since))
        elif self.kind == "first":
            lab = store.lab(self.seed)
            lab.models[self.name] = first_stage(lab, self.name)
            lab.save(self.name, store.models(self.seed))
        else:
            first, second = METHODS[self.name]
            lab = store.lab(self.seed, first)
            store.write(self.seed, self.name, second_stage(lab, first, second))


def rounds(seeds: list[int]) -> list[list[Job]]:
    """All jobs; those of a round need those of the rounds before and nothing of their own."""
    return [
        [Job("pretrain", seed) for seed in seeds],
        [Job("first", seed, name) for seed in seeds for name in FIRST],
        [Job("second", seed, name) for seed in seeds for name in METHODS],
    ]


def prepare_process() -> None:
    """Tensors this small gain nothing from a second thread, but a second run does."""
    torch.set_num_threads(1)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


def run_missing(seeds: list[int], folder: Path, settings: Settings, processes: int) -> None:
    """Do what is not done yet, with a progress bar.

    Raises:
        Exception: whatever a job raised; those that are done stay done.
    """
    store = Store(folder, settings)
    todo = rounds(seeds)
    total = sum(map(len, todo))
    missing = [[job for job in part if not job.done(store)] for part in todo]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        tqdm(total=total, initial=total - sum(map(len, missing)), unit="run") as bar,
        ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=prepare_process
        ) as pool,
    ):
        for part in missing:
            futures = [pool.submit(job.work, folder, settings) for job in part]
            try:
                for future in as_completed(futures):
                    job = future.result()
                    bar.set_postfix_str(f"{job.name or job.kind}, seed {job.seed}", refresh=False)
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
