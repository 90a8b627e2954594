"""What all modules share: options in the constructor, kept, shown, and handed to a function."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import nn

from pad_kernels._checks import check_flag, check_integer, check_reduction
from pad_kernels.engine.plan import PlanLike, PlanRequest
from pad_kernels.heads import HeadOptions


@dataclass(kw_only=True, eq=False, repr=False)
class Options(nn.Module):
    """A module whose dataclass fields are its options; it has no parameters and no state.

    ``eq`` and ``repr`` stay those of ``nn.Module``, here and in the subclasses.
    """

    def __post_init__(self) -> None:
        super().__init__()
        self.check()

    def check(self) -> None:
        """Raise for options that the function would refuse whatever its tensors."""

    def options(self) -> dict[str, Any]:
        """The options as keyword arguments of the function."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                shown.append(f"{field.name}={value!r}")
        return ", ".join(shown)


@dataclass(kw_only=True, eq=False, repr=False)
class PlannedOptions(Options):
    """An op of the row engine."""

    plan: PlanLike = None

    def check(self) -> None:
        """Check the plan; ops that reduce nothing cannot be early."""
        request = PlanRequest.of(self.plan)
        if getattr(self, "reduction", "none") == "none":
            request.refuse_early()


@dataclass(kw_only=True, eq=False, repr=False)
class HeadModule(PlannedOptions):
    """An op over one head given as tensors."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None

    def check(self) -> None:
        """Check the head's options."""
        super().check()
        HeadOptions.checked(self.softcap, self.logit_scale, self.temperature)
        if self.vocab_size is not None:
            check_integer("vocab_size", self.vocab_size, at_least=1)


@dataclass(kw_only=True, eq=False, repr=False)
class LabelOptions(Options):
    """How labels are read."""

    ignore_index: int = -100
    shift: bool = False

    def check(self) -> None:
        """Check them."""
        super().check()
        check_integer("ignore_index", self.ignore_index)
        check_flag("shift", self.shift)


@dataclass(kw_only=True, eq=False, repr=False)
class ReducedOptions(Options):
    """A loss over tokens."""

    reduction: str = "mean"

    def check(self) -> None:
        """Check the reduction."""
        check_reduction(self.reduction)
        super().check()
