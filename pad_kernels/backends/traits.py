"""What a planner has to know of a backend: data, as a plan may be for one that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass

#: The plain torch row passes work on tiles of this many elements, and hold about so many
#: temporaries of a tile's size at once.
TORCH_TILE = 1 << 18
TORCH_TEMPORARIES = 16


@dataclass(frozen=True)
class Traits:
    """Of one backend.

    Args:
        temporaries: how many numbers of the accumulation dtype its row passes hold besides.
        fuses: most streams whose statistics it takes without logits in memory; 0 for never.
    """

    temporaries: int = 0
    fuses: int = 0


_TRAITS = {
    "torch_blocked": Traits(temporaries=TORCH_TILE * TORCH_TEMPORARIES),
    "triton": Traits(fuses=3),
}


def traits(backend: str) -> Traits:
    """Those of the backend of that name."""
    return _TRAITS.get(backend, Traits())
