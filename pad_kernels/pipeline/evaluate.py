"""``eval``: the student before and after, on rows that nobody was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging

from pad_kernels.integrations import transformers as trainers
from pad_kernels.integrations.transformers import ModelTeacher
from pad_kernels.pipeline import methods, models, parts, rows
from pad_kernels.pipeline.settings import Eval, Settings, needed
from pad_kernels.pipeline.train import FINAL

#: Names in the table, and what they are called in an evaluation of each trainer.
SUPERVISED = {"nll": "nll"}
DISTILLED = {"kl_chosen": "kl_chosen", "kl_rejected": "kl_rejected"}
REWARDS = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "preference_accuracy": "rewards/accuracies",
}
IMPLICIT = {"dpo_loss": "loss", "dpo_accuracy": "rewards/accuracies"}
RANKED = {"pad_loss": "loss", "kendall_tau": "kendall_tau", "best_agreement": "accuracy"}


def run(settings: Settings) -> Path:
    """The command; prints the table and returns the file with it.

    Raises:
        ValueError: a mistake in what is given.
    """
    options = needed("eval", settings.eval)
    folder = settings.folder("eval")
    folder.mkdir(parents=True, exist_ok=True)
    if settings.teacher is not None and options.pairs is not None:
        models.check_tokenizers(settings, "teacher")
    judge = _Judge(settings, options)
    folders = _models(settings, options)
    datasets.disable_progress_bars()  # one bar is enough
    logging.disable_progress_bar()
    found = {}
    with tqdm(total=len(folders), desc="eval", unit="model") as bar:
        for name, path in folders.items():
            found[name] = _once(folder / f"{name}.json", judge.identity(path), judge, path)
            bar.update()
    parts.write_json(folder / "metrics.json", found)
    print(table(found))
    return folder / "metrics.json"


def _models(settings: Settings, options: Eval) -> dict[str, str]:
    if options.models is not None:
        found = {path.strip("/").replace("/", "_"): path for path in options.models}
    else:
        found = {"student": settings.student}
        for each in sorted(settings.folder("train").glob(f"*/{FINAL}")):
            found[each.parent.name] = str(each)
    for name, path in found.items():
        models.folder(f"eval, {name}", path)
    return found


def _once(path: Path, identity: dict[str, Any], judge: _Judge, model: str) -> dict[str, float]:
    """What was measured before of the same things, or a new measurement."""
    if path.is_file():
        before: dict[str, Any] = parts.read_json(path)
        if before["of"] == identity:
            return dict(before["metrics"])
    metrics = judge(model)
    parts.write_json(path, {"of": identity, "metrics": metrics})
    return metrics


class _Judge:
    """Measures models by their path, through the trainers' own evaluations."""

    def __init__(self, settings: Settings, options: Eval) -> None:
        self.settings, self.options = settings, options
        self.pairs = self.scored = None
        if options.pairs is not None:
            self.pairs = rows.read("eval.pairs", options.pairs)
            rows.need("eval.pairs", self.pairs, "chosen", "rejected")
        if options.scored is not None:
            self.scored = rows.read("eval.scored", options.scored)
            rows.need("eval.scored", self.scored, "responses", "rewards")
        self._loaded: dict[str, ModelTeacher] = {}

    def identity(self, path: str) -> dict[str, Any]:
        """What a measurement depends on."""
        options, settings = self.options, self.settings
        paths = {"model": path, "pairs": options.pairs, "scored": options.scored}
        paths |= {"student": settings.student, "teacher": settings.teacher}
        return {
            "dtype": settings.dtype,
            "max_length": options.max_length,
            "inputs": {n: rows.fingerprint(p) for n, p in paths.items() if p is not None},
        }

    def __call__(self, path: str) -> dict[str, float]:
        """All metrics of a model that the rows allow."""
        model = models.load("eval.models", path, self.settings)
        found: dict[str, float] = {}

        def measure(
            trainer: str, config: str, data: Any, names: dict[str, str], given: Any, **args: Any
        ) -> None:
            evaluated = self._trainer(model, path, trainer, config, data, given, args).evaluate()
            found.update({name: evaluated[f"eval_{key}"] for name, key in names.items()})

        if self.pairs is not None:
            pairs, preference = self.pairs, ("PreferenceTrainer", "PreferenceConfig")
            measure(*preference, pairs, SUPERVISED, {}, loss="sft")
            measure(*preference, pairs, REWARDS, {}, loss="simpo", beta=1.0)
            if path != self.settings.student:
                given = {"reference": self._teacher("student")}
                measure(*preference, pairs, IMPLICIT, given, loss="dpo")
            if self.settings.teacher is not None:
                given = {"teacher": self._teacher("teacher")}
                measure("DCKDTrainer", "DCKDConfig", pairs, DISTILLED, given)
        if self.scored is not None:
            measure("PADTrainer", "PADConfig", self.scored, RANKED, {})
        return found

    def _teacher(self, name: str) -> ModelTeacher:
        if name not in self._loaded:
            self._loaded[name] = models.teacher(name, self.settings)
        return self._loaded[name]

    def _trainer(
        self, model: Any, path: str, trainer: str, config: str, data: Any, given: Any, args: Any
    ) -> Any:
        cpu = models.device(self.settings).type == "cpu"
        arguments = getattr(trainers, config)(
            output_dir=str(self.settings.folder("eval")),
            per_device_eval_batch_size=self.options.batch_size,
            max_length=self.options.max_length,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            disable_tqdm=True,
            report_to=methods.DEFAULTS["report_to"],
            **args,
        )
        try:
            judge = getattr(trainers, trainer)(
                model,
                arguments,
                processing_class=models.tokenizer("eval.models", path),
                eval_dataset=data,
                **given,
            )
        except ValueError as error:
            name = "eval.pairs" if data is self.pairs else "eval.scored"
            raise ValueError(str(error).replace("eval_dataset", name, 1)) from error
        judge.remove_callback(PrinterCallback)
        return judge


def table(found: dict[str, dict[str, float]]) -> str:
    """The metrics, a row for each model, in columns that line up."""
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    lines = [["model", *names]]
    for model, metrics in found.items():
        cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        lines.append([model, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
