"""The peaked logits that the gradient filter is measured with, and what is counted in them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from pad_kernels.bench import peaked

CPU = torch.device("cpu")
SHAPE = (256, 48, 2000)


@pytest.mark.parametrize("context", [0.5, 2.0])
def test_rows_share_a_vocabulary_and_have_two_nats(context: float) -> None:
    x, again = (peaked.make_peaked(SHAPE, context, torch.float32, CPU) for _ in range(2))
    assert torch.equal(x.hidden, again.hidden) and torch.equal(x.labels, again.labels)
    logprob = (x.hidden.double() @ x.weight.double().t()).log_softmax(1)
    spread = -(logprob.exp() * logprob).sum(1).mean()
    assert abs(float(spread) - peaked.ENTROPY) < 0.3
    # Labels are as likely as the rows themselves say.
    assert abs(float(-logprob.gather(1, x.labels[:, None]).mean()) - float(spread)) < 0.4
    own = logprob - logprob.mean(0)
    own -= own.mean(1, keepdim=True)
    assert abs(float(own.std()) / context - 1) < 0.1
    law = logprob.mean(0).sort(descending=True).values
    slope = -float((law[9] - law[999]) / torch.tensor(10 / 1000).log())
    assert abs(slope / peaked.exponent(SHAPE[2], context) - 1) < 0.1


def test_live_tiles_are_those_that_reach_the_level() -> None:
    x = peaked.make_peaked((300, *SHAPE[1:]), 1.0, torch.float32, CPU)
    dz = (x.hidden @ x.weight.t()).softmax(1)
    dz[torch.arange(300), x.labels] -= 1
    order = dz.new_tensor((x.weight @ x.hidden.mean(0)).tolist()).argsort(descending=True)
    for ordered, entries in ((False, dz), (True, dz[:, order])):
        live = [
            bool((entries[a : a + 64, b : b + 128].abs() >= 1e-3).any())
            for a in range(0, 256, 64)
            for b in range(0, 2000, 128)
        ]
        live += [
            bool((entries[256:, b : b + 128].abs() >= 1e-3).any()) for b in range(0, 2000, 128)
        ]
        found = peaked.live_shares(x, 1e-3, [(64, 128), (256, 2000)], ordered=ordered)
        assert found == [pytest.approx(sum(live) / len(live)), 1.0]


def test_the_error_is_within_what_the_filter_allows() -> None:
    found = peaked.benchmark((256, 16, 3000), 0.5, CPU)
    assert found["live"] < found["live_unordered"]
    assert all(0 < error < 1 for error in found["error"].values())
    assert {*found["unfiltered_ms"]} == {"auto", "early"}


def test_shares_below_which_the_filter_pays() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "filter.py"))
    early = script["break_even"]()[2]
    assert early == "| one number: early for early | 100 %, 65 % | 70 %, 46 % | 50 %, 33 % |"
