"""``sample``: n responses of a model to each prompt, each from a random stream of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pad_kernels.integrations.transformers.data import Encoder, Format
from pad_kernels.pipeline import models, parts, rows
from pad_kernels.pipeline.settings import Sample, Settings, as_dict, needed

ADDED = ("responses", "texts", "finished", "sample_seed")


class Noise(LogitsProcessor):
    """Gumbel noise of each prompt's own generator: the likeliest token is then a sample.

    argmax(log p + G) is distributed as p, for G = -log E with E ~ Exp(1). A prompt's samples so
    depend on its seed, not on what else is in the batch.
    """

    def __init__(self, seeds: list[int], n: int, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for part, generator in zip(noise.split(self.n), self.generators, strict=True):
            part.exponential_(generator=generator)
        return scores - noise.log()


def seed_of(seed: int, index: int) -> int:
    """The seed of a prompt, from the run's and its row."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Sampler:
    """A model that answers prompts.

    Args:
        model: a causal language model.
        end: ids that end a response.
        pad: id for padding.
        options: of sampling.
    """

    def __init__(self, model: Any, end: list[int], pad: int, options: Sample) -> None:
        self.model, self.end, self.pad, self.options = model, end, pad, options
        # Defaults in a model's folder, a repetition penalty for one, would change the samples.
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)

    def __call__(self, prompts: list[list[int]], seeds: list[int]) -> list[list[list[int]]]:
        """The n responses to each prompt, as ids; those that ended have the id that ended them."""
        options, device = self.options, self.model.device
        width = max(map(len, prompts))
        ids = [[self.pad] * (width - len(each)) + each for each in prompts]
        mask = [[0] * (width - len(each)) + [1] * len(each) for each in prompts]
        several = {
            "input_ids": torch.tensor(ids, device=device).repeat_interleave(options.n, 0),
            "attention_mask": torch.tensor(mask, device=device).repeat_interleave(options.n, 0),
        }
        chain = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
        if options.top_k is not None:
            chain.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            chain.append(TopPLogitsWarper(float(options.top_p)))
        chain.append(Noise(seeds, options.n, device))
        with torch.inference_mode():
            found = self.model.generate(
                **several,
                do_sample=False,
                max_new_tokens=options.max_new_tokens,
                logits_processor=chain,
            )
        flat = [self._cut(each) for each in found[:, width:].tolist()]
        return [flat[i : i + options.n] for i in range(0, len(flat), options.n)]

    def _cut(self, ids: list[int]) -> list[int]:
        stop = next((i for i, each in enumerate(ids) if each in self.end), len(ids) - 1)
        return ids[: stop + 1]


def run(settings: Settings) -> Path:
    """The command; returns the folder."""
    options = needed("sample", settings.sample)
    folder = settings.folder("samples")
    write(settings, options, getattr(settings, options.model), folder)
    return folder


def write(settings: Settings, options: Sample, path: str | None, folder: Path) -> None:
    """Write a model's responses.

    Args:
        settings: of the run.
        options: of sampling.
        path: the model's folder.
        folder: where to write.

    Raises:
        ValueError: a mistake in what is given.
    """
    where = options.model
    data = _prompts(options)
    tokenizer = models.tokenizer(where, path)
    room = models.context(models.config(where, path))
    data, prompts, places = _encoded(data, tokenizer, room, options)
    if where == "teacher":
        models.check_tokenizers(settings, "teacher")
    identity = {
        "stage": "sample",
        "settings": as_dict(options),
        "seed": settings.seed,
        "dtype": settings.dtype,
        "device": str(models.device(settings)),
        "inputs": {"model": rows.fingerprint(path), "prompts": rows.fingerprint(options.prompts)},
    }
    sampler: list[Sampler] = []  # loaded when the first batch is due

    def make(start: int, stop: int, advance: Callable[[int], Any]) -> dict[str, pa.Array]:
        if not sampler:
            sampler.append(_sampler(settings, options, path, tokenizer))
        seeds = [seed_of(settings.seed, places[i]) for i in range(start, stop)]
        found: list[list[list[int]]] = []
        for i in range(start, stop, options.batch_size):
            j = min(i + options.batch_size, stop)
            found += sampler[0](prompts[i:j], seeds[i - start : j - start])
            advance(j - i)
        texts = [tokenizer.batch_decode(each, skip_special_tokens=True) for each in found]
        ended = [[ids[-1] in sampler[0].end for ids in each] for each in found]
        return {
            "responses": pa.array(found, pa.list_(pa.list_(pa.int32()))),
            "texts": pa.array(texts, pa.list_(pa.string())),
            "finished": pa.array(ended, pa.list_(pa.bool_())),
            "sample_seed": pa.array(seeds, pa.int64()),
        }

    parts.write(folder, identity, data, options.shard_rows, make)


def _prompts(options: Sample) -> datasets.Dataset:
    data = rows.read("sample.prompts", options.prompts)
    rows.need("sample.prompts", data, "prompt")
    data = data.remove_columns([name for name in ADDED if name in data.column_names])
    if not options.chat:
        return data
    prompts = data["prompt"]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(
                f"sample.prompts, column 'prompt', row {index}: expected a text that is not empty "
                f"with chat: true, got {prompt!r}"
            )
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return data.remove_columns("prompt").add_column("prompt", talks)


def _encoded(
    data: datasets.Dataset, tokenizer: Any, room: int | None, options: Sample
) -> tuple[datasets.Dataset, list[list[int]], list[int]]:
    """The rows whose prompts fit, their ids, and which rows they are."""
    encoder = Encoder(Format(), tokenizer, room, options.overlong, "sample.prompts")
    prompts = [encoder.prompt(each, i) for i, each in enumerate(data["prompt"])]
    if room is None:
        return data, prompts, list(range(len(prompts)))
    most = room - options.max_new_tokens
    if most < 1:
        raise ValueError(
            f"sample.max_new_tokens: expected less than the model's context of {room} tokens, got "
            f"{options.max_new_tokens}"
        )
    kept = [i for i, each in enumerate(prompts) if len(each) <= most]
    if len(kept) < len(prompts) and options.overlong == "error":
        index = next(i for i, each in enumerate(prompts) if len(each) > most)
        raise ValueError(
            f"sample.prompts, row {index}: expected at most {most} tokens, to leave room for "
            f"max_new_tokens in the model's context (overlong: drop leaves such rows out), got "
            f"{len(prompts[index])}"
        )
    if not kept:
        raise ValueError(f"sample.prompts: expected a prompt of at most {most} tokens, got none")
    return data.select(kept), [prompts[i] for i in kept], kept


def _sampler(settings: Settings, options: Sample, path: str | None, tokenizer: Any) -> Sampler:
    model = models.load(options.model, path, settings)
    end = model.generation_config.eos_token_id
    ids = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ValueError(f"{options.model}: expected a tokenizer with an eos_token, got none")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ids)
    return Sampler(model, sorted(ids), pad, options)


def again(settings: Settings, student: Path, folder: Path, prompts: str) -> None:
    """Sample once more from another student, to another folder."""
    if settings.sample is None:
        raise ValueError("sample: expected this section: adpa+ samples from its DCKD student")
    options = replace(settings.sample, prompts=prompts, model="student")
    write(settings, options, str(student), folder)
