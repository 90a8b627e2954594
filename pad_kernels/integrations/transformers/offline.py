"""Teachers that ran before: their outputs over a data set, on disk and as a teacher in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import check_choice, fail_type, fail_value
from pad_kernels.cache import CacheInfo, TeacherCache, tokenizer_hash, write_teacher_cache
from pad_kernels.cache.store import write_atomically
from pad_kernels.integrations.transformers.collate import Example, lay_out
from pad_kernels.integrations.transformers.config import (
    ADPAConfig,
    DCKDConfig,
    DistillationConfig,
    PADConfig,
)
from pad_kernels.integrations.transformers.data import Format, context, encode, fingerprint
from pad_kernels.integrations.transformers.head import ModelHead
from pad_kernels.integrations.transformers.pad import pad_format
from pad_kernels.integrations.transformers.teachers import ModelTeacher
from pad_kernels.integrations.transformers.token_distillation import adpa_format, dckd_format

HEAD = "head.safetensors"


class CachedTeacher:
    """A teacher's outputs on disk, written by :func:`cache_teacher` or the command ``cache``.

    Args:
        caches: directories, one for each data set that is trained or evaluated on. A cache knows
            the tokens of its data set, and serves no other.
        tail: of top-k caches, see :class:`pad_kernels.TopKTeacher`.
        head_on_cpu: of caches of hidden states: leave the head's weight on the CPU, from where its
            pieces are sent while they are needed.

    Raises:
        ValueError: a cache that is damaged or unfinished, or caches of different teachers.
    """

    def __init__(self, *caches: Any, tail: str = "bucket", head_on_cpu: bool = False) -> None:
        if not caches:
            fail_value("caches", "at least one directory", "none")
        self._tail = check_choice("tail", tail, ("bucket", "renormalize"))
        self._head_on_cpu = head_on_cpu
        opened = [TeacherCache(path, None, verify=False) for path in caches]
        self._info = opened[0].info
        for path, cache in zip(caches, opened, strict=True):
            for name in ("model", "reference", "kind", "k", "tokenizer_hash", "vocab_size"):
                found, wanted = getattr(cache.info, name), getattr(self._info, name)
                if found != wanted:
                    fail_value(f"{path}: {name}", f"{wanted!r} as in {caches[0]}", repr(found))
        self._caches = {cache.info.dataset: cache for cache in opened}
        self._weights = load_file(Path(caches[0]) / HEAD) if self.kind == "head" else {}
        self._device = torch.device("cpu")

    @property
    def kind(self) -> str:
        """What it returns, see :class:`Teacher`."""
        return "head" if self._info.kind == "hidden" else self._info.kind

    @property
    def vocab_size(self) -> int:
        """Entries of the teacher's vocabulary."""
        return self._info.vocab_size

    def attach(self, name: str, tokenizer: Any, device: torch.device) -> None:
        """Refuse another tokenizer, and move the head to the device."""
        if self._info.tokenizer_hash != tokenizer_hash(tokenizer):
            expected = "a cache made with the student's tokenizer (every token with the same id)"
            fail_value(name, expected, f"one of {self._info.model} with another tokenizer")
        self._device = device
        if not self._head_on_cpu:
            self._weights = {each: value.to(device) for each, value in self._weights.items()}

    def check_data(self, where: str, key: str) -> None:
        """Refuse a data set whose tokens none of the caches was made of."""
        if key not in self._caches:
            expected = "the data set (and options) that the teacher's cache was made of"
            fail_value(where, expected, "one with other tokens")

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """What was kept about the batch's N tokens."""
        cache, rows = self._caches[batch["data_key"]], batch["cache_rows"]
        if self._info.kind == "teacher":
            return cache.teacher(rows, tail=self._tail, device=self._device)
        if self._info.kind == "advantage":
            return cache.advantage(rows, device=self._device)
        hidden = cache.hidden(rows, device=self._device)
        return pk.Head(
            hidden.to(self._weights["weight"].dtype),
            self._weights["weight"],
            self._weights.get("bias"),
            softcap=self._info.softcap,
            logit_scale=self._info.logit_scale,
            vocab_size=self._info.vocab_size,
        )


def cache_teacher(
    path: Any,
    dataset: Any,
    args: DistillationConfig,
    teacher: ModelTeacher,
    reference: ModelTeacher | None = None,
    *,
    name: str,
    reference_name: str = "",
    keep: int | str = 64,
    batch_size: int = 8,
    dtype: str = "float32",
    device: Any = None,
    progress: bool = True,
) -> CachedTeacher:
    """Run a teacher over a data set and keep its outputs; call again to go on after a kill.

    Args:
        path: the cache's directory.
        dataset: what will be trained on.
        args: the method that will be trained, and its ``max_length`` and ``overlong``: a
            :class:`DCKDConfig`, an :class:`ADPAConfig` or (hidden states only) a
            :class:`PADConfig`. ``max_length`` should be given; the teacher's context may be longer
            than the student's.
        teacher: the teacher; for ADPA the aligned one.
        reference: ADPA's other teacher.
        name: of the teacher with its revision, for the record.
        reference_name: of the reference.
        keep: how many of the likeliest tokens to keep of each distribution, or "hidden": the last
            hidden states, from which the teacher's head, saved with them, makes all of it.
        batch_size: responses at a time.
        dtype: what to store: float32, float16 or, of hidden states, bfloat16.
        device: where to run; default a GPU if there is one.
        progress: show a bar.

    Returns:
        The cache as a teacher.
    """
    format = _format(args, keep)
    if (reference is not None) != isinstance(args, ADPAConfig):
        fail_value("reference", "a second teacher for ADPA, and None for others", reference)
    tokenizer = teacher.processing_class
    limit = args.max_length or context(teacher.model)
    rows = encode(dataset, format, tokenizer, limit=limit, overlong=args.overlong, where="dataset")
    first = format.taught_from
    examples = [
        Example(row["prompt_ids"], ids, 0, 0) for row in rows for ids in row["response_ids"][first:]
    ]
    home = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = [each for each in (teacher, reference) if each is not None]
    for each in models:
        each.attach("reference" if each is reference else "teacher", tokenizer, home)
    info = _info(models, keep, name, reference_name, dtype, fingerprint(rows))

    def run(part: list[Example]) -> tuple[Any, ...]:
        batch = lay_out(part, 0)
        batch = {k: v.to(home) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return (*(each(batch) for each in models), [len(each.response) for each in part])

    write_teacher_cache(path, examples, run, info, batch_size=batch_size, progress=progress)
    if info.kind == "hidden":
        _save_head(Path(path) / HEAD, teacher.head())
    return CachedTeacher(path)


def _save_head(path: Path, head: ModelHead) -> None:
    tensors = {"weight": head.weight, "bias": head.bias}
    data = {k: v.detach().cpu().contiguous() for k, v in tensors.items() if v is not None}
    write_atomically(path, save(data))


def _format(args: DistillationConfig, keep: int | str) -> Format:
    if isinstance(args, DCKDConfig):
        return dckd_format(args)
    if isinstance(args, ADPAConfig):
        if keep == "hidden":
            fail_value("keep", "a number of log-ratios to keep for ADPA", keep)
        return adpa_format()
    if isinstance(args, PADConfig) and keep == "hidden":
        return pad_format(scored=False)
    expected = "a DCKDConfig, an ADPAConfig, or with keep='hidden' a PADConfig"
    fail_type("args", expected, args)


def _info(
    models: list[ModelTeacher],
    keep: int | str,
    name: str,
    reference_name: str,
    dtype: str,
    dataset: str,
) -> CacheInfo:
    head = models[0].head()
    kind = "advantage" if len(models) == 2 else "hidden" if keep == "hidden" else "teacher"
    second = models[1].head() if len(models) == 2 else None
    return CacheInfo(
        name,
        tokenizer_hash(models[0].processing_class),
        models[0].vocab_size,
        head.weight.shape[1] if kind == "hidden" else int(keep),
        kind=kind,
        reference=reference_name,
        dataset=dataset,
        dtype=dtype,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        reference_softcap=None if second is None else second.softcap,
        reference_logit_scale=1.0 if second is None else second.logit_scale,
    )
