"""What each process of test_integration_distributed.py does; the first one keeps the results."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import tiny_models as tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pad_kernels as pk
from pad_kernels.integrations.transformers import HeadCheck, ModelHead, head_of, run_with_head

Found = dict[str, Any]


def share(rank: int, world: int) -> dict[str, Tensor]:
    """A rank's rows of the batch; each rank has as many tokens."""
    ids = tiny.batch(4, 7)["input_ids"]
    ids = ids.chunk(world)[rank]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(inputs: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """A loss of the share: mean cross-entropy and something of the hidden states' own."""
    check = HeadCheck(every=2)  # two steps: with a comparison, and without
    labels = tiny.labels_of(inputs)

    def compute(hidden: Tensor, head: ModelHead) -> dict[str, Tensor]:
        assert not isinstance(head.weight, DTensor)
        loss = pk.linear_cross_entropy(hidden, head.weight, labels, **head.options())
        return {"loss": loss, "square": hidden.square().mean()}

    def loss_of(model: nn.Module) -> Tensor:
        found = run_with_head(model, compute, check=check, **inputs)
        return found["loss"] + 0.1 * found["square"]

    return loss_of


def steps(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Two steps of gradient descent: the losses, averaged over processes, and the gradients."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), {}
    for step in range(2):
        optimizer.zero_grad()
        value = loss_of(model)
        value.backward()
        value = value.detach()
        if dist.is_initialized():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        found[f"{step}.loss"] = value
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                for wrapper in ("module.", "_fsdp_wrapped_"):
                    name = name.removeprefix(wrapper)
                found[f"{step}.{name}"] = whole.clone()
        optimizer.step()
    return found


def sharded(model: Any, *, head_apart: bool, **options: Any) -> Any:
    """FSDP2: each layer a group, the rest the root's; the head's with the root or apart."""
    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head_apart:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: DistributedDataParallel(model, **options)


def lora(model: Any) -> Any:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


#: case -> (family, what is done in every process alike, what spreads the model over them)
CASES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "ddp": ("gemma2", lambda m: m, ddp()),
    "ddp, unused parameters": ("phi", lambda m: m, ddp(find_unused_parameters=True)),
    "ddp, static graph": ("llama", lambda m: m, ddp(static_graph=True)),
    "ddp, adapters": ("gemma2", lora, ddp()),
    "fsdp2, tied": ("gemma2", lambda m: m, lambda m: sharded(m, head_apart=False)),
    "fsdp2, head apart": ("phi", lambda m: m, lambda m: sharded(m, head_apart=True)),
    "fsdp2, head with the root": ("granite", lambda m: m, lambda m: sharded(m, head_apart=False)),
    "fsdp2, adapters": ("llama", lora, lambda m: sharded_adapters(m)),
}


def sharded_adapters(model: Any) -> Any:
    """FSDP2 around PEFT: the causal language model is not the root."""
    sharded(model.get_base_model(), head_apart=True)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def model_of(case: str) -> Any:
    """The model before it is spread over processes."""
    family, prepare, _ = CASES[case]
    return prepare(tiny.build(family, loud=5.0)).train()


def half(rank: int, world: int) -> Found:
    """FSDP2 in bfloat16: the head arrives in the dtype that the model computes in."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, seen = sharded(model_of("fsdp2, head apart"), head_apart=True, mp_policy=policy), []

    def compute(hidden: Tensor, head: ModelHead) -> Tensor:
        seen.append((str(hidden.dtype), str(head.weight.dtype)))
        labels = tiny.labels_of(share(rank, world))
        return pk.linear_cross_entropy(hidden, head.weight, labels, **head.options())

    run_with_head(model, compute, **share(rank, world)).backward()
    gradient = model.lm_head.weight.grad
    return {
        "seen": seen,
        "gradient": str(gradient.dtype),
        "outside": type(head_of(model).weight).__name__,
    }


def run(rank: int, world: int, folder: str) -> None:
    """One process: every case, and what the first process found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store{world}", rank=rank, world_size=world)
    found: Found = {}
    for case, (_, _, spread) in CASES.items():
        try:
            found[case] = steps(spread(model_of(case)), ours(share(rank, world)))
        except Exception as error:
            raise RuntimeError(case) from error
    found["half"] = half(rank, world)
    if rank == 0:
        torch.save(found, os.path.join(folder, f"found{world}.pt"))
    dist.barrier()
    dist.destroy_process_group()
