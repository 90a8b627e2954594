"""``cut_cross_entropy.constants``."""

IGNORE_INDEX: int = -100
