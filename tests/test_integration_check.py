"""A head that is not the model's own is refused, at the first call and every so often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import tiny_models as tiny

from pad_kernels.integrations.transformers import (
    HeadCheck,
    HeadMismatch,
    head_of,
    hidden_states,
    run_with_head,
)
from pad_kernels.integrations.transformers.check import PROBES

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "qwen3", "gemma2", "phi", "cohere", "granite", "gpt2")


def one_entry_more(logits: Tensor) -> Tensor:
    return logits + torch.arange(logits.shape[-1]).eq(7) * 1e-4


#: What a model may do to its logits without anybody having been told.
UNSEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cap": (lambda z: 20.0 * torch.tanh(z / 20.0), "soft cap or another function"),
    "scale": (lambda z: z * 1.001, "(multiplies its raw logits by|soft cap)"),
    "bias": (one_entry_more, "something is added to the logits"),
    "masked": (lambda z: z.index_fill(-1, torch.tensor([5]), -1e9), "something is added"),
    "normalised": (lambda z: z.log_softmax(-1), "something is added"),
    "cut": (lambda z: z[..., :-3], "its logits have 147 entries, its head 150"),
}


def behind(monkeypatch: pytest.MonkeyPatch, model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Let the model's class do something to its logits."""
    forward = type(model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", changed)


@pytest.mark.parametrize("unseen", UNSEEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_behind_its_head(family: str, unseen: str, monkeypatch: Any) -> None:
    """Also where logits are so small, as in a new model, that it makes next to no difference."""
    model, (change, message) = tiny.build(family, loud=0.01), UNSEEN[unseen]
    hidden_states(model, **tiny.batch())
    behind(monkeypatch, model, change)
    with pytest.raises(HeadMismatch, match=f"{type(model).__name__}: .*{message}"):
        hidden_states(model, check=HeadCheck(), **tiny.batch())


@pytest.mark.parametrize("unseen", UNSEEN)
def test_half_precision_hides_nothing(unseen: str, monkeypatch: Any) -> None:
    model, (change, message) = tiny.build("gemma2").bfloat16(), UNSEEN[unseen]
    hidden_states(model, check=HeadCheck(), **tiny.batch())
    behind(monkeypatch, model, change)
    with pytest.raises(HeadMismatch, match=message):
        hidden_states(model, check=HeadCheck(), **tiny.batch())


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("gemma3", "final_logit_softcapping", None),
        ("granite", "logits_scaling", None),
        ("cohere", "logit_scale", None),
        ("recurrent-gemma", "logits_soft_cap", None),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "logits_scaling", 2.0),
        ("qwen2", "logit_scale", 0.5),
    ],
)
def test_a_reader_that_overlooks_or_invents(
    family: str, name: str, value: float | None, monkeypatch: Any
) -> None:
    """The model keeps what it does; what is read of it is another number, or nothing."""
    from pad_kernels.integrations.transformers import head

    model = tiny.build(family)
    read = head._setting
    monkeypatch.setattr(
        head, "_setting", lambda lm, config, n: value if n == name else read(lm, config, n)
    )
    with pytest.raises(HeadMismatch, match="read were logit_scale"):
        hidden_states(model, **tiny.batch())


def test_the_message_says_what_the_model_does(monkeypatch: Any) -> None:
    model = tiny.build("llama")
    behind(monkeypatch, model, lambda z: z * 0.5)
    with pytest.raises(HeadMismatch) as error:
        hidden_states(model, **tiny.batch())
    assert "LlamaForCausalLM: a raw logit of 128 becomes 64 where 128 was expected" in str(
        error.value
    )
    assert "the model multiplies its raw logits by 0.5 and no more" in str(error.value)


def test_hooks_on_the_head_are_seen() -> None:
    model = tiny.build("llama")
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(HeadMismatch, match="as a hook or an adapter does"):
        hidden_states(model, **tiny.batch())
    handle.remove()
    # A hook on what goes in is part of the hidden states.
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 3.0,))
    hidden, head = hidden_states(model, **tiny.batch()), head_of(model)
    torch.testing.assert_close(hidden @ head.weight.T, model(**tiny.batch()).logits)


def test_every_so_often(monkeypatch: Any) -> None:
    model, check = tiny.build("llama"), HeadCheck(every=3)
    hidden_states(model, check=check, **tiny.batch())
    behind(monkeypatch, model, lambda z: z * 2.0)
    for _ in range(2):
        assert not check.due
        hidden_states(model, check=check, **tiny.batch())
    for _ in range(2):  # it is not forgotten
        assert check.due
        with pytest.raises(HeadMismatch):
            hidden_states(model, check=check, **tiny.batch())


def test_a_model_has_a_check_of_its_own(monkeypatch: Any) -> None:
    model = tiny.build("gpt2")
    hidden_states(model, **tiny.batch())
    behind(monkeypatch, model, lambda z: z * 2.0)
    for _ in range(99):
        run_with_head(model, lambda hidden, head: hidden.sum(), **tiny.batch(1, 2))
    with pytest.raises(HeadMismatch):
        run_with_head(model, lambda hidden, head: hidden.sum(), **tiny.batch(1, 2))


def test_sampled_rows_are_spread_and_not_padding() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    check = HeadCheck(rows=4)
    assert check.sample(15, mask).tolist() == [1, 3, 8, 14]
    assert check.sample(15, None).tolist() == [0, 5, 9, 14]
    assert check.sample(2, None).tolist() == [0, 1]
    assert check.sample(15, torch.ones(1, 1, 15, 15)).tolist() == [0, 5, 9, 14]


def test_nan_in_padding_or_in_a_diverged_model_is_not_a_mismatch() -> None:
    model = tiny.build("llama")
    model.model.norm.register_forward_hook(
        lambda module, args, output: output.index_fill(1, torch.tensor([0]), torch.nan)
    )
    assert hidden_states(model, **tiny.batch()).isnan().any()


def test_no_logits_of_the_batch_are_made() -> None:
    """What the model gets in the place of its logits is a handful of rows, or none at all."""
    model, seen = tiny.build("gemma2"), []
    tanh = torch.tanh
    check = HeadCheck(every=2, rows=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tanh", lambda z: (seen.append(tuple(z.shape)), tanh(z))[1])
        for _ in range(2):
            run_with_head(model, lambda hidden, head: hidden.sum(), check=check, **tiny.batch())
    models_own = [shape for shape in seen if len(shape) == 3]
    assert models_own == [(1, 4 + len(PROBES), tiny.VOCAB), (1, 0, tiny.VOCAB)]


@pytest.mark.parametrize("name", ["every", "rows"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got 0"):
        HeadCheck(**{name: 0})
