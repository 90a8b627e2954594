"""Which tensors a kernel's pointers may reach, and which of its programs touched what."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from pad_kernels.engine.plan import padded


class Fault(AssertionError):
    """What would be a race, a fault or a wrong number on a GPU."""


def _with_padding(x: Tensor) -> Tensor:
    """A matrix whose rows are padded to whole accesses (``launch.reach``), and their padding."""
    if x.dim() != 2 or x.stride(0) != padded(x.shape[1]):
        return x
    last = x.storage_offset() + x.shape[0] * x.stride(0)
    inside = last * x.element_size() <= x.untyped_storage().nbytes()
    return x.as_strided((x.shape[0], x.stride(0)), x.stride()) if inside else x


class Region:
    """What a pointer may reach: runs of bytes that one tensor consists of."""

    def __init__(self, tensor: Tensor) -> None:
        self.item, self.base = tensor.element_size(), tensor.data_ptr()
        self.name = f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)} by {tensor.stride()}"
        tensor = _with_padding(tensor)
        axes = sorted(
            (t * self.item, n) for n, t in zip(tensor.shape, tensor.stride(), strict=True)
        )
        offsets, self.length = np.zeros(min(tensor.numel(), 1), np.int64), self.item
        for stride, size in axes:
            if stride == self.length and offsets.size == 1:
                self.length *= size
            elif stride and size > 1:
                offsets = (np.arange(size)[:, None] * stride + offsets).ravel()
        self.starts = np.sort(offsets) + self.base

    def entry(self, address: Any) -> float:
        return (int(address) - self.base) / self.item

    def run_of(self, addresses: np.ndarray) -> Any:
        """The run of each address, or of all of them."""
        low = bisect.bisect_right(self.starts, addresses.min()) - 1
        if low >= 0 and addresses.max() < self.starts[low] + self.length:
            return low
        return np.searchsorted(self.starts, addresses, "right") - 1

    def check(self, access: str, addresses: np.ndarray) -> None:
        if not self.starts.size:
            raise Fault(f"{access} outside {self.name}, which is empty")
        runs = self.run_of(addresses)
        if isinstance(runs, int):
            return
        wrong = (runs < 0) | (addresses > self.starts[runs] + self.length - self.item)
        if wrong.any():
            one = self.entry(addresses[wrong][0])
            raise Fault(f"{access} outside {self.name}: {wrong.sum()} entries, one at {one:g}")

    def reaches(self, addresses: np.ndarray) -> bool:
        """Whether any of some ascending addresses is one of a tensor's."""
        after = np.append(addresses, np.iinfo(np.int64).max)[
            np.searchsorted(addresses, self.starts)
        ]
        return bool((after < self.starts + self.length).any())


class Launch:
    """The tensors of a launch, and every access to them."""

    def __init__(self, kernel: str) -> None:
        self.kernel, self.program = kernel, 0
        self.regions: list[Region] = []
        self.accesses: list[tuple[str, Region, np.ndarray, int]] = []

    def region(self, tensor: Tensor) -> Region:
        self.regions.append(Region(tensor))
        return self.regions[-1]

    def touch(self, access: str, pointer: TensorHandle, mask: np.ndarray) -> None:
        """Check and write down an access."""
        region = pointer.attr.get("region")
        if region is None:
            raise Fault(f"{access} through a pointer that comes from no argument")
        addresses = pointer.data.view(np.int64)
        addresses = addresses.ravel() if mask.all() else addresses[mask]
        if addresses.size:
            region.check(access, addresses)
            self.accesses.append((access, region, addresses, self.program))

    def check_races(self) -> None:
        """Replay the accesses to whatever is stored, in the order in which they came."""
        stored = [x for access, _, x, _ in self.accesses if access != "load"]
        places = np.unique(np.concatenate(stored)) if stored else np.zeros(0, np.int64)
        # Programs count from 1; -1 stands for atomics, and for several readers.
        writer, reader = np.zeros(places.size, np.int32), np.zeros(places.size, np.int32)
        shared = {region for region in self.regions if region.reaches(places)}
        for access, region, addresses, program in self.accesses:
            if region not in shared:
                continue
            at, me = np.searchsorted(places, addresses), program + 1
            if access == "load":
                found = places.take(at, mode="clip") == addresses
                at, addresses = at[found], addresses[found]
            wrote, read = writer[at], reader[at]
            if access == "load":
                wrong = wrote != 0
                reader[at] = np.where((read == 0) | (read == me), me, -1)
            elif access == "store":
                wrong = (wrote != 0) | ((read != 0) & (read != me))
                writer[at] = me
            else:
                wrong = (wrote > 0) | (read != 0)
                writer[at] = -1
            if wrong.any():
                one = int(np.flatnonzero(wrong)[0])
                raise Fault(
                    f"{self.kernel}: {access} by program {program} of entry "
                    f"{region.entry(addresses[one]):g} of {region.name}, stored by {wrote[one] - 1}"
                    f", loaded by {read[one] - 1} (-1: none, -2: atomics or several)"
                )
