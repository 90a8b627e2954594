"""A folder with tiny models, rows and settings, for the tests of the commands."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as cores
from trainer_toys import VOCAB, llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pad_kernels import cli
from pad_kernels.pipeline import rows

CONTEXT = 160
#: Letters among the words: a teacher must be able to answer A or B.
WORDS = ["A", "B", "C", "D", *(f"w{i}" for i in range(VOCAB - 7))]
MODELS = {"student": (0, 32), "teacher": (1, 48), "reference": (2, 48)}
SETTINGS: dict[str, Any] = {
    "student": "student",
    "teacher": "teacher",
    "reference": "reference",
    "out": "run",
    "device": "cpu",
    "sample": {
        "prompts": "pairs.jsonl",
        "n": 3,
        "temperature": 0.9,
        "max_new_tokens": 6,
        "batch_size": 4,
        "shard_rows": 6,
    },
    "score": {"calibration": "pairwise", "alpha": 0.5, "batch_size": 4, "shard_rows": 6},
    "cache": {"keep": 8, "batch_size": 4},
    "train": {
        "method": "pad",
        "arguments": {
            "max_steps": 6,
            "logging_steps": 1,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",  # a step too many shows
            "disable_tqdm": True,
        },
    },
    "eval": {"pairs": "held-out.jsonl"},
}


def tokenizer(order: int = 1) -> PreTrainedTokenizerFast:
    """One id for each word; order=-1 gives words other ids."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *WORDS[::order]])}
    core = Tokenizer(cores.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"w{i} w{i + 1}", "chosen": f"w{i + 2} w{i}", "rejected": f"w{i + 5}"}
        for i in range(start, start + count)
    ]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fill(folder: Path) -> None:
    """Models, rows and run.yaml."""
    for name, (seed, hidden) in MODELS.items():
        model = llama(seed, hidden=hidden)
        model.config.max_position_embeddings = CONTEXT
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    write_rows(folder / "pairs.jsonl", pairs(20))
    write_rows(folder / "held-out.jsonl", pairs(5, 40))
    write_settings(folder / "run.yaml")


def write_settings(path: Path, **changes: Any) -> None:
    """SETTINGS with some changed; ``section__key`` changes one key of a section, None drops it."""
    values = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        place, *keys = name.split("__")
        home = values
        for key in keys:
            home, place = home.setdefault(place, {}), key
        if value is None:
            home.pop(place, None)
        else:
            home[place] = value
    path.write_text(yaml.safe_dump(values))


def refused(capsys: Any, command: str, *parts: str) -> None:
    """The command fails with one line that has these parts."""
    capsys.readouterr()
    assert cli.main(command.split()) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("pad-kernels: ")]
    assert len(lines) == 1 and errors.splitlines()[-1] == lines[0], errors
    assert "Traceback" not in errors
    for part in (command.split()[1], *parts):
        assert part in lines[0], lines[0]


def run(command: str, out: str, **changes: Any) -> Path:
    """Run a command with some settings changed; returns its run's folder."""
    write_settings(Path(f"{out}.yaml"), out=out, **changes)
    assert cli.main([command, f"{out}.yaml"]) == 0
    return Path(out)


def table(path: Path) -> list[dict[str, Any]]:
    return list(rows.read("rows", str(path)))


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name).eval()
