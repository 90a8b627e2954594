"""A training loop written by hand: preference-aligned distillation of a `transformers` model.

    pip install '.[demo]'
    python examples/preference_loop.py

Weights and prompts are random, so that it runs anywhere within seconds. For real use put
`AutoModelForCausalLM.from_pretrained(...)` and your tokenized prompts in their place: a teacher and
a student that share a tokenizer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import pad_kernels as pk

VOCAB, PROMPT, RESPONSE, N, BETA = 4096, 8, 24, 4, 10.0


def make_model(hidden: int, layers: int, seed: int) -> PreTrainedModel:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.2,  # random models with opinions: their log-probs differ
    )
    return AutoModelForCausalLM.from_config(config)


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The states before the LM head; calling `model(...)` instead would make the logits."""
    return model.model(input_ids=ids).last_hidden_state


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Phase 1: N responses a prompt at high temperature; inputs and the labels they predict."""
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, num_return_sequences=N,
        do_sample=True, temperature=1.0, top_k=0, min_new_tokens=RESPONSE, max_new_tokens=RESPONSE,
    )  # fmt: skip
    labels = ids[:, 1:].clone()
    labels[:, : PROMPT - 1] = -100  # the prompt is neither scored nor trained on
    return ids[:, :-1], labels


@torch.no_grad()
def score(model: PreTrainedModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """Phase 2: the mean log-prob of each response, [prompts, N]."""
    logprob = pk.linear_logprob(hidden_states(model, inputs), model.lm_head.weight, labels)
    return pk.sequence_reward(logprob, labels=labels).view(-1, N)


def train(steps: int = 20) -> list[float]:
    """Run the three phases once; returns the loss of each step."""
    teacher, student = make_model(128, 4, seed=1).eval(), make_model(64, 2, seed=2)
    inputs, labels = sample(student, torch.randint(3, VOCAB, (8, PROMPT)))
    rewards = score(teacher, inputs, labels)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):  # phase 3
        hidden, weight = hidden_states(student, inputs), student.lm_head.weight
        loss = pk.linear_preference_loss(hidden, weight, labels, rewards, beta=BETA)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:2d}  preference loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    train()
