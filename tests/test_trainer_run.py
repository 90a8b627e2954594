"""What trainers do beside the loss: evaluate, resume, log, checkpoint activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")

import trainer_dense as dense
from trainer_runs import arguments, dckd, logged
from trainer_toys import VOCAB, gemma, groups, llama, logprobs, own, pairs, tokenizer

import pad_kernels.integrations.transformers as pt

pytestmark = pytest.mark.usefixtures("one_thread")


# Evaluation.


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_is_a_mean_over_the_data_set(packed: bool, tmp_path: Path) -> None:
    """Seven rows in batches of two: neither their sizes nor their tokens' counts matter."""
    student, teacher = llama(), llama(7, hidden=40)
    rows = pairs(7, seed=1)
    found = dckd(tmp_path, student, teacher, padding_free=packed).evaluate()
    with torch.no_grad():
        loss = dense.dckd(student, teacher, 0.5, ("chosen", "rejected"))(rows)
        parts = {
            "sft": dense.supervised(student, rows),
            "kl_chosen": dense.forward_kl(student, teacher, rows, "chosen"),
            "kl_rejected": dense.forward_kl(student, teacher, rows, "rejected"),
        }
    assert found["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, value in parts.items():
        assert found[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-5)


def test_evaluation_of_another_data_set_and_of_several(tmp_path: Path) -> None:
    trainer = dckd(tmp_path)
    rows = pairs(5, seed=3)
    one = trainer.evaluate(rows)["eval_loss"]
    several = trainer.evaluate({"a": rows, "b": pairs(3, seed=4)})
    assert several["eval_a_loss"] == pytest.approx(one, abs=1e-6)
    assert several["eval_b_loss"] != pytest.approx(one, abs=1e-3)


def test_evaluation_of_several_data_sets_from_the_start(tmp_path: Path) -> None:
    parts = {"a": pairs(5, seed=3), "b": pairs(3, seed=4)}
    trainer = pt.PreferenceTrainer(
        llama(),
        arguments(pt.PreferenceConfig, tmp_path, loss="sft"),
        processing_class=tokenizer(),
        eval_dataset=parts,
    )
    found = trainer.evaluate()
    for name, rows in parts.items():
        with torch.no_grad():
            want = dense.supervised(trainer.model, rows).item()
        assert found[f"eval_{name}_loss"] == pytest.approx(want, abs=1e-5)


def test_rows_of_a_length_side_by_side(tmp_path: Path) -> None:
    options = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1, "max_steps": -1}
    trainer = dckd(tmp_path, **options)
    lengths = [
        2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in pairs(12)
    ]
    assert trainer.train_dataset["length"] == lengths
    trainer.train()
    assert trainer.state.global_step == 6


def test_an_evaluation_leaves_the_training_logs_alone(tmp_path: Path) -> None:
    quiet = dckd(tmp_path / "a")
    quiet.train()
    asked = dckd(tmp_path / "b", eval_strategy="steps", eval_steps=1)
    asked.train()
    assert logged(asked, "sft") == logged(quiet, "sft")
    assert len(logged(asked, "eval_loss")) == 4


# Logs.


def test_pad_logs(tmp_path: Path) -> None:
    model, rows = llama(), groups(4)
    trainer = pt.PADTrainer(
        model,
        arguments(pt.PADConfig, tmp_path, max_steps=1, gradient_accumulation_steps=2),
        processing_class=tokenizer(),
        train_dataset=rows,
    )
    before = copy.deepcopy(model)
    trainer.train()
    entry = trainer.state.log_history[0]
    with torch.no_grad():
        scores = [[logprobs(before, r["prompt"], y).mean() for y in r["responses"]] for r in rows]
    taus, same, everything = [], 0, []
    for row, ours in zip(rows, scores, strict=True):
        theirs, n = row["rewards"], len(ours)
        agree = [
            1 if (ours[i] < ours[j]) == (theirs[i] < theirs[j]) else -1
            for i in range(n)
            for j in range(i)
        ]
        taus.append(sum(agree) / len(agree))
        same += max(range(n), key=ours.__getitem__) == max(range(n), key=theirs.__getitem__)
        everything += ours
    assert entry["kendall_tau"] == pytest.approx(sum(taus) / 4)
    assert entry["accuracy"] == pytest.approx(same / 4)
    assert entry["rewards"] == pytest.approx(sum(everything).item() / len(everything), abs=1e-5)
    assert entry["preference"] == pytest.approx(entry["loss"], abs=1e-6)
    assert entry["peak_memory_mib"] > 1


def test_dpo_logs_rewards(tmp_path: Path) -> None:
    model, reference, rows = llama(), llama(3), pairs(4)
    before = copy.deepcopy(model)
    trainer = pt.PreferenceTrainer(
        model,
        arguments(pt.PreferenceConfig, tmp_path, max_steps=1, gradient_accumulation_steps=2),
        reference=pt.ModelTeacher(reference, tokenizer()),
        processing_class=tokenizer(),
        train_dataset=rows,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    up, down = (
        0.1 * (dense.sums_under(before)(rows, name) - dense.sums_under(reference)(rows, name))
        for name in ("chosen", "rejected")
    )
    assert entry["rewards/chosen"] == pytest.approx(up.mean().item(), abs=1e-5)
    assert entry["rewards/rejected"] == pytest.approx(down.mean().item(), abs=1e-5)
    assert entry["rewards/margins"] == pytest.approx((up - down).mean().item(), abs=1e-5)
    assert entry["rewards/accuracies"] == pytest.approx((up > down).float().mean().item())


def test_adpa_logs_both_means(tmp_path: Path) -> None:
    student, aligned, reference, rows = llama(), llama(3), llama(4, hidden=40), own(4)
    tok = tokenizer()
    trainer = pt.ADPATrainer(
        student,
        arguments(pt.ADPAConfig, tmp_path, gamma=2.0, beta=0.3),
        aligned=pt.ModelTeacher(aligned, tok),
        reference=pt.ModelTeacher(reference, tok),
        processing_class=tok,
        train_dataset=rows,
    )
    with torch.no_grad():
        sft = dense.supervised(student, rows).item()
        led = sft - dense.adpa(student, aligned, reference, 1.0, 0.3)(rows).item()
    found = trainer.evaluate(rows)
    assert found["eval_sft"] == pytest.approx(sft, abs=1e-5)
    assert found["eval_advantage"] == pytest.approx(led, abs=1e-5)
    assert found["eval_loss"] == pytest.approx(sft - 2.0 * led, abs=1e-5)


# Resuming, and other ways to run.


def test_resuming_repeats_bit_by_bit(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    whole = dckd(tmp_path / "whole", **options)
    whole.train()
    again = dckd(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(again, "loss")[3:] == logged(whole, "loss")[3:]
    assert len(logged(again, "loss")) == 6
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_resume_bit_by_bit(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer(folder: Path) -> Any:
        return pt.PreferenceTrainer(
            llama(),
            arguments(
                pt.PreferenceConfig,
                folder,
                save_strategy="steps",
                save_steps=2,
                learning_rate=0.1,
                lr_scheduler_type="constant",
            ),
            processing_class=tokenizer(),
            train_dataset=pairs(12),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]),
        )

    whole, again = trainer(tmp_path / "whole"), trainer(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again, "loss")[2:] == logged(whole, "loss")[2:]
    assert logged(whole, "loss")[0] == pytest.approx(0.6931, abs=1e-4)
    assert logged(whole, "loss")[-1] != pytest.approx(0.6931, abs=1e-2)


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    plain, saved = (dckd(tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    plain.train()
    saved.train()
    assert saved.model.is_gradient_checkpointing
    assert logged(saved, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    wide, half = (dckd(tmp_path / str(on), bf16=on) for on in (False, True))
    wide.train()
    half.train()
    assert logged(half, "loss") == pytest.approx(logged(wide, "loss"), rel=0.02)
    assert logged(half, "loss") != logged(wide, "loss")
    assert all(each.dtype == torch.float32 for each in half.model.parameters())


def test_a_teacher_is_not_trained(tmp_path: Path) -> None:
    teacher = llama(7, hidden=40)
    before = copy.deepcopy(teacher.state_dict())
    dckd(tmp_path, teacher=teacher).train()
    assert not teacher.training
    assert all(each.grad is None and not each.requires_grad for each in teacher.parameters())
    assert all(torch.equal(a, before[name]) for name, a in teacher.state_dict().items())


def test_a_teachers_head_stays_on_the_cpu(tmp_path: Path) -> None:
    """Its place is all that changes; "meta" stands for the device."""
    near, far = (dckd(tmp_path / str(on), teacher=None) for on in (False, True))
    model = llama(7, hidden=40)
    far.teachers["teacher"] = pt.ModelTeacher(model, tokenizer(), head_on_cpu=True)
    far.teachers["teacher"].attach("teacher", tokenizer(), torch.device("cpu"))
    near.train()
    far.train()
    assert logged(far, "loss") == logged(near, "loss")
    far.teachers["teacher"].attach("teacher", tokenizer(), torch.device("meta"))
    assert model.lm_head.weight.device.type == "cpu"
    assert model.model.embed_tokens.weight.device.type == "meta"
    with pytest.raises(ValueError, match="head_on_cpu: expected False for a head that is the emb"):
        pt.ModelTeacher(llama(tied=True), tokenizer(), head_on_cpu=True)


def test_a_teacher_in_half_precision(tmp_path: Path) -> None:
    """Beside a student in float32 under autocast."""
    wide = dckd(tmp_path / "wide", teacher=llama(7, hidden=40), bf16=True)
    half = dckd(tmp_path / "half", teacher=llama(7, hidden=40).bfloat16(), bf16=True)
    wide.train()
    half.train()
    assert logged(half, "loss") == pytest.approx(logged(wide, "loss"), rel=0.02)


def test_padded_heads_share_the_tokenizers_vocabulary(tmp_path: Path) -> None:
    """Entries that one of the models lacks have no part in the loss."""
    student, teacher, rows = llama(vocab=VOCAB), llama(7, hidden=40, vocab=VOCAB + 20), pairs(4)
    trainer = dckd(tmp_path, student, teacher)
    want = dense.dckd(student, teacher, 0.5, ("chosen", "rejected"))(rows)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(want.item(), abs=1e-5)


def test_a_windowed_model_packs(tmp_path: Path) -> None:
    padded, packed = (dckd(tmp_path / str(p), gemma(), padding_free=p) for p in (False, True))
    assert packed.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], abs=1e-5)


def test_ligers_losses_stay_off(tmp_path: Path) -> None:
    args = arguments(pt.DCKDConfig, tmp_path, use_liger_kernel=True)
    assert args.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ValueError, match=r"liger_kernel_config.*: expected False"):
        wanted = {"fused_linear_cross_entropy": True}
        arguments(pt.DCKDConfig, tmp_path, use_liger_kernel=True, liger_kernel_config=wanted)
