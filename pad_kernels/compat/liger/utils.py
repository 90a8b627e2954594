"""What code around the losses imports from ``liger_kernel.utils``: where to run."""

from __future__ import annotations

import torch


def infer_device() -> str:
    """The kind of device to run on: an accelerator's if there is one, else ``"cpu"``.

    Example:
        >>> import torch
        >>> infer_device() == "cpu" or torch.accelerator.is_available()
        True
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def is_npu_available() -> bool:
    """Whether :func:`infer_device` says ``"npu"``.

    Example:
        >>> is_npu_available() == (infer_device() == "npu")
        True
    """
    return infer_device() == "npu"
