"""Twenty steps of each trainer against a plain loop over dense logits (trainer_dense.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")

import trainer_dense as dense
from trainer_toys import gemma, groups, llama, own, pairs, tokenizer

import pad_kernels.integrations.transformers as pt

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 20, 4


def arguments(config: type, folder: Path, accumulation: int, **options: Any) -> Any:
    """Rows in order, a constant rate, every step logged."""
    return config(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        **options,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def descent(model: Any, rate: float) -> tuple[Any, Any]:
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@dataclass(frozen=True)
class Method:
    """A trainer, its data and the dense loss of the same."""

    trainer: type
    config: type
    rows: Callable[[int], list[dict[str, Any]]]
    dense: Callable[[Any, list[dict[str, Any]]], dense.Loss]
    rate: float = 0.01
    options: dict[str, Any] | None = None
    teachers: dict[str, Any] | None = None  # names to models


def _teacher(hidden: int = 48) -> Any:
    return llama(11, hidden=hidden)


def _labelled(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0}
        for i, row in enumerate(pairs(count))
    ]


def _preference(loss: str, over: Callable[..., dense.Loss], **kw: Any) -> Method:
    rows = kw.pop("rows", pairs)
    rate = kw.pop("rate", 0.01)
    reference = {"reference": _teacher()} if kw.pop("reference", False) else None
    options = {"loss": loss, **kw}
    return Method(pt.PreferenceTrainer, pt.PreferenceConfig, rows, over, rate, options, reference)


METHODS = {
    "pad": Method(pt.PADTrainer, pt.PADConfig, groups, lambda m, _: dense.pad(m, 10.0), 1e-3),
    "pad kl": Method(
        pt.PADTrainer,
        pt.PADConfig,
        partial(groups, scored=False),
        lambda m, _: dense.pad(m, 2.0, "kl", _teacher()),
        options={"kind": "kl", "beta": 2.0},
        teachers={"teacher": _teacher()},
    ),
    "pad ranking": Method(
        pt.PADTrainer,
        pt.PADConfig,
        groups,
        lambda m, _: dense.pad(m, 2.0, "ranking"),
        options={"kind": "ranking", "beta": 2.0},
    ),
    "dckd": Method(
        pt.DCKDTrainer,
        pt.DCKDConfig,
        pairs,
        lambda m, _: dense.dckd(m, _teacher(), 0.5, ("chosen", "rejected")),
        options={"alpha": 0.5},
        teachers={"teacher": _teacher()},
    ),
    "kd": Method(
        pt.DCKDTrainer,
        pt.DCKDConfig,
        pairs,
        lambda m, _: dense.dckd(m, _teacher(), 2.0, ("chosen",)),
        options={"alpha": 2.0, "use_rejected": False},
        teachers={"teacher": _teacher()},
    ),
    "adpa": Method(
        pt.ADPATrainer,
        pt.ADPAConfig,
        own,
        lambda m, _: dense.adpa(m, _teacher(), _teacher(40), 3.0, 0.3),
        options={"gamma": 3.0, "beta": 0.3},
        teachers={"aligned": _teacher(), "reference": _teacher(40)},
    ),
    "dpo": _preference(
        "dpo", lambda m, _: dense.dpo(m, dense.sums_under(_teacher())), reference=True
    ),
    "ipo": _preference(
        "ipo",
        lambda m, _: dense.dpo(m, dense.sums_under(_teacher()), "ipo"),
        reference=True,
        rate=1e-4,
    ),
    "simpo": _preference("simpo", lambda m, _: dense.simpo(m)),
    "orpo": _preference("orpo", lambda m, _: dense.orpo(m)),
    "cpo": _preference("cpo", lambda m, _: dense.cpo(m), nll_weight=0.5),
    "kto": _preference(
        "kto",
        lambda m, rows: dense.kto(m, _teacher(), rows),
        rows=_labelled,
        reference=True,
    ),
    "sft": _preference("sft", lambda m, _: lambda rows: dense.supervised(m, rows)),
}


@pytest.mark.parametrize(
    ("name", "model", "accumulation", "packed"),
    [
        ("pad", "untied", 1, False),
        ("pad", "gemma", 4, True),
        ("pad kl", "tied", 4, False),
        ("pad ranking", "untied", 1, True),
        ("dckd", "untied", 4, True),
        ("dckd", "gemma", 1, False),
        ("kd", "tied", 4, False),
        ("adpa", "untied", 1, True),
        ("adpa", "gemma", 4, False),
        ("dpo", "tied", 4, False),
        ("dpo", "gemma", 1, True),
        ("ipo", "untied", 4, True),
        ("simpo", "gemma", 4, False),
        ("orpo", "tied", 4, True),
        ("cpo", "untied", 4, False),
        ("kto", "untied", 4, True),
        ("sft", "gemma", 4, True),
    ],
)
def test_twenty_steps(
    name: str, model: str, accumulation: int, packed: bool, tmp_path: Path
) -> None:
    method = METHODS[name]
    student = {"untied": llama, "tied": lambda: llama(tied=True), "gemma": gemma}[model]()
    plain = copy.deepcopy(student)
    rows = method.rows(12)
    tok = tokenizer()
    teachers = {
        each: pt.ModelTeacher(copy.deepcopy(module), tok)
        for each, module in (method.teachers or {}).items()
    }
    args = arguments(
        method.config, tmp_path, accumulation, padding_free=packed, **(method.options or {})
    )
    trainer = method.trainer(
        student,
        args,
        processing_class=tok,
        train_dataset=rows,
        optimizers=descent(student, method.rate),
        **teachers,
    )
    ours = losses(trainer)
    theirs = dense.train(
        plain, rows, method.dense(plain, rows), steps=STEPS, batch=BATCH, rate=method.rate
    )
    assert len(ours) == STEPS
    scale = max(1.0, max(theirs))  # ipo's losses are in the tens
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5 * scale
    assert sum(theirs[-3:]) < sum(theirs[:3]) - 1e-3, (
        "something is learned, of the same three batches"
    )
    if name == "kto":
        points = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert max(points) > 0, "the reference point is to be something"
    for mine, other in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize("name", ["dpo", "dckd", "kto"])
def test_twenty_steps_of_an_adapter(name: str, tmp_path: Path) -> None:
    """LoRA; the reference of dpo and kto is the student without its adapter."""
    peft = pytest.importorskip("peft")
    method = METHODS[name]
    torch.manual_seed(5)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = peft.get_peft_model(llama(), adapter)
    plain, base, rows, tok = copy.deepcopy(student), llama(), method.rows(12), tokenizer()
    loss = {
        "dpo": lambda: dense.dpo(plain, dense.sums_under(base)),
        "kto": lambda: dense.kto(plain, base, rows),
        "dckd": lambda: method.dense(plain, rows),
    }[name]()
    teachers = {"teacher": pt.ModelTeacher(_teacher(), tok)} if name == "dckd" else {}
    trainer = method.trainer(
        student,
        arguments(method.config, tmp_path, 4, **(method.options or {})),
        processing_class=tok,
        train_dataset=rows,
        optimizers=descent(student, 0.01),
        **teachers,
    )
    ours = losses(trainer)
    theirs = dense.train(plain, rows, loss, steps=STEPS, batch=BATCH, rate=0.01)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert not trainer.model.get_output_embeddings().weight.requires_grad
    assert sum(theirs[-3:]) < sum(theirs[:3]) - 1e-3, (
        "something is learned, of the same three batches"
    )
    if name == "kto":
        points = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert max(points) > 0, "the reference point is to be something"
