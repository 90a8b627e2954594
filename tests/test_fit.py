"""What `pad-kernels plan` counts, against models, optimizers and tensors that are really there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM

from pad_kernels.fit import heads, models, trace
from pad_kernels.fit.optimizers import OPTIMIZERS, state_bytes, step_bytes
from pad_kernels.fit.step import Setup, prepare

GIB = 1 << 30
#: Layers, H, A, K, I, V, norms a layer, copies of the embedding; and the size as published.
PUBLISHED = {
    "gemma-2-2b": (26, 2304, 2048, 1024, 9216, 256000, 4, 1, "2.61B"),
    "gemma-2-9b": (42, 3584, 4096, 2048, 14336, 256000, 4, 1, "9.24B"),
    "llama-3-8b": (32, 4096, 4096, 1024, 14336, 128256, 2, 2, "8.03B"),
    "llama-3.2-1b": (16, 2048, 2048, 512, 8192, 128256, 2, 1, "1.24B"),
    "danube2-1.8b": (24, 2560, 2560, 640, 6912, 32000, 2, 2, "1.83B"),
    "danube3-500m": (16, 1536, 1536, 768, 4096, 32000, 2, 2, "0.51B"),
}


def config(kind: str = "llama", **changes: Any) -> Any:
    """A tiny config; wide enough beside 64 tokens that masks and the like do not matter."""
    values = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(kind, **(values | changes))


def setup(student: Any = None, **changes: Any) -> Setup:
    values = {
        "student": student or config(),
        "teachers": (),
        "method": "pad",
        "length": 64,
        "responses": 2,
        "gpu_bytes": GIB,
        "reserve_bytes": 0,
        "optimizer": "adamw",
        "precision": "bf16",
        "lora_rank": None,
        "eager_attention": False,
    }
    return Setup(**(values | changes))


def saved_bytes(model: Any, sequences: int, autocast: bool = False) -> int:
    """Bytes of the storages that autograd keeps of a real forward, and of the hidden states."""
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.randint(3, 300, (sequences, 64), generator=torch.Generator().manual_seed(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    kept[hidden.untyped_storage().data_ptr()] = hidden
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)


def real(student: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    student._attn_implementation = "eager" if student.model_type == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(student, dtype=dtype).train()


@pytest.mark.parametrize("name", models.built_in())
def test_built_in_shapes_have_the_published_sizes(name: str) -> None:
    found = models.read_config("student", name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found)
    with models.no_weights():
        ours = models.build("student", found, torch.bfloat16, "eager")
    layers, h, a, k, i, v, norms, tables, size = PUBLISHED[name]
    by_hand = layers * (2 * h * a + 2 * h * k + 3 * h * i + norms * h) + h + tables * v * h
    assert models.count(ours.parameters()) == model.num_parameters() == by_hand
    assert f"{by_hand / 1e9:.2f}B" == size


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("precision", ["bf16", "fp32-master"])
def test_activations_are_what_autograd_keeps(kind: str, precision: str) -> None:
    student, master = config(kind), precision == "fp32-master"
    # transformers runs Gemma-2 without flash-attn as eager attention, the others with torch's.
    wanted = setup(student, precision=precision, eager_attention=kind == "gemma2")
    steps = prepare(wanted)
    model = real(student, torch.float32 if master else torch.bfloat16)
    for checkpointing in (False, True):
        if checkpointing:
            models.checkpoint(model)
        found = saved_bytes(model, 4, master)
        expected = steps[checkpointing].activations(4)
        assert expected == pytest.approx(found, rel=0.25), checkpointing


def test_activations_of_a_llama_block_are_those_counted_by_hand() -> None:
    def layers(number: int) -> int:
        student = config(num_hidden_layers=number, num_key_value_heads=2)
        return prepare(setup(student), (False,))[False].activations(5)

    hidden, inner, attention, key_value, heads_ = 96, 256, 6 * 16, 2 * 16, 6
    block = 2 * (8 * hidden + 4) + 2 * (2 * attention + 2 * key_value) + 4 * heads_ + 8 * inner
    assert layers(5) - layers(4) == 5 * 64 * block


def test_eager_attention_adds_scores_that_autograd_keeps() -> None:
    flash, eager = (prepare(setup(eager_attention=x), (False,))[False] for x in (False, True))
    model = real(config())
    model.set_attn_implementation("eager")
    assert eager.activations(3) > 1.1 * flash.activations(3)
    assert eager.activations(3) == pytest.approx(saved_bytes(model, 3), rel=0.1)


def test_lora_is_what_peft_makes_of_it() -> None:
    peft = pytest.importorskip("peft")
    step = prepare(setup(lora_rank=8), (False,))[False]
    wanted = peft.LoraConfig(r=8, target_modules="all-linear")
    model = peft.get_peft_model(real(config()), wanted)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert step.static.trained == sum(p.numel() for p in trained)
    assert step.static.gradients == sum(p.nbytes for p in trained)
    assert step.static.entries == sum(p.numel() for p in model.parameters())
    assert step.needs == (True, False, False)
    found = saved_bytes(model.get_base_model(), 4)
    assert step.activations(4) == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("sequences", [1, 7])
def test_any_number_of_sequences_follows_from_two_traces(sequences: int) -> None:
    step = prepare(setup(config("gemma2")), (True,))[True]
    with models.no_weights():
        model: Any = models.build("student", config("gemma2"), torch.bfloat16, trace.FLASH)
        models.checkpoint(model)
        there = trace.gradients_there(model)
        (forward, backward), _ = trace.run_body(model, there, (sequences, 64), False, train=True)
    exact = pytest.approx if sequences == 1 else lambda x, rel: x  # 1 may be a special case
    assert step.forward.peak(sequences) == exact(max(forward), rel=0.1)
    assert step.backward.peak(sequences) == exact(max(backward), rel=0.1)
    assert step.activations(sequences) == exact(forward[-1], rel=0.1)


def test_a_trace_agrees_with_tensors_that_are_there() -> None:
    student = config()
    found = []
    for fake in (False, True):
        if fake:
            found.append(prepare(setup(student), (False,))[False])
            continue
        trace.register_flash()
        student._attn_implementation = trace.FLASH
        model = AutoModelForCausalLM.from_config(student, dtype=torch.bfloat16).train()
        there = trace.gradients_there(model)
        found.append(trace.run_body(model, there, (4, 64), False, train=True)[0])
    (forward, backward), step = found
    assert (step.forward.peak(4), step.backward.peak(4)) == (max(forward), max(backward))


def test_backward_frees_what_forward_kept() -> None:
    step = prepare(setup(), (False,))[False]
    assert 0 <= step.backward.last(4) <= 2 * 4 * 64 * 96 * 2 < step.activations(4)


@pytest.mark.parametrize(("softcap", "entry"), [(None, 12), (30.0, 14)])
def test_dense_logits_take_what_is_counted_by_hand(softcap: float | None, entry: int) -> None:
    """Bytes an entry at the worst instant of the log-softmax's backward.

    Float32: the log-softmax, its gradient, the logits' gradient. bfloat16: what tanh keeps.
    """
    student = config("gemma2", vocab_size=32768, final_logit_softcapping=softcap)
    step = prepare(setup(student), (False,))[False]
    growth = step.head(8, "dense") - step.head(4, "dense")
    assert growth == pytest.approx(4 * 64 * 32768 * entry, rel=0.02)


@pytest.mark.parametrize(("method", "teachers"), [("pad", 1), ("dckd", 1), ("adpa", 2)])
def test_teachers_are_held_through_the_loss(method: str, teachers: int) -> None:
    teacher = config(hidden_size=144, vocab_size=4096)
    student = config(vocab_size=4096)
    base = setup(student, method=method)
    alone = prepare(base, (True,))[True]
    step = prepare(replace(base, teachers=(teacher,) * teachers), (True,))[True]
    entries = AutoModelForCausalLM.from_config(teacher).num_parameters()
    assert step.static.teachers == 2 * teachers * entries
    logits, moments = 4 * 64 * 4096, step.moments(4, "dense")
    rest = step.static.total - alone.static.total
    held = 4 * 4 * 64 if method == "pad" else 2 * teachers * logits  # log-probs, or logits
    assert moments["forward"] - alone.moments(4, "dense")["forward"] == held + rest
    # The teacher's own pass: logits, and where it scores, their float32 copy and log-softmax.
    own = moments["teacher"] - step.static.total - (teachers - 1) * 2 * logits
    assert own == pytest.approx((10 if method == "pad" else 2) * logits, rel=0.15)
    ours = step.moments(4, "ours")
    assert all(ours[name] <= moments[name] for name in moments)
    if method != "pad":
        kept = 2 * teachers * 4 * 64 * 144
        assert ours["forward"] - alone.moments(4, "ours")["forward"] == kept + rest


def test_our_head_is_the_planners_workspace_and_two_gradients() -> None:
    step = prepare(setup(gpu_bytes=24 * GIB), (True,))[True]
    plan = heads.our_plan(
        24 * GIB, 256, 320, (96,), (torch.bfloat16, torch.bfloat16), (True, True, False), True
    )
    assert step.head(4, "ours") == plan.workspace_bytes + 2 * 256 * 96 + 2 * 320 * 96
    assert plan.workspace_bytes <= 24 * GIB / 32


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    for precision in ("bf16", "fp32-master"):
        student = config(vocab_size=16384)
        for step in prepare(setup(student, precision=precision)).values():
            for which in ("dense", "ours"):
                groups = step.largest(which)
                assert groups >= 1
                assert step.peak(2 * groups, which) <= GIB < step.peak(2 * groups + 2, which)
            assert step.largest("ours") > step.largest("dense")
            small = replace(step, setup=replace(step.setup, reserve_bytes=GIB - step.static.total))
            assert small.largest("ours") == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_optimizer_states(optimizer: str, dtype: torch.dtype) -> None:
    from transformers.optimization import Adafactor

    sizes = ((128, 64), (96, 64), (64,))
    trained = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    if optimizer == "adamw-8bit":  # bitsandbytes needs a GPU
        expected = 8 * 128 * 64 + 2 * (96 * 64 + 4 * 24) + 8 * 64
        assert state_bytes(optimizer, trained, trained[:1]) == expected
        return
    made: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    if optimizer == "adafactor":
        stepper = Adafactor(trained, lr=1e-3, scale_parameter=False, relative_step=False)
    else:
        stepper = made[optimizer](trained, lr=1e-3)
    stepper.step()
    states = [x for s in stepper.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    assert state_bytes(optimizer, trained, []) == sum(x.nbytes for x in states if x.dim())
    if optimizer == "adafactor":
        with trace.Timeline([*trained, *states, *(p.grad for p in trained)]) as timeline:
            stepper.step()
        assert step_bytes(optimizer, trained) == pytest.approx(max(timeline.bytes), rel=0.05)


@pytest.mark.parametrize(
    "kind", ["mistral", "qwen3", "gemma3_text", "phi", "cohere", "granite", "gpt_neox", "olmo2"]
)
def test_other_families_can_be_planned(kind: str) -> None:
    steps = prepare(setup(config(kind)))
    assert steps[True].activations(2) < steps[False].activations(2)
    assert steps[True].largest("ours") >= steps[False].largest("ours") > 0
