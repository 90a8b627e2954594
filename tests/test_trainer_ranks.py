"""Trainers in processes of their own: several ranks, and libraries that patch modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")

from trainer_runs import adpa, dckd, kto, logged
from trainer_toys import pairs

pytestmark = pytest.mark.usefixtures("one_thread")


TWO_RANKS = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
import trainer_runs as t

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
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Threads that gloo or Arrow left running can abort an interpreter that shuts down.
os._exit(0)
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
