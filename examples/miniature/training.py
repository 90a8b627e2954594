"""Trains a model with one of the project's trainers."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import pad_kernels.integrations.transformers as pt


def train(
    model: Any,
    trainer: str,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    teachers: dict[str, Any],
    options: dict[str, Any],
    watch: TrainerCallback | None = None,
) -> None:
    """Train a model in place, the learning rate going down to zero.

    Args:
        model: a causal language model.
        trainer: Preference, DCKD, ADPA or PAD.
        rows: the data set.
        tokenizer: of the model and its teachers.
        steps: of the optimizer.
        batch: rows of a step.
        rate: peak learning rate.
        seed: of the order of rows.
        teachers: models by the trainer's argument.
        options: of the trainer's config.
        watch: is told of every step.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(pt, f"{trainer}Config")(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        run = getattr(pt, f"{trainer}Trainer")(
            model,
            args,
            processing_class=tokenizer,
            train_dataset=rows,
            callbacks=[watch] if watch is not None else None,
            **{n: pt.ModelTeacher(each, tokenizer) for n, each in teachers.items()},
        )
        run.remove_callback(PrinterCallback)
        run.train()
    model.eval()


def frozen_copy(model: Any) -> Any:
    """A copy that is not trained, such as DPO's reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)
