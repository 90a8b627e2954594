"""Preference-aligned distillation end to end on a plain machine: `pad-kernels demo`.

The pieces, in the order in which they run: `corpus`, `models`, `pretrain`, `sampling`,
`preference`, `measure`, `step_cost`, `report`; `pipeline` calls them and `settings` holds every
number. The rest of the library imports none of this.
"""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("transformers", "tokenizers", "tqdm", "matplotlib", "jinja2")
INSTALL = "pip install 'pad-kernels[demo]'"


def missing_packages() -> list[str]:
    """Packages that the demo needs and this environment does not have."""
    return [name for name in NEEDED if find_spec(name) is None]
