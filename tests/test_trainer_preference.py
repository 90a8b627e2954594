"""Every loss of the preference trainer takes what it should: sums or means, and its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
import trainer_dense as dense
from trainer_toys import llama, logprobs, pairs, tokenizer

import pad_kernels as pk
import pad_kernels.integrations.transformers as pt
from pad_kernels.integrations.transformers.metrics import Meter, kendall_tau, pair
from pad_kernels.sequence.pairwise import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = pairs(5)


def trainer(folder: Path, rows: list[Any], reference: Any = None, **options: Any) -> Any:
    args = pt.PreferenceConfig(
        output_dir=str(folder), per_device_eval_batch_size=8, report_to=[], use_cpu=True, **options
    )
    given = {} if reference is None else {"reference": pt.ModelTeacher(reference, tokenizer())}
    return pt.PreferenceTrainer(
        llama(), args, processing_class=tokenizer(), eval_dataset=rows, **given
    )


@torch.no_grad()
def scores(model: Any, mean: bool) -> list[torch.Tensor]:
    """Log-probs of chosen and rejected responses, summed or averaged over their tokens."""
    found = []
    for column in ("chosen", "rejected"):
        each = [logprobs(model, row["prompt"], row[column]) for row in ROWS]
        found.append(torch.stack([x.mean() if mean else x.sum() for x in each]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_pairwise_kinds(kind: str, tmp_path: Path) -> None:
    """ipo, simpo and sigmoid_norm take means over tokens, the others sums."""
    mean = kind in ("ipo", "simpo", "sigmoid_norm")
    reference = None if kind == "simpo" else llama(3)
    columns = scores(llama(), mean) + ([] if reference is None else scores(reference, mean))
    beta = 2.0 if kind == "simpo" else 0.1
    want = pk.pairwise_preference_loss(*columns, kind=kind, beta=beta)
    found = trainer(tmp_path, ROWS, reference, loss=kind).evaluate()
    assert found["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    assert found["eval_rewards/chosen"] == pytest.approx(
        want.chosen_rewards.mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_reference_from_columns(kind: str, tmp_path: Path) -> None:
    """Their sums, also where the loss takes means."""
    sums = scores(llama(3), mean=False)
    rows = [
        {**row, "ref_chosen_logps": up.item(), "ref_rejected_logps": down.item()}
        for row, up, down in zip(ROWS, *sums, strict=True)
    ]
    online = trainer(tmp_path, ROWS, llama(3), loss=kind).evaluate()
    offline = trainer(tmp_path, rows, loss=kind).evaluate()
    assert offline["eval_loss"] == pytest.approx(online["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(("kind", "reference"), [("dpo", llama), ("simpo", None)])
def test_columns_that_nothing_reads(kind: str, reference: Any, tmp_path: Path) -> None:
    rows = [{**row, "ref_chosen_logps": 0.0} for row in ROWS]
    model = None if reference is None else reference()
    with pytest.raises(ValueError, match="no column 'ref_chosen_logps' beside"):
        trainer(tmp_path, rows, model, loss=kind)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_kinds(kind: str, tmp_path: Path) -> None:
    up, down = scores(llama(), mean=kind in ("ipo", "simpo"))
    with torch.no_grad():
        nll = dense.supervised(llama(), ROWS)
    want = pk.cpo_loss(up, down, nll, kind=kind, nll_weight=0.5).loss
    found = trainer(tmp_path, ROWS, loss="cpo", cpo_kind=kind, nll_weight=0.5).evaluate()
    assert found["eval_loss"] == pytest.approx(want.item(), rel=1e-5)
    assert found["eval_nll"] == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_unpaired_kinds(kind: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(ROWS)
    ]
    weights = {"desirable_weight": 0.7, "undesirable_weight": 1.3}
    found = trainer(tmp_path, rows, llama(3), loss=kind, **weights).evaluate()
    ours, theirs = (scores(model, mean=False)[0] for model in (llama(), llama(3)))
    point: dict[str, Any] = {}
    if kind == "kto":
        point = {"kl": found["eval_kl"]}
        mixed = [{**row, "completion": rows[i - 1]["completion"]} for i, row in enumerate(rows)]
        with torch.no_grad():
            ratio = [
                logprobs(llama(), row["prompt"], row["completion"]).sum()
                - logprobs(llama(3), row["prompt"], row["completion"]).sum()
                for row in mixed
            ]
        wanted = max(0.0, sum(ratio).item() / len(rows))
        assert found["eval_kl"] == pytest.approx(wanted, abs=1e-5)
    good = torch.tensor([row["label"] for row in rows])
    want = pk.kto_loss(ours, theirs, good, kind=kind, **weights, **point)
    assert found["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    assert found["eval_rewards/chosen"] == pytest.approx(want.rewards[good].mean().item(), abs=1e-5)
    assert found["eval_rewards/rejected"] == pytest.approx(
        want.rewards[~good].mean().item(), abs=1e-5
    )


# What is logged.


def test_kendall_tau() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 9.0], [1.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 4.0]])
    b = torch.tensor([[1.0, 2.0, 3.0, -9.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    valid = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4])
    # Of the second: one tie, two pairs in order, three against; of the third four and two.
    assert kendall_tau(a, b, valid).tolist() == pytest.approx([1.0, -1 / 6, 2 / 6])


def test_the_meter_divides_sums_and_forgets() -> None:
    meter = Meter()
    meter.add({"a": pair(torch.tensor([1.0, 2.0])), "b": pair(torch.tensor([5.0]))})
    never = torch.zeros(3, dtype=torch.bool)
    meter.add({"a": pair(torch.tensor([6.0])), "c": pair(torch.ones(3), never)})

    def two_ranks(local: torch.Tensor) -> torch.Tensor:
        return torch.cat([local, torch.ones_like(local)])

    assert meter.read(two_ranks) == {"a": 10 / 4, "b": 6 / 2, "c": 1.0}
    assert meter.read(two_ranks) == {}
    meter.add({"c": pair(torch.ones(3), never)})
    assert meter.read(lambda local: local) == {}  # nothing was counted
