"""Which backends there are for a CPU: the extension need not be built."""

import pytest

import pad_kernels as pk

BACKENDS = ["torch_blocked"]
if pk.available_backends()["cpp"] == "available":
    BACKENDS.insert(0, "cpp")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
