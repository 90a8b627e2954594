"""LM heads: hidden states, weight and the element-wise transform from raw products to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    check_integer,
    check_number,
    check_tensor,
    fail_type,
    fail_value,
)


@dataclass(frozen=True)
class HeadOptions:
    """The element-wise part of a head: ``softcap * tanh(x * scale / softcap) / temperature``.

    ``x`` is the raw product ``hidden @ weight.T + bias`` in the accumulation dtype.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    @staticmethod
    def checked(
        softcap: float | None, logit_scale: float, temperature: float, prefix: str = ""
    ) -> HeadOptions:
        """Validate the three numbers and return the options."""
        if softcap is not None:
            softcap = check_number(prefix + "softcap", softcap, above=0.0)
        logit_scale = check_number(prefix + "logit_scale", logit_scale)
        temperature = check_number(prefix + "temperature", temperature, above=0.0)
        return HeadOptions(softcap, logit_scale, temperature)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Scale, soft cap (0 for none) and temperature, as kernels take them."""
        return self.logit_scale, self.softcap or 0.0, self.temperature

    def transform(self, raw: Tensor) -> Tensor:
        """Raw products (any shape, accumulation dtype) to logits of the same shape."""
        scaled = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        if self.softcap is not None:
            scaled = torch.tanh(scaled / self.softcap) * self.softcap
        return scaled if self.temperature == 1.0 else scaled / self.temperature

    def chain(self, raw: Tensor) -> Tensor | float:
        """Derivative of :meth:`transform` at ``raw``; a plain number when it is constant."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        t = torch.tanh(raw * (self.logit_scale / self.softcap))
        return (1 - t) * (1 + t) * slope


@dataclass(frozen=True)
class Head:
    """A model's LM head applied to its hidden states.

    Args:
        hidden: hidden states [..., H], float32, float64, bfloat16 or float16.
        weight: head weight [V, H], same dtype as ``hidden`` (under autocast any floating dtype).
            A teacher's may stay on the CPU while its hidden states are on a GPU: it is sent over
            chunk by chunk, from pinned memory beside the matrix products. So does its bias.
            Change one in pinned memory only when the device has done with the step that reads it.
        bias: optional bias [V].
        softcap: final logit soft cap, > 0, or None.
        logit_scale: factor on the raw logits.
        temperature: divisor of the (capped) logits, > 0.
        vocab_size: number of leading real entries when the weight is padded; default V.

    Example:
        >>> import torch, pad_kernels as pk
        >>> pk.Head(torch.zeros(3, 8), torch.zeros(11, 8), softcap=30.0).softcap
        30.0
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None

    @property
    def rows(self) -> Tensor:
        """The hidden states [N, H]."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    @property
    def vocab(self) -> int:
        """How many entries are real."""
        return self.weight.shape[0] if self.vocab_size is None else int(self.vocab_size)

    def checked(
        self, prefix: str = "", *, gemm: torch.dtype | None = None, offloaded: bool = False
    ) -> HeadOptions:
        """Check shapes, dtypes, devices and numbers; return the element-wise options.

        Args:
            prefix: put before argument names in messages, e.g. ``"teacher."``.
            gemm: the autocast dtype when autocast is on; then mixed dtypes are welcome.
            offloaded: weight and bias may lie on the CPU, wherever ``hidden`` is.
        """
        hidden = check_tensor(prefix + "hidden", self.hidden, dtypes=FLOATS)
        if hidden.dim() < 1:
            fail_value(prefix + "hidden", "shape [..., H]", f"shape {tuple(hidden.shape)}")
        weight = check_tensor(prefix + "weight", self.weight, dtypes=FLOATS, ndim=2)
        at_home = weight.device.type == "cpu" if offloaded else False
        device = weight.device if at_home else hidden.device
        check_tensor(prefix + "weight", weight, device=device)
        if weight.shape[1] != hidden.shape[-1]:
            expected = f"shape [V, {hidden.shape[-1]}] to match hidden's last dimension"
            fail_value(prefix + "weight", expected, f"shape {tuple(weight.shape)}")
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            fail_value(
                prefix + "weight", "at least one entry and feature", f"shape {tuple(weight.shape)}"
            )
        if gemm is None and weight.dtype != hidden.dtype:
            fail_type(prefix + "weight", f"hidden's dtype {hidden.dtype}", weight.dtype)
        if self.bias is not None:
            bias = check_tensor(
                prefix + "bias",
                self.bias,
                dtypes=FLOATS,
                shape=(weight.shape[0],),
                device=device,
            )
            if gemm is None and bias.dtype != hidden.dtype:
                fail_type(prefix + "bias", f"hidden's dtype {hidden.dtype}", bias.dtype)
        if self.vocab_size is not None:
            size = check_integer(prefix + "vocab_size", self.vocab_size, at_least=1)
            if size > weight.shape[0]:
                fail_value(prefix + "vocab_size", f"at most V = {weight.shape[0]}", size)
        return HeadOptions.checked(self.softcap, self.logit_scale, self.temperature, prefix)
