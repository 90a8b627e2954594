"""What all methods of one seed share: the world, people's preferences, the teachers, the base."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.miniature.models import build, tokenizer
from examples.miniature.settings import Settings
from examples.miniature.training import frozen_copy, train
from examples.miniature.world import World

SHARED = ("reference", "aligned", "base")


@dataclass
class Lab:
    """Everything of a seed. The same settings and seed make the same lab.

    Attributes:
        settings, seed: as given.
        world: the task.
        prompts, chosen, rejected: people's preferences.
        held_out: as much about prompts that nobody has seen, the better response always first.
        tokenizer: of all models.
        models: trained so far, by name.
    """

    settings: Settings
    seed: int
    world: World
    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    held_out: tuple[Tensor, Tensor, Tensor]
    tokenizer: Any
    models: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, seed: int) -> Lab:
        """Make the task of a seed; no model yet."""
        world = World(settings, seed)
        pairs = world.pairs(world.training, settings.pairs)
        prompts = world.draw(world.held_out, settings.held_out_pairs)
        one, other = world.written(prompts), world.written(prompts)
        better = world.rewards(prompts, one) >= world.rewards(prompts, other)
        better = better[:, None]
        held_out = (prompts, one.where(better, other), other.where(better, one))
        return cls(settings, seed, world, *pairs, held_out, tokenizer(world))

    def student(self) -> Any:
        """A student with random weights."""
        return build(self.settings.student, self.world, seed=self.seed)

    def pretrain(self) -> None:
        """The reference teacher and the student's base learn from texts; then the aligned teacher.

        Texts are of mixed quality, on the prompts that are not held out; the base sees fewer. The
        aligned teacher is the reference after DPO on the preferences.
        """
        s, world = self.settings, self.world
        prompts = world.draw(world.training, s.texts)
        texts = world.rows(prompts, completion=world.written(prompts))
        sft = {"options": {"loss": "sft"}, "batch": s.rows, "teachers": {}}
        reference = build(s.teacher, world, seed=1000 + self.seed)
        self._train(reference, "Preference", texts, s.reference_steps, 5e-3, **sft)
        base = self.student()
        self._train(base, "Preference", texts, s.base_steps, 1e-2, **sft)
        aligned = frozen_copy(reference).requires_grad_(True)
        pairs = world.rows(self.prompts, chosen=self.chosen, rejected=self.rejected)
        dpo = {"options": {"loss": "dpo", "beta": s.aligned_beta}, "batch": s.rows // 2}
        teachers = {"reference": reference}
        self._train(
            aligned, "Preference", pairs, s.aligned_steps, s.aligned_rate, teachers=teachers, **dpo
        )
        self.models |= {"reference": reference, "aligned": aligned, "base": base}

    def _train(
        self, model: Any, trainer: str, rows: Any, steps: int, rate: float, **options: Any
    ) -> None:
        train(
            model, trainer, rows, self.tokenizer, steps=steps, rate=rate, seed=self.seed, **options
        )

    def save(self, name: str, folder: Path) -> None:
        """Write a model to disk: all of it or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.partial"
        save_file(self.models[name].state_dict(), partial)
        partial.rename(folder / f"{name}.safetensors")

    def load(self, name: str, folder: Path) -> None:
        """Read a model from disk."""
        size = self.settings.teacher if name in SHARED[:2] else self.settings.student
        model = build(size, self.world, seed=0)
        model.load_state_dict(load_file(folder / f"{name}.safetensors"))
        self.models[name] = model.eval().requires_grad_(False)
