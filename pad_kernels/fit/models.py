"""Models without weights: from a config to parameters that have shapes and dtypes only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pad_kernels._checks import fail_value

SHAPES = Path(__file__).parent / "shapes"


def built_in() -> list[str]:
    """Names of the shapes that come with the package."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def require_transformers() -> None:
    """Raise with the command that installs it if transformers is missing."""
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "plan builds models from their configs with transformers, which is not installed; "
            "install with: pip install transformers"
        )


def read_config(name: str, source: str) -> Any:
    """The transformers config of a causal LM.

    Args:
        name: what the argument is called in messages.
        source: a built-in shape, a folder that holds a config.json, or a JSON file.

    Raises:
        ValueError: there is no such thing, or it is no config of a model that transformers knows.
    """
    from transformers import AutoConfig

    path = SHAPES / f"{source}.json" if source in built_in() else Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        expected = "a folder with a config.json, a JSON file, or one of " + ", ".join(built_in())
        fail_value(name, expected, f"{source!r}, where there is no such file")
    except (OSError, UnicodeDecodeError) as error:
        fail_value(name, "a readable config", f"{path}: {error}")
    except json.JSONDecodeError as error:
        fail_value(name, "valid JSON", f"{path}: {error}")
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        fail_value(name, "a model's config with a model_type", str(path))
    try:
        config = AutoConfig.for_model(**values).get_text_config()
    except Exception as error:  # whatever a config class makes of wrong values
        fail_value(name, "a config that transformers can read", f"{path}: {line_of(error)}")
    if not getattr(config, "vocab_size", None):
        fail_value(name, "a language model's config", f"{path}, which names no vocab_size")
    return config


def line_of(error: Exception) -> str:
    """The beginning of an error's first line; the whole may be pages long."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 240 else line[:240] + " ..."


@contextmanager
def no_weights() -> Iterator[None]:
    """Tensors made in here have shapes and dtypes, but no memory; transformers is silent."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Fake CPU tensors, not meta ones: autocast and rotary embeddings ask for a real device.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logging.set_verbosity(level)


def build(name: str, config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """A causal LM without weights; call inside :func:`no_weights`.

    Args:
        name: what the config is called in messages.
        config: of transformers.
        dtype: of all parameters.
        attention: an attention implementation of transformers.

    Raises:
        ValueError: transformers has no causal LM for this config.
    """
    from transformers import AutoModelForCausalLM

    config._attn_implementation = attention
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        fail_value(name, "the config of a causal LM", f"{config.model_type}: {line_of(error)}")
    return model.train()


def checkpoint(model: Any) -> None:
    """Switch gradient checkpointing on, as trainers do."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


class _Adapted(nn.Module):
    """A frozen linear layer with LoRA beside it, as PEFT computes it (arXiv 2106.09685).

    PEFT keeps adapters in float32 by default and casts the layer's input to it.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        # Twice the product stands for PEFT's scaling, another tensor of this size.
        return (y + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(y.dtype)


def add_lora(model: Any, rank: int) -> None:
    """Freeze a model, its head included, and put adapters beside its other linear layers.

    Raises:
        ValueError: there are no linear layers to adapt.
    """
    head = model.get_output_embeddings()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and layer is not head
    ]
    if not places:
        fail_value("lora-rank", "a model with nn.Linear layers", type(model).__name__)
    for parent, name, layer in places:
        setattr(parent, name, _Adapted(layer, rank))


def count(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    """Entries of some parameters."""
    return sum(p.numel() for p in parameters)
