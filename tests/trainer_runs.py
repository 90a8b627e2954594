"""Trainers of tiny models as the tests of what surrounds the losses use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainer_toys import llama, own, pairs, tokenizer

import pad_kernels.integrations.transformers as pt


def arguments(config: type, folder: Path, **options: Any) -> Any:
    given = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return config(output_dir=str(folder), **given)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def dckd(folder: Path, student: Any = None, teacher: Any = None, **options: Any) -> Any:
    tok = tokenizer()
    return pt.DCKDTrainer(
        llama() if student is None else student,
        arguments(pt.DCKDConfig, folder, alpha=0.5, **options),
        teacher=pt.ModelTeacher(llama(7, hidden=40) if teacher is None else teacher, tok),
        processing_class=tok,
        train_dataset=pairs(12),
        eval_dataset=pairs(7, seed=1),
    )


def adpa(folder: Path) -> Any:
    tok = tokenizer()
    return pt.ADPATrainer(
        llama(),
        arguments(pt.ADPAConfig, folder, gamma=2.0, beta=0.3),
        aligned=pt.ModelTeacher(llama(3), tok),
        reference=pt.ModelTeacher(llama(4, hidden=40), tok),
        processing_class=tok,
        eval_dataset=own(7),
    )


def kto(folder: Path, **options: Any) -> Any:
    """Of an adapter that is not at its beginning: without it, the model is the reference."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0}
        for i, row in enumerate(pairs(12))
    ]
    options |= {"max_steps": 3, "train_sampling_strategy": "sequential", "optim": "sgd"}
    return pt.PreferenceTrainer(
        get_peft_model(llama(), adapter),
        arguments(pt.PreferenceConfig, folder, loss="kto", **options),
        processing_class=tokenizer(),
        train_dataset=rows,
    )
