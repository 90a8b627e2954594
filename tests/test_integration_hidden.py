"""Models run without their logits, whatever they are wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

import tiny_models as tiny

import pad_kernels as pk
from pad_kernels.integrations.transformers import (
    HeadCheck,
    ModelHead,
    head_of,
    hidden_states,
    run_with_head,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = tiny.batch()
LABELS = tiny.labels_of(INPUTS)


def loss_at_head(hidden: Tensor, head: ModelHead) -> Tensor:
    return pk.linear_cross_entropy(hidden, head.weight, LABELS, **head.options())


def ours(model: nn.Module) -> Tensor:
    loss: Tensor = run_with_head(model, loss_at_head, **INPUTS)
    return loss


def dense(model: nn.Module) -> Tensor:
    logits = model(**INPUTS).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())


def assert_same_step(
    model: nn.Module,
    other: nn.Module | None = None,
    *,
    rtol: float = 1e-5,
    loss_of: Callable[[nn.Module], Tensor] = ours,
) -> dict[str, Tensor]:
    """One step of ours through ``model`` is the dense one of ``other``; ours gradients."""
    losses: dict[str, Tensor] = {}

    def step(name: str, run: Callable[[nn.Module], Tensor], which: nn.Module) -> Any:
        torch.manual_seed(5)
        losses[name] = run(which)
        return losses[name]

    unlike = model if other is None else other
    expected = tiny.gradients(unlike, lambda: step("dense", dense, unlike))
    found = tiny.gradients(model, lambda: step("ours", loss_of, model))
    torch.testing.assert_close(losses["ours"], losses["dense"], rtol=rtol, atol=rtol)
    assert len(found) == len(expected) > 0
    for (name, gradient), reference in zip(found.items(), expected.values(), strict=True):
        assert (gradient - reference).norm() <= rtol * reference.norm() + 1e-9, name
    return found


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Engine(nn.Module):
    """As DeepSpeed's: its own forward around ``module``, whose attributes are its own too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.module(**inputs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class TestWrappers:
    def test_an_engine_around_the_model(self) -> None:
        engine = Engine(tiny.build("gemma2"))
        assert_same_step(engine)
        assert engine.calls == 2
        assert head_of(engine).weight is engine.module.lm_head.weight

    def test_compiled(self, fresh_compiler: None) -> None:
        """Before and after, the compiled model gives logits as ever."""
        model, given = tiny.build("gemma2", loud=5.0), INPUTS | {"use_cache": False}
        compiled = torch.compile(model, backend="aot_eager")
        logits = compiled(**given).logits
        for _ in range(2):  # with a comparison, and without
            assert_same_step(compiled, model)
        torch.testing.assert_close(compiled(**given).logits, logits)

    def test_the_body_is_compiled_once(self, fresh_compiler: None) -> None:
        graphs: list[int] = []

        def count(graph: Any, inputs: Any) -> Any:
            graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
            return graph.forward

        compiled = torch.compile(tiny.build("gemma2"), backend=count)
        for _ in range(10):
            ours(compiled)
        bodies = [size for size in graphs if size > 40]
        assert len(bodies) == 1 and len(graphs) <= 3, graphs  # the cap is the rest

    @pytest.fixture
    def accelerate(self) -> Iterator[Any]:
        """Accelerate's state is one for the process, and a trainer may have set it before."""
        state = pytest.importorskip("accelerate.state").AcceleratorState
        state._reset_state(reset_partial_state=True)
        yield pytest.importorskip("accelerate")
        state._reset_state(reset_partial_state=True)

    def test_accelerate(self, accelerate: Any) -> None:
        """It replaces the model's forward by one that casts, and turns results to float32."""
        model, other = tiny.build("gemma2", loud=5.0), tiny.build("gemma2", loud=5.0)
        prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        hidden = hidden_states(prepared, **INPUTS)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(hidden, hidden_states(other, **INPUTS))
        assert_same_step(prepared, rtol=2e-2)
        assert prepared.forward.__name__ == tiny.build("gemma2").forward.__name__

    def test_layers_of_wrappers(self, fresh_compiler: None) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], r=2)
        model = peft.get_peft_model(tiny.build("llama"), config)
        assert_same_step(torch.compile(Engine(model), backend="eager"), model)


class TestPeft:
    def model(self, family: str = "llama", **settings: Any) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(2)
        config = peft.LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "r": 4} | settings))
        return peft.get_peft_model(tiny.build(family), config)

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_adapters_in_the_body(self, family: str) -> None:
        model = self.model(family, init_lora_weights=False)
        found = assert_same_step(model)
        assert all("lora" in name for name in found)
        assert not head_of(model).weight.requires_grad

    def test_an_adapter_on_the_head_is_refused_before_it_has_learnt_anything(self) -> None:
        model = self.model(target_modules=["q_proj", "lm_head"])
        for call in (head_of, ours):
            with pytest.raises(TypeError, match=r"modules_to_save.*an adapter \(peft\..*Linear\)"):
                call(model)

    @pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
    def test_a_head_that_is_trained_whole(self, family: str) -> None:
        model = self.model(family, modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        found = assert_same_step(model)
        assert any("lm_head.modules_to_save.default.weight" in name for name in found)
        head = head_of(model)
        assert head.weight.requires_grad and not head.tied
        with model.disable_adapter():
            plain = head_of(model)
            torch.testing.assert_close(ours(model), dense(model))
            assert plain.weight is model.base_model.model.lm_head.original_module.weight
            assert plain.tied == (family == "gemma2")

    def test_learnt_prompts(self) -> None:
        """They take up positions, which labels do not know of; prefixes do not."""
        peft = pytest.importorskip("peft")
        for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
            config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
            model = peft.get_peft_model(tiny.build("llama"), config)
            if kind is peft.PrefixTuningConfig:
                assert_same_step(model)
            else:
                with pytest.raises(ValueError, match=r"\(3, 9\) positions.*\(3, 12, 32\)"):
                    ours(model)

    def test_trained_tokens_of_a_tied_head_are_refused(self) -> None:
        model = self.model("gemma2", trainable_token_indices=[3, 4])
        with pytest.raises(TypeError, match="the LM head"):
            head_of(model)


class TestTraining:
    @pytest.mark.parametrize("family", ["gpt2", "phi"])
    def test_dropout_is_drawn_once(self, family: str) -> None:
        """The same draws as one call of the model makes."""
        dropout = {"resid_pdrop": 0.3, "embd_pdrop": 0.3}
        model = tiny.build(family, **dropout).train()
        assert_same_step(model)
        assert (ours(model) - ours(model)).abs() > 1e-4

    def test_one_forward(self) -> None:
        model, calls = tiny.build("llama"), []
        model.model.register_forward_hook(lambda *args: calls.append(1))
        hidden_states(model, **INPUTS)
        assert len(calls) == 1

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant: bool) -> None:
        model = tiny.build("gemma2").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        assert_same_step(model, tiny.build("gemma2"))

    def test_autocast(self) -> None:
        """Also the head's gradient, where compute shares autocast's cast of its weight."""

        def plain(hidden: Tensor, head: ModelHead) -> Tensor:
            logits = F.linear(hidden, head.weight).float()
            logits = 5.0 * torch.tanh(logits / 5.0)
            return F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())

        model = tiny.build("gemma2-untied", loud=5.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_step(model, rtol=2e-2)
        found = []
        for run in (dense, lambda m: run_with_head(m, plain, check=HeadCheck(), **INPUTS)):
            with torch.autocast("cpu", torch.bfloat16):  # nothing has been cast yet
                found.append(tiny.gradients(model, lambda run=run: run(model)))
        theirs, by_hand = (each["lm_head.weight"] for each in found)
        assert (by_hand - theirs).norm() <= 2e-2 * theirs.norm()

    def test_bfloat16_model(self) -> None:
        model = tiny.build("cohere", loud=5.0).bfloat16()
        assert hidden_states(model, **INPUTS).dtype == torch.bfloat16
        assert_same_step(model, rtol=3e-2)


class TestCalls:
    def test_no_cache_unless_asked_for(self) -> None:
        model, seen = tiny.build("llama"), []
        model.model.register_forward_pre_hook(
            lambda module, args, given: seen.append(given["use_cache"]), with_kwargs=True
        )
        plain = hidden_states(model, **INPUTS)
        cached = hidden_states(model, use_cache=True, **INPUTS)
        assert seen == [False, True]
        torch.testing.assert_close(plain, cached)

    def test_a_model_that_returns_tuples(self) -> None:
        model = tiny.build("llama")
        expected = hidden_states(model, **INPUTS)
        found = hidden_states(model, check=HeadCheck(), return_dict=False, **INPUTS)
        torch.testing.assert_close(found, expected)

    def test_embeddings_go_in(self) -> None:
        model = tiny.build("llama")
        embedded = model.get_input_embeddings()(INPUTS["input_ids"])
        found = hidden_states(
            model, inputs_embeds=embedded, attention_mask=INPUTS["attention_mask"]
        )
        torch.testing.assert_close(found, hidden_states(model, **INPUTS))

    def test_hooks_of_the_head_and_of_the_model_see_the_result(self) -> None:
        """FSDP's gather weights again when the gradient of what they have seen arrives."""
        model, seen = tiny.build("llama"), []
        ours(model)  # with a comparison
        for module in (model.lm_head, model):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
        loss = ours(model)
        assert [each is loss for each in seen] == [True, True]

    def test_results_of_many_tensors(self) -> None:
        class Both(NamedTuple):
            loss: Tensor
            nothing: Tensor | None

        model = tiny.build("llama")
        for made in (
            lambda h: {"a": h.sum(), "b": [h.mean(), None]},
            lambda h: (h.sum(), {"c": h}),
            lambda h: Both(h.sum(), None),
        ):
            states = hidden_states(model, **INPUTS)
            found = run_with_head(model, lambda h, _, made=made: made(h), **INPUTS)
            assert type(found) is type(made(states))
            torch.testing.assert_close(found, made(states))

    def test_the_model_is_as_it_was(self) -> None:
        model = tiny.build("llama")
        head, logits = model.lm_head, model(**INPUTS).logits

        def fails(hidden: Tensor, head: ModelHead) -> Tensor:
            raise ArithmeticError("in compute")

        for _ in range(2):
            with pytest.raises(ArithmeticError, match="in compute"):
                run_with_head(model, fails, **INPUTS)
            assert model.lm_head is head
            assert "forward" not in vars(model) and "forward" not in vars(head)
        torch.testing.assert_close(model(**INPUTS).logits, logits)

    def test_no_gradient(self) -> None:
        model = tiny.build("gemma2")
        with torch.no_grad():
            assert not ours(model).requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(ours(model), dense(model))

    def test_a_loss_of_the_models_own_is_not_dropped(self) -> None:
        model = tiny.build("mixtral", output_router_logits=True)
        with pytest.raises(ValueError, match=r"no loss of its own.*aux_loss from Mixtral"):
            ours(model)
        with torch.no_grad():  # a teacher's is of no interest
            ours(model)

    def test_a_forward_that_leaves_its_head_out_or_calls_it_twice(self, monkeypatch: Any) -> None:
        model = tiny.build("llama")
        forward = type(model).forward

        def twice(self: Any, **kwargs: Any) -> Any:
            output = forward(self, **kwargs)
            self.lm_head(self.model(**kwargs).last_hidden_state)
            return output

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "forward", twice)
            with pytest.raises(TypeError, match="a model that calls its head once"):
                hidden_states(model, **INPUTS)
        fused = lambda self, **kwargs: F.linear(  # noqa: E731
            self.model(**kwargs).last_hidden_state, self.lm_head.weight
        )
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "forward", fused)
            with pytest.raises(TypeError, match="a model that calls its output embedding"):
                hidden_states(model, **INPUTS)
