"""Preference-aligned distillation end to end on a plain machine: `pad-kernels demo`.

The pieces, in the order in which they run: `corpus`, `models`, `pretrain`, `sampling`,
`preference`, `measure`, `step_cost`, `report`; `pipeline` calls them and `settings` holds every
number. The rest of the library imports none of this.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

NEEDED = ("tokenizers", "accelerate", "datasets", "tqdm", "matplotlib", "jinja2")
TRANSFORMERS = 5  # the oldest major version
INSTALL = "pip install 'pad-kernels[demo]'"


def missing_packages() -> list[str]:
    """Packages that the demo needs and this environment does not have."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if find_spec("transformers") is None or _major("transformers") < TRANSFORMERS:
        missing.insert(0, f"transformers>={TRANSFORMERS}")
    return missing


def _major(package: str) -> int:
    return int(version(package).split(".")[0])
