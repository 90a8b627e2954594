"""Does the head that was read give the model's own logits? Asked again and again."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from pad_kernels._checks import check_integer
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.heads import HeadOptions
from pad_kernels.integrations.transformers.head import ModelHead

#: Raw logits that are sent through what a model does behind its head. A freshly made model's own
#: logits are so small that a soft cap would not show. All are exact in half precision.
PROBES = (0.0, 0.5, -2.0, 8.0, -32.0, 128.0)
#: Differences that rounding explains, in units of the coarsest dtype's epsilon times the row's
#: largest entry. A cap is three roundings.
ROUNDINGS = 4.0


class HeadMismatch(RuntimeError):
    """The head that was read from a model does not give the model's own logits."""


class HeadCheck:
    """Compare a few rows with the model's own logits, at the first call and every so often.

    Rows of the batch go through the model's own head, and with them a few constant rows through
    whatever the model does to its logits afterwards. Both must come out as the ModelHead says.

    Args:
        every: calls from one comparison to the next, at least 1.
        rows: rows of the batch that are compared, at least 1.

    Example:
        >>> check = HeadCheck(every=100)
        >>> check.due
        True
    """

    def __init__(self, every: int = 100, rows: int = 4) -> None:
        self.every = check_integer("every", every, at_least=1)
        self.rows = check_integer("rows", rows, at_least=1)
        self._wait = 0

    @property
    def due(self) -> bool:
        """Whether the next call is compared; it stays so until a comparison has passed."""
        return self._wait == 0

    def called(self) -> None:
        """Count a call that went well."""
        self._wait = (self._wait or self.every) - 1

    def sample(self, tokens: int, mask: Tensor | None) -> Tensor:
        """Rows [at most ``rows``] int64 to compare, spread over the tokens that are not padding.

        Args:
            tokens: rows in the batch.
            mask: the attention mask, any shape; used if it has one entry for each token.
        """
        if mask is not None and mask.numel() == tokens and bool(mask.any()):
            real = mask.reshape(-1).nonzero().squeeze(1)
        else:
            real = torch.arange(tokens)
        places = torch.linspace(0, len(real) - 1, min(self.rows, len(real)), dtype=torch.float64)
        return real[places.round().long().to(real.device)]


def probe_rows(width: int, like: Tensor) -> Tensor:
    """Constant rows [len(PROBES), width], with the dtype and device of ``like``."""
    return like.new_tensor(PROBES)[:, None].expand(-1, width)


@torch.compiler.disable
def compare(model: str, head: ModelHead, raw: Tensor, theirs: Tensor) -> None:
    """Raise HeadMismatch unless ``theirs`` are the logits that ``head`` makes of raw products.

    Args:
        model: its class, for the message.
        head: what was read.
        raw: products of the sampled rows with the head's weight, bias added, [R, V].
        theirs: the model's own logits of those rows and of the probe rows, [R + len(PROBES), V].
    """
    size = head.vocab_size or raw.shape[-1]
    if theirs.shape[-1] not in (size, raw.shape[-1]):
        _fail(model, f"its logits have {theirs.shape[-1]} entries, its head {raw.shape[-1]}")
    options = HeadOptions(head.softcap, head.logit_scale)
    wide = accumulate_dtype(raw.dtype)
    theirs, rows = theirs[..., :size].detach(), len(raw)
    probes = probe_rows(size, raw.to(wide))
    off = _excess(options.transform(probes), theirs[rows:], theirs.dtype)
    if bool((off > 0).any()):
        _fail(model, _behind_the_head(options, theirs[rows:, :].to(wide)))
    ours = options.transform(raw[:, :size].to(wide))
    coarse = max((raw.dtype, theirs.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    off = _excess(ours, theirs[:rows], coarse)
    if bool((off > 0).any()):
        worst = (ours - theirs[:rows]).abs().max().item()
        _fail(
            model,
            f"logits of the same hidden states differ by up to {worst:.3g} (they are up to "
            f"{ours.abs().max().item():.3g}): the head adds something to its weight's product, "
            "as a hook or an adapter does",
        )


def _excess(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much entries differ beyond rounding; 0 where both are NaN or the same infinity."""
    ours, theirs = torch.broadcast_tensors(ours, theirs.to(ours.dtype))
    bound = ROUNDINGS * torch.finfo(dtype).eps * ours.abs().amax(-1, keepdim=True)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    excess = ((ours - theirs).abs() - bound).nan_to_num(nan=torch.inf)
    return torch.where(same, 0.0, excess)


def _behind_the_head(options: HeadOptions, theirs: Tensor) -> str:
    """What a model seems to do to its raw logits, from what it made of the probe rows."""
    raw = theirs.new_tensor(PROBES)[:, None]
    ours = options.transform(raw)
    worst, place = (ours - theirs).abs().amax(1).max(0)
    found = (
        f"a raw logit of {PROBES[int(place)]:g} becomes {theirs[place].flatten()[0].item():.4g} "
        f"where {ours[place].item():.4g} was expected (off by up to {worst.item():.3g})"
    )
    factors = theirs[1:] / raw[1:]
    if bool(theirs[0].any()):
        guess = "something is added to the logits behind the head"
    elif bool(((factors - factors[0, 0]).abs() < 1e-2 * factors[0, 0].abs()).all()):
        guess = f"the model multiplies its raw logits by {factors[0, 0].item():.6g} and no more"
    else:
        guess = "the model has a soft cap or another function of its logits"
    read = f"read were logit_scale {options.logit_scale:.6g}, softcap {options.softcap}"
    return f"{found}: {guess}; {read}"


def _fail(model: str, found: str) -> NoReturn:
    raise HeadMismatch(
        f"{model}: {found}. Training on a head that is not the model's own would be silently "
        "wrong; this model needs its own logits"
    )
