"""The command line of ``pad-kernels plan``."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pad_kernels._checks import fail_value

DESCRIPTION = """\
What fits in a GPU's memory before renting one: parameters, gradients, optimizer, teachers,
activations and the LM head of one training step, with dense logits and with this library, with and
without gradient checkpointing, and the largest micro-batch of each. Works from configs alone: the
models are built without weights and their own code is traced, nothing is allocated or downloaded.

examples:
  pad-kernels plan --student gemma-2-2b --gpu 24 --optimizer adafactor
  pad-kernels plan --student gemma-2-2b --teacher gemma-2-9b --method dckd --gpu 80 --plot fit.png
  pad-kernels plan --student path/to/student --lora-rank 16 --length 2048 --responses 8 --gpu 48

built-in shapes: {shapes}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    from pad_kernels.fit.heads import METHODS
    from pad_kernels.fit.optimizers import OPTIMIZERS
    from pad_kernels.fit.step import PRECISIONS

    add = parser.add_argument
    config = "a folder with config.json, a JSON file or a built-in shape"
    add("--student", required=True, metavar="CONFIG", help=config)
    add("--teacher", metavar="CONFIG", help="likewise; without it its outputs come from a cache")
    add("--reference", metavar="CONFIG", help="adpa's second teacher; default: like the teacher")
    add("--method", choices=METHODS, default="pad", help="the loss (default %(default)s)")
    add("--gpu", type=_gib, default=_gib("24"), metavar="GIB", help="its memory (default 24)")
    add(
        "--reserve",
        type=_gib,
        default=_gib("1"),
        metavar="GIB",
        help="of it, for the CUDA context, libraries and fragmentation (default 1)",
    )
    add("--length", type=_whole, default=1024, metavar="T", help="tokens of a sequence, prompt "
        "included (default %(default)s)")  # fmt: skip
    add("--responses", type=_whole, default=4, metavar="N", help="sequences of a group: responses "
        "to one prompt (default %(default)s)")  # fmt: skip
    states = "; ".join(f"{name}: {text}" for name, text in OPTIMIZERS.items())
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help=f"{states} (default %(default)s)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="bf16: parameters and gradients in bfloat16; fp32-master: in float32, products in "
        "bfloat16 by autocast (default %(default)s)",
    )
    add("--lora-rank", type=_whole, metavar="R", help="train adapters on every linear layer but "
        "the head, the rest frozen in bfloat16")  # fmt: skip
    add("--eager-attention", action="store_true", help="attention that stores heads x T x T "
        "numbers; default: flash attention")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="write a picture (PNG)")
    add("--json", type=Path, metavar="FILE", help="write all figures, in bytes")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _gib(text: str) -> int:
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e6:
        raise argparse.ArgumentTypeError(f"expected a size in GiB, got {text!r}")
    return int(size * 2**30)


def run(args: argparse.Namespace) -> int:
    """`pad-kernels plan`; 2 where nothing fits.

    Raises:
        ValueError, ModuleNotFoundError: a wrong argument, or a package that is missing.
    """
    from pad_kernels.fit import report
    from pad_kernels.fit.models import require_transformers

    require_transformers()
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib; install with: pip install matplotlib")
    for name in ("plot", "json"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            fail_value(f"--{name}", "a file in a folder that is there", str(path))
    found = report.cases(_setup(args))
    student = Path(args.student).name
    print(report.table(found, student))
    if args.json is not None:
        given = {k: v for k, v in vars(args).items() if k not in ("run", "plot", "json")}
        text = json.dumps(report.as_dict(found, given), indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot is not None:
        from pad_kernels.fit import plot

        plot.save(found, f"{student}, {args.method}, {args.optimizer}", args.plot)
    if not any(case.groups for case in found):
        print()
        raise ValueError(report.nothing_fits(found))
    return 0


def _setup(args: argparse.Namespace) -> Any:
    """Configs read, options checked against each other."""
    from pad_kernels.fit.heads import METHODS
    from pad_kernels.fit.models import read_config
    from pad_kernels.fit.step import Setup

    if args.reserve >= args.gpu:
        fail_value("--gpu", "more memory than --reserve", f"{args.gpu / 2**30:g} GiB")
    if args.reference is not None and (args.method != "adpa" or args.teacher is None):
        fail_value("--reference", "none without --method adpa and --teacher", args.reference)
    sources = {"teacher": args.teacher, "reference": args.reference or args.teacher}
    wanted = METHODS[args.method] if args.teacher is not None else ()
    student = read_config("--student", args.student)
    longest = getattr(student, "max_position_embeddings", None)
    if longest is not None and args.length > longest:
        fail_value("--length", f"at most the student's {longest} positions", args.length)
    return Setup(
        student=student,
        teachers=tuple(read_config(f"--{name}", sources[name]) for name in wanted),
        method=args.method,
        length=args.length,
        responses=args.responses,
        gpu_bytes=args.gpu,
        reserve_bytes=args.reserve,
        optimizer=args.optimizer,
        precision=args.precision,
        lora_rank=args.lora_rank,
        eager_attention=args.eager_attention,
    )
