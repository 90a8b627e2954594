"""Teachers on disk: training from a cache is training beside the models it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("safetensors")
import trainer_dense as dense
from trainer_toys import VOCAB, gemma, groups, llama, own, pairs, tokenizer

import pad_kernels.integrations.transformers as pt

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(config: type, folder: Path, **options: Any) -> Any:
    return config(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        learning_rate=1e-2,
        **options,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer: type, args: Any, rows: list[Any], **teachers: Any) -> list[float]:
    return losses(
        trainer(llama(), args, processing_class=tokenizer(), train_dataset=rows, **teachers)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [VOCAB, "hidden"])
def test_dckd_from_a_cache_of_everything(keep: Any, packed: bool, tmp_path: Path) -> None:
    rows, tok = pairs(8), tokenizer()
    args = arguments(pt.DCKDConfig, tmp_path, alpha=0.5, padding_free=packed)
    teacher = pt.ModelTeacher(gemma(7, hidden=40), tok)
    cache = pt.cache_teacher(
        tmp_path / "cache", rows, args, teacher, name="t", keep=keep, batch_size=3, progress=False
    )
    online = trained(pt.DCKDTrainer, args, rows, teacher=teacher)
    offline = trained(pt.DCKDTrainer, args, rows, teacher=pt.CachedTeacher(tmp_path / "cache"))
    assert offline == pytest.approx(online, abs=2e-5)
    assert offline == trained(pt.DCKDTrainer, args, rows, teacher=cache)


def test_adpa_from_cached_log_ratios(tmp_path: Path) -> None:
    """Chosen tokens are in no cache: the advantage does not ask for them."""
    rows, tok = own(8), tokenizer()
    args = arguments(pt.ADPAConfig, tmp_path, gamma=2.0)
    aligned, reference = (pt.ModelTeacher(llama(seed), tok) for seed in (3, 4))
    cache = pt.cache_teacher(
        tmp_path / "cache",
        rows,
        args,
        aligned,
        reference,
        name="a",
        reference_name="r",
        keep=VOCAB,
        progress=False,
    )
    online = trained(pt.ADPATrainer, args, rows, aligned=aligned, reference=reference)
    offline = trained(pt.ADPATrainer, args, rows, aligned=cache)
    assert offline == pytest.approx(online, abs=2e-5)


def test_pad_from_cached_hidden_states(tmp_path: Path) -> None:
    rows, tok = groups(8, scored=False), tokenizer()
    args = arguments(pt.PADConfig, tmp_path)
    teacher = pt.ModelTeacher(llama(3, hidden=40), tok)
    cache = pt.cache_teacher(
        tmp_path / "cache", rows, args, teacher, name="t", keep="hidden", progress=False
    )
    online = trained(pt.PADTrainer, args, rows, teacher=teacher)
    assert trained(pt.PADTrainer, args, rows, teacher=cache) == pytest.approx(online, abs=1e-5)


def test_hidden_states_in_bfloat16_are_near(tmp_path: Path) -> None:
    rows, tok = pairs(8), tokenizer()
    args = arguments(pt.DCKDConfig, tmp_path)
    teacher = pt.ModelTeacher(llama(3), tok)
    options: dict[str, Any] = {"name": "t", "keep": "hidden", "progress": False}
    exact = pt.cache_teacher(tmp_path / "a", rows, args, teacher, **options)
    short = pt.cache_teacher(tmp_path / "b", rows, args, teacher, dtype="bfloat16", **options)
    wide, near = (trained(pt.DCKDTrainer, args, rows, teacher=each) for each in (exact, short))
    assert near == pytest.approx(wide, rel=1e-2)
    assert near != wide


def test_a_cache_for_training_and_one_for_evaluation(tmp_path: Path) -> None:
    tok, teacher, student = tokenizer(), llama(3), llama()
    parts = {"train": pairs(6), "eval": pairs(5, seed=1)}
    args = arguments(pt.DCKDConfig, tmp_path, alpha=0.5)
    for name, rows in parts.items():
        pt.cache_teacher(
            tmp_path / name,
            rows,
            args,
            pt.ModelTeacher(teacher, tok),
            name="t",
            keep="hidden",
            progress=False,
        )
    trainer = pt.DCKDTrainer(
        student,
        args,
        teacher=pt.CachedTeacher(tmp_path / "train", tmp_path / "eval"),
        processing_class=tok,
        train_dataset=parts["train"],
        eval_dataset=parts["eval"],
    )
    with torch.no_grad():
        loss = dense.dckd(student, teacher, 0.5, ("chosen", "rejected"))(parts["eval"]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    with pytest.raises(ValueError, match=r"eval_dataset: expected the data set .* cache was made"):
        trainer.evaluate(pairs(5, seed=2))


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    args = arguments(pt.DCKDConfig, tmp_path)
    teacher = pt.ModelTeacher(llama(3), tokenizer())
    pt.cache_teacher(tmp_path / "c", pairs(4), args, teacher, name="t", keep=5, progress=False)
    return tmp_path / "c"


def test_few_tokens_are_enough_to_train(cached: Path, tmp_path: Path) -> None:
    args = arguments(pt.DCKDConfig, tmp_path, alpha=0.5)
    for tail in ("bucket", "renormalize"):
        teacher = pt.CachedTeacher(cached, tail=tail)
        found = trained(pt.DCKDTrainer, args, pairs(4), teacher=teacher)
        assert found[-1] < found[0]


def test_other_data_are_refused(cached: Path, tmp_path: Path) -> None:
    """One token of one response is enough."""
    rows = pairs(4)
    rows[2]["rejected"][-1] = 3 + rows[2]["rejected"][-1] % 7
    for other in (rows, pairs(4)[::-1], pairs(3)):
        with pytest.raises(ValueError, match="train_dataset: expected the data set"):
            trained(
                pt.DCKDTrainer,
                arguments(pt.DCKDConfig, tmp_path),
                other,
                teacher=pt.CachedTeacher(cached),
            )


def test_a_cache_of_another_tokenizer_is_refused(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher: expected a cache made with the student's tok"):
        pt.DCKDTrainer(
            llama(),
            arguments(pt.DCKDConfig, tmp_path),
            teacher=pt.CachedTeacher(cached),
            processing_class=tokenizer(order=-1),
            train_dataset=pairs(4),
        )


def test_a_cache_that_does_not_know_enough_is_refused(cached: Path, tmp_path: Path) -> None:
    teacher = pt.CachedTeacher(cached)
    with pytest.raises(ValueError, match=r"whole distributions .*, got a cache of the likeliest"):
        trained(pt.PADTrainer, arguments(pt.PADConfig, tmp_path), groups(4), teacher=teacher)
    with pytest.raises(ValueError, match=r"log-ratios of two teachers, got a cache of the like"):
        args = arguments(pt.ADPAConfig, tmp_path)
        trained(pt.ADPATrainer, args, own(4), aligned=teacher, reference=teacher)


def test_adpa_wants_two_teachers_or_their_ratios(tmp_path: Path) -> None:
    teacher = pt.ModelTeacher(llama(3), tokenizer())
    with pytest.raises(ValueError, match="reference: expected None with a cache of log-ratios"):
        trained(pt.ADPATrainer, arguments(pt.ADPAConfig, tmp_path), own(4), aligned=teacher)


def test_what_cannot_be_cached(tmp_path: Path) -> None:
    teacher = pt.ModelTeacher(llama(3), tokenizer())
    with pytest.raises(TypeError, match="args: expected a DCKDConfig, an ADPAConfig"):
        args = arguments(pt.PADConfig, tmp_path)
        pt.cache_teacher(tmp_path / "c", groups(2), args, teacher, name="t")
    with pytest.raises(ValueError, match="keep: expected a number of log-ratios"):
        args = arguments(pt.ADPAConfig, tmp_path)
        pt.cache_teacher(tmp_path / "c", own(2), args, teacher, teacher, name="t", keep="hidden")
    for models in ((teacher,), (teacher, teacher)):
        config = pt.DCKDConfig if len(models) == 2 else pt.ADPAConfig
        with pytest.raises(ValueError, match="reference: expected"):
            args = arguments(config, tmp_path)
            pt.cache_teacher(tmp_path / "c", own(2), args, *models, name="t")
