"""What ranking many responses holds in memory: never n! numbers."""

from __future__ import annotations

import math
import weakref

import pytest
from listwise_cases import rewards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pad_kernels.backends.registry import native
from pad_kernels.sequence import listwise_torch


class LiveBytes(TorchDispatchMode):
    """Bytes of storage alive, made by the operations inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in {x.data_ptr() for x in self.seen}:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage.nbytes())
                    self.peak = max(self.peak, self.now)
        return out

    def release(self, nbytes):
        self.now -= nbytes


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
@pytest.mark.parametrize("groups", [1, 4])
def test_memory_of_the_twin_over_sets(kind, groups):
    n = 13
    s, t = rewards(groups, n), rewards(groups, n)
    with LiveBytes() as live:
        listwise_torch.solve(kind, s, t)
    assert live.peak > groups * 3 * 8 * 2**n  # the mode does see the tables
    shared = 4 * 8 * 2**n  # which sets there are, by level: not per group
    assert live.peak - shared < groups * 8 * 8 * 2**n  # 4 MiB a group at 16


@pytest.mark.parametrize("kind", ["jsd", "jsd_released"])
def test_memory_of_the_twin_for_jsd(kind):
    listwise_torch.solve(kind, rewards(1, 8), rewards(1, 8))  # fill the cache of orders
    s, t = rewards(16, 8), rewards(16, 8)
    with LiveBytes() as live:
        listwise_torch.solve(kind, s, t)
    one_array = 16 * math.factorial(8) * 8
    assert live.peak < one_array


@pytest.mark.skipif(native() is None, reason="no compiled module")
def test_workspace_of_the_kernels():
    for kind in ("kl", "reverse_kl"):
        assert 2**16 < 8 * native().listwise_words(kind, 16) < 4 * 2**20
    assert 8 * native().listwise_words("jsd", 8) < 16 * 2**10
