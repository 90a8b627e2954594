"""The command line of the pipelines: one YAML file, one stage at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

INSTALL = "pip install 'pad-kernels[train]'"
_NEEDS = ("transformers", "datasets", "accelerate", "pyarrow", "safetensors", "tqdm", "yaml")

#: What a wrong call, wrong data or a machine that is too small raise.
MISTAKES = (ValueError, TypeError, OSError, RuntimeError)

#: For each command: its module, its help, its description.
COMMANDS = {
    "sample": (
        "sample",
        "write responses of a model to prompts",
        """\
Write n responses of the student (or the teacher) to each prompt of a file, sampled at a
temperature, each prompt with a seed of its own. Goes on where it was killed.

examples:
  pad-kernels sample run.yaml
""",
    ),
    "score": (
        "score",
        "a teacher's rewards of responses, as PAD has them",
        """\
Score responses with a teacher: the mean log-prob of their tokens, and PAD's calibration by
multiple-choice questions, pairwise or of all responses at once. Goes on where it was killed.

examples:
  pad-kernels score run.yaml
""",
    ),
    "cache": (
        "teacher_cache",
        "run a teacher once, and train from disk",
        """\
Run the teacher over the rows that are trained on, and keep its likeliest tokens, the log-ratios
of two teachers, or its hidden states. Goes on where it was killed.

examples:
  pad-kernels cache run.yaml --method dckd
""",
    ),
    "train": (
        "train",
        "distil into a student, or train it on preferences",
        """\
Train the student with one of the methods, losses straight from hidden states: no logits are
stored. Goes on from the last whole checkpoint after a kill, to the same losses.

examples:
  pad-kernels train run.yaml --method pad
""",
    ),
    "eval": (
        "evaluate",
        "held-out metrics of the student before and after",
        """\
Measure the student and everything trained from it on held-out rows: losses, rewards, preference
accuracy, divergence from the teacher, Kendall's tau. Prints a table and writes it as JSON.

examples:
  pad-kernels eval run.yaml
""",
    ),
}


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """The options of a command."""
    parser.add_argument("file", type=Path, metavar="RUN.yaml", help="the settings of the run")
    if name in ("cache", "train"):
        parser.add_argument(
            "--method",
            metavar="NAME",
            help="pad, dckd, adpa, adpa+, dpo, simpo, orpo, cpo, kto, sft, kd or seqkd; default: "
            "what the file says",
        )
    parser.add_argument(
        "--debug", action="store_true", help="show where in the code an error comes from"
    )


def command(name: str) -> Callable[[argparse.Namespace], None]:
    """The function of a command.

    It raises one of MISTAKES for a wrong call.
    """

    def run(args: argparse.Namespace) -> None:
        missing = [each for each in _NEEDS if find_spec(each) is None]
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)}; install with: {INSTALL}")
        from pad_kernels.pipeline import settings

        method = getattr(args, "method", None)
        if method is not None and method not in get_args(settings.Name):
            expected = "one of " + ", ".join(get_args(settings.Name))
            raise ValueError(f"--method: expected {expected}, got {method!r}")
        found = settings.read(args.file, method=method)
        stage: Any = import_module(f"pad_kernels.pipeline.{COMMANDS[name][0]}")
        print(stage.run(found))

    return run


def message(file: Path, error: BaseException) -> str:
    """An error in one line that begins with the settings' file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith(str(file)) else f"{file}: {text}"
