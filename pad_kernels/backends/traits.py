"""What a planner has to know of a backend: data, as a plan may be for one that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass

#: Element-wise temporaries of the plain torch row passes: tiles of this many elements, about so
#: many of them alive at once.
TORCH_TILE = 1 << 18
TORCH_TEMPORARIES = 16


@dataclass(frozen=True)
class Traits:
    """One backend's.

    Args:
        temporaries: numbers in the accumulation dtype that its row passes make besides.
        fuses: of how many streams it takes statistics without logits in memory, where it can.
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
