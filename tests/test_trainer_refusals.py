"""What trainers refuse, and how they say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")

from trainer_runs import arguments, dckd
from trainer_toys import groups, llama, pairs, tokenizer

import pad_kernels.integrations.transformers as pt

pytestmark = pytest.mark.usefixtures("one_thread")


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
