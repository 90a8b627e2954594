"""What trainers do beside the loss: evaluate, resume, log, checkpoint activations, refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")

import trainer_dense as dense
from trainer_toys import VOCAB, gemma, groups, llama, logprobs, own, pairs, tokenizer

import pad_kernels.integrations.transformers as pt

pytestmark = pytest.mark.usefixtures("one_thread")


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


TWO_RANKS = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
import test_trainer_run as t

torch.set_num_threads(1)
trainer = t.dckd(Path({folder!r}), max_steps=2, per_device_train_batch_size=1,
                 gradient_accumulation_steps=2, train_sampling_strategy="sequential",
                 ddp_backend="gloo", optim="sgd", max_grad_norm=0.0)
trainer.train()
kto = t.kto(Path({folder!r}), per_device_train_batch_size=1, gradient_accumulation_steps=2,
            ddp_backend="gloo")
kto.train()
found = [each.evaluate()["eval_loss"] for each in (trainer, t.adpa(Path({folder!r})))]
found.append(trainer.evaluate(t.pairs(5, seed=1))["eval_loss"])
if trainer.accelerator.is_main_process:
    assert trainer.accelerator.num_processes == 2
    logs = [t.logged(trainer, "loss"), t.logged(trainer, "sft")]
    logs += [t.logged(kto, "loss"), t.logged(kto, "kl")]
    torch.save((trainer.model.state_dict(), *logs, found), {result!r})
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """Micro-batches of one row, with different numbers of tokens, on two ranks."""
    pytest.importorskip("peft")
    here, result = str(Path(__file__).parent), str(tmp_path / "result.pt")
    script = tmp_path / "two.py"
    path = [here, str(Path(here).parent)]
    script.write_text(TWO_RANKS.format(path=path, folder=str(tmp_path / "two"), result=result))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, *launch, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = dckd(
        tmp_path / "one",
        max_steps=2,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        optim="sgd",
        max_grad_norm=0.0,
    )
    one.train()
    whole = kto(tmp_path / "kto", per_device_train_batch_size=4)
    whole.train()
    weights, losses, supervised, kto_losses, points, found = torch.load(result)
    assert kto_losses == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert points == pytest.approx(logged(whole, "kl"), abs=1e-5)
    assert max(points) > 0
    # Rows that are repeated to fill the ranks' last batches do not count.
    alone = [each.evaluate()["eval_loss"] for each in (one, adpa(tmp_path))]
    alone.append(one.evaluate(pairs(5, seed=1))["eval_loss"])
    assert found == pytest.approx(alone, abs=1e-4)
    assert losses == pytest.approx(logged(one, "loss"), abs=1e-5)
    assert supervised == pytest.approx(logged(one, "sft"), abs=1e-5)
    for name, value in one.model.state_dict().items():
        assert torch.allclose(weights[name], value, atol=1e-5), name


def test_ligers_losses_stay_off(tmp_path: Path) -> None:
    args = arguments(pt.DCKDConfig, tmp_path, use_liger_kernel=True)
    assert args.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ValueError, match=r"liger_kernel_config.*: expected False"):
        wanted = {"fused_linear_cross_entropy": True}
        arguments(pt.DCKDConfig, tmp_path, use_liger_kernel=True, liger_kernel_config=wanted)


LIGER = """
import sys
sys.path[:0] = {path!r}
from trainer_toys import llama
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from pad_kernels.integrations.transformers import DCKDConfig, head_of
model = llama()
norm = model.model.norm.forward
config = DCKDConfig("unused", use_liger_kernel=True, report_to=[]).liger_kernel_config
_apply_liger_kernel_to_instance(model=model, **config)
assert model.model.norm.forward != norm, "nothing was replaced"
assert model.forward.__func__ is type(model).forward and "liger" not in model.forward.__module__
head_of(model)
"""


@pytest.mark.slow
def test_ligers_layers_leave_the_models_forward(tmp_path: Path) -> None:
    """In a process of its own: it patches modules. Running its kernels takes a GPU."""
    pytest.importorskip("liger_kernel")
    here = Path(__file__).parent
    script = LIGER.format(path=[str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Refusals.


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher with the student's tokenizer.*'w0' has id 3"):
        pt.DCKDTrainer(
            llama(),
            arguments(pt.DCKDConfig, tmp_path),
            teacher=pt.ModelTeacher(llama(), tokenizer(order=-1)),
            processing_class=tokenizer(),
            train_dataset=pairs(2),
        )


def test_sequences_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length: expected at most the model's context, 64"):
        dckd(tmp_path, max_length=65)
    with pytest.raises(ValueError, match=r"column 'rejected', row \d+: expected at most 12 tokens"):
        dckd(tmp_path, max_length=12)


def test_a_head_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher: expected a head of at least .* 300 .*got 290"):
        dckd(tmp_path, teacher=llama(vocab=290))


class _Leaky(torch.nn.Module):
    """Keeps nothing apart: a running mean over whatever came before."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        steps = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states.cumsum(1) / steps, None


def test_a_model_that_mixes_packed_sequences_is_refused(tmp_path: Path) -> None:
    student = llama()
    student.model.layers[0].self_attn = _Leaky()
    trainer = dckd(tmp_path, student, padding_free=True)
    with pytest.raises(ValueError, match="padding_free: expected False: this model does not keep"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (pt.DCKDConfig, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
        (pt.DCKDConfig, {"remove_unused_columns": True}, "remove_unused_columns: expected False"),
        (pt.PADConfig, {"average_tokens_across_devices": False}, "across_devices: expected True"),
        (pt.DCKDConfig, {"overlong": "cut"}, "overlong: expected one of error, drop"),
        (pt.DCKDConfig, {"alpha": -1.0}, "alpha: expected a number >= 0"),
        (pt.ADPAConfig, {"beta": 0.0}, "beta: expected a number > 0"),
        (pt.PADConfig, {"max_length": 1}, "max_length: expected an integer >= 2"),
    ],
)
def test_bad_arguments(config: type, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(config, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "loss: expected one of dpo, hinge"),
        ({"loss": "dpo", "gamma": 1.0}, "gamma: expected None for kind='dpo'"),
        ({"loss": "kto", "gamma": 1.0}, "gamma: expected None for loss='kto'"),
        ({"loss": "orpo", "beta": 0.0}, "beta: expected a number > 0"),
        ({"loss": "cpo", "cpo_kind": "exo"}, "kind: expected one of sigmoid, hinge"),
        ({"loss": "kto"}, "reference: expected a ModelTeacher or a PEFT adapter"),
        ({"loss": "dpo"}, "a column 'ref_chosen_logps' .*give the trainer a reference"),
    ],
)
def test_bad_preference_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pt.PreferenceTrainer(
            llama(),
            arguments(pt.PreferenceConfig, tmp_path, **options),
            processing_class=tokenizer(),
            train_dataset=pairs(2),
        )


def test_references_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference: expected None: simpo has no reference"):
        pt.PreferenceTrainer(
            llama(),
            arguments(pt.PreferenceConfig, tmp_path, loss="simpo"),
            reference=pt.ModelTeacher(llama(), tokenizer()),
            processing_class=tokenizer(),
            train_dataset=pairs(2),
        )


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pt.DCKDConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one GPU a process: start with torchrun"):
        dckd(tmp_path)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_split_sequences_and_heads_are_refused(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pt.DCKDTrainer, f"get_{kind}_size", lambda self: 2)
    with pytest.raises(ValueError, match="args: expected data parallelism alone"):
        dckd(tmp_path)


def test_the_wrong_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: expected a PADConfig, got DCKDConfig"):
        pt.PADTrainer(llama(), arguments(pt.DCKDConfig, tmp_path), processing_class=tokenizer())


def test_rewards_from_two_sides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'rewards' beside a teacher: leave one out"):
        pt.PADTrainer(
            llama(),
            arguments(pt.PADConfig, tmp_path),
            teacher=pt.ModelTeacher(llama(3), tokenizer()),
            processing_class=tokenizer(),
            train_dataset=groups(2),
        )


def test_a_bare_model_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="teacher: expected a ModelTeacher"):
        pt.DCKDTrainer(
            llama(),
            arguments(pt.DCKDConfig, tmp_path),
            teacher=llama(),
            processing_class=tokenizer(),
            train_dataset=pairs(2),
        )
