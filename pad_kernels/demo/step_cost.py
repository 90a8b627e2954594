"""Time and peak memory of one PAD training step, with dense logits and with `pad_kernels`.

Each measurement is a process of its own: `python -m pad_kernels.demo.step_cost '{"head": "dense"}'`
prints one line of JSON. Memory is the peak of resident memory during the steps, beyond what the
process held before the first of them (model, batch, libraries).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import pad_kernels as pk
from pad_kernels.demo.models import IGNORE, build, hidden
from pad_kernels.demo.outcome import Cost
from pad_kernels.demo.pretrain import Optimizers, adamw
from pad_kernels.demo.sampling import Responses
from pad_kernels.demo.settings import Settings
from pad_kernels.integrations.transformers import head_of

HEADS = ("dense", "ours")


def peak_resident_bytes() -> int:
    """High-water mark of this process's resident memory."""
    try:
        # ru_maxrss would start at the parent's mark here: Linux carries it across fork and exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pad_loss(
    model: PreTrainedModel, responses: Responses, rewards: Tensor, settings: Settings
) -> Tensor:
    """PAD in one call, from hidden states: what `PADTrainer` computes."""
    head = head_of(model)
    return pk.linear_preference_loss(
        hidden(model, responses.inputs),
        head.weight,
        responses.labels,
        rewards,
        beta=settings.pad.beta,
        kind="jsd",
        **head.options(),
    )


def dense_pad_loss(
    model: PreTrainedModel, responses: Responses, rewards: Tensor, settings: Settings
) -> Tensor:
    """The same loss as usually written: logits of the response tokens, then all n! rankings.

    Rows that no loss needs are left out here too, so the two steps multiply the same matrices.
    """
    keep = responses.labels != IGNORE
    logits = F.linear(hidden(model, responses.inputs)[keep], head_of(model).weight)
    logits = settings.softcap * torch.tanh(logits / settings.softcap)
    picked = -F.cross_entropy(logits, responses.labels[keep], reduction="none")
    logprob = torch.zeros(keep.shape).masked_scatter(keep, picked)
    student = logprob.sum(-1) / keep.sum(-1)

    rankings = torch.tensor(list(itertools.permutations(range(rewards.shape[1]))))

    def ranking_logprob(values: Tensor) -> Tensor:
        ranked = settings.pad.beta * values[:, rankings]  # [groups, n!, n]
        rest = ranked.flip(-1).logcumsumexp(-1).flip(-1)
        return (ranked - rest).sum(-1)

    p, q = ranking_logprob(student), ranking_logprob(rewards)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1).mean()


def _random_batch(settings: Settings, vocab_size: int) -> tuple[Responses, Tensor]:
    """A batch with the shapes of the demo's PAD step; every response is as long as allowed."""
    groups = settings.step_responses // settings.responses
    length = settings.prompt_tokens + settings.response_tokens
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (groups, settings.responses, length)
    ids = torch.randint(3, vocab_size, shape, generator=generator)
    labels = ids[..., 1:].clone()
    labels[..., : settings.prompt_tokens - 1] = IGNORE
    rewards = torch.randn(shape[:2], generator=generator) * 0.3 - 6.0
    return Responses(ids[..., :-1], labels), rewards


def measure_here(head: str, vocab_size: int, settings: Settings) -> Cost:
    """Take the steps in this process; the first is not timed."""
    model = build(settings.student, settings, vocab_size)
    responses, rewards = _random_batch(settings, vocab_size)
    optimizers = Optimizers(model, [adamw(model.parameters(), 1e-4)], settings.cost_steps + 1)
    loss = pad_loss if head == "ours" else dense_pad_loss
    seconds = []
    before = peak_resident_bytes()
    for _ in range(settings.cost_steps + 1):
        start = time.perf_counter()
        optimizers.step(loss(model, responses, rewards, settings))
        seconds.append(time.perf_counter() - start)
    peak = peak_resident_bytes() - before
    rows = int((responses.labels != IGNORE).sum())
    return Cost(head, vocab_size, rows, statistics.median(seconds[1:]), peak)


def measure(head: str, vocab_size: int, settings: Settings) -> Cost:
    """Measure in a fresh process."""
    fields = ("seed", "softcap", "prompt_tokens", "response_tokens", "responses", "step_responses")
    request = {name: getattr(settings, name) for name in (*fields, "cost_steps")}
    request |= {"student": dataclasses.asdict(settings.student), "head": head, "vocab": vocab_size}
    command = [sys.executable, "-m", "pad_kernels.demo.step_cost", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the {head} step failed:\n{done.stderr}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main(text: str) -> None:
    """Entry of the fresh process: a JSON request in, a line of JSON out."""
    from pad_kernels.demo.settings import ModelSize

    request = json.loads(text)
    head, vocab_size = request.pop("head"), request.pop("vocab")
    student = ModelSize(**request.pop("student"))
    cost = measure_here(head, vocab_size, Settings(student=student, **request))
    print(json.dumps(dataclasses.asdict(cost)))


if __name__ == "__main__":
    main(sys.argv[1])
