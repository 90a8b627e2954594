"""The demo from corpus to report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pad_kernels.demo import corpus as text
from pad_kernels.demo import measure, models, preference, pretrain, report, step_cost
from pad_kernels.demo.outcome import Curve, Outcome, Progress, Sample
from pad_kernels.demo.sampling import Responses, sample
from pad_kernels.demo.settings import METHODS, ModelSize, Settings

STAGES = 6


@dataclass
class Material:
    """The text as tokens: what each model reads, what is held out, and the prompts."""

    corpus: text.Corpus
    tokenizer: Tokenizer
    teacher_reads: list[list[int]]
    student_reads: list[list[int]]
    held_out: list[list[int]]
    prompts: Tensor
    held_out_prompts: Tensor


class Console:
    """What a person sees while the demo runs: numbered stages, a bar in each, facts under it."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.start = time.perf_counter()
        self.stage_number = 0

    def say(self, line: str = "") -> None:
        """Print a line."""
        if not self.quiet:
            print(line, flush=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Progress]:
        """Number a stage and give it a progress bar of `total` ticks."""
        self.stage_number += 1
        self.say(f"[{self.stage_number}/{STAGES}] {title}")
        # In a log file a bar is a line every few seconds, on a terminal it moves.
        interval = 0.3 if _on_terminal() else 15.0
        bar = tqdm(
            total=total,
            disable=self.quiet,
            leave=False,
            mininterval=interval,
            maxinterval=interval,
            bar_format="      {bar:28} {percentage:3.0f}%  {elapsed}  {desc}",
            ascii=" ━",
        )

        def tick(note: str) -> None:
            bar.set_description_str(note, refresh=False)
            bar.update()

        with bar:
            yield tick

    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.perf_counter() - self.start


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def prepare(settings: Settings, console: Console) -> Material:
    """Read the text, train the tokenizer, choose prompts."""
    with console.stage("Text and tokenizer", 3) as tick:
        tick("reading the documentation that ships with CPython")
        found = text.read_corpus(settings)
        tick("training a BPE tokenizer")
        texts = found.training_texts()
        tokenizer = text.train_tokenizer(texts, settings.vocab_size)
        docstrings = text.encode(tokenizer, text.in_order(found.docstrings))
        reference = text.encode(tokenizer, text.in_order(found.reference))
        material = Material(
            found,
            tokenizer,
            docstrings + reference * settings.reference_repeats,
            docstrings,
            text.encode(tokenizer, text.in_order(found.held_out)),
            text.openings(
                tokenizer, text.in_order(found.reference), settings, settings.train_prompts
            ),
            text.openings(
                tokenizer,
                text.in_order(found.held_out),
                settings,
                settings.held_out_prompts,
                avoid="\n".join(texts),
            ),
        )
        tick("")
    for name, documents in (("docstrings", docstrings), ("language reference", reference)):
        console.say(f"      {name}: {sum(map(len, documents)):,} tokens")
    console.say(
        f"      {tokenizer.get_vocab_size():,} kinds of tokens; "
        f"{len(material.prompts)} prompts to train on; held out: {len(found.held_out)} topics "
        f"with {len(material.held_out_prompts)} prompts"
    )
    return material


def pretrain_model(
    name: str, size: ModelSize, material: Material, settings: Settings, console: Console
) -> tuple[PreTrainedModel, Curve, float]:
    """Train a fresh model on the text; returns it, its curve and its held-out loss."""
    model = models.build(size, settings, material.tokenizer.get_vocab_size())
    documents = material.teacher_reads if name == "teacher" else material.student_reads
    title = f"Pre-train the {name}: {_count(model) / 1e6:.1f} million parameters"
    with console.stage(title, size.steps) as tick:
        curve = pretrain.train(model, size, documents, settings, name, tick)
        held_out = pretrain.evaluate(model, material.held_out, settings)
    console.say(f"      {held_out:.3f} nats a token on held-out topics of the reference")
    return model, curve, held_out


class Tracker:
    """Held-out ranking figures of a student while it is trained."""

    def __init__(self, name: str, held_out: measure.HeldOut, settings: Settings) -> None:
        self.held_out, self.settings = held_out, settings
        self.tau = Curve(name, [], [])
        self.loss = Curve(name, [], [])

    def __call__(self, model: PreTrainedModel, step: int) -> None:
        """Measure a model after some steps."""
        losses, taus = self.held_out.ranking(model, self.settings)
        for curve, values in ((self.loss, losses), (self.tau, taus)):
            curve.x.append(step)
            curve.y.append(values.mean().item())


@dataclass
class Comparison:
    """Every student's result, and how its held-out figures moved while it was trained."""

    results: list[measure.Result]
    taus: list[Curve]
    losses: list[Curve]


@dataclass
class Distillation:
    """PAD's material: both models, the student's responses and the teacher's opinion of them."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    responses: Responses
    rewards: Tensor
    held_out: measure.HeldOut


def sample_and_score(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    material: Material,
    settings: Settings,
    console: Console,
) -> Distillation:
    """PAD's first two phases, for the training prompts and for the held-out ones."""
    title = f"Sample {settings.responses} responses a prompt, score them with the teacher"
    with console.stage(title, 4) as tick:
        tick("student writes")
        responses = sample(student, material.prompts, settings, settings.seed + 1)
        tick("student writes to held-out prompts")
        fixed = sample(student, material.held_out_prompts, settings, settings.seed + 2)
        tick("teacher reads")
        rewards = preference.score(teacher, responses)
        held_out = measure.HeldOut(
            material.held_out_prompts, fixed, preference.score(teacher, fixed)
        )
        tick("")
    spread = rewards.std(1).mean()
    console.say(
        f"      {rewards.numel()} responses; the teacher gives them {rewards.mean():.2f} nats a "
        f"token on average, responses to one prompt spread by {spread:.2f}"
    )
    return Distillation(teacher, student, responses, rewards, held_out)


def compare(
    work: Distillation, material: Material, settings: Settings, console: Console
) -> Comparison:
    """PAD's third phase, and DPO and SimPO from the same responses; each student is measured."""

    def result(name: str, model: PreTrainedModel, seconds: float) -> measure.Result:
        loss = pretrain.evaluate(model, material.held_out, settings)
        return measure.measure(name, model, work.teacher, work.held_out, loss, seconds, settings)

    found = Comparison([result("before", work.student, 0.0)], [], [])
    tokenizer = text.for_transformers(material.tokenizer)
    total = len(METHODS) * settings.preference_steps
    with console.stage("Train the student three ways on these responses", total) as tick:
        for kind in METHODS:
            tracker = Tracker(kind, work.held_out, settings)
            trained, seconds = preference.train(
                work.student,
                kind,
                work.responses,
                work.rewards,
                tokenizer,
                settings,
                tick,
                tracker,
            )
            found.results.append(result(kind, trained, seconds))
            found.taus.append(tracker.tau)
            found.losses.append(tracker.loss)
    return found


def measure_costs(settings: Settings, console: Console) -> list[step_cost.Cost]:
    """Time and memory of the PAD step, each in a process of its own."""
    pairs = [(size, head) for size in settings.cost_vocab_sizes for head in step_cost.HEADS]
    with console.stage(
        "The same PAD step with dense logits and with pad_kernels", len(pairs)
    ) as tick:
        costs = []
        for size, head in pairs:
            costs.append(step_cost.measure(head, size, settings))
            tick(f"{head}, {size} entries")
    return costs


def run(settings: Settings, out: Path, *, quiet: bool = False) -> Outcome:
    """Run the demo and write `report.html` and `results.json` into the folder `out`.

    Args:
        settings: sizes, steps and the seed.
        out: folder, made where it is missing.
        quiet: print nothing.

    Returns:
        Everything that was measured, and where the report is.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console(quiet)
    material = prepare(settings, console)
    teacher, teacher_curve, teacher_loss = pretrain_model(
        "teacher", settings.teacher, material, settings, console
    )
    student, student_curve, student_loss = pretrain_model(
        "student", settings.student, material, settings, console
    )
    work = sample_and_score(teacher, student, material, settings, console)
    comparison = compare(work, material, settings, console)
    costs = measure_costs(settings, console)
    outcome = Outcome(
        settings=settings,
        topics=(len(material.corpus.reference), len(material.corpus.held_out)),
        tokens=(_tokens(material.teacher_reads), _tokens(material.student_reads)),
        vocabulary=material.tokenizer.get_vocab_size(),
        prompts=(len(material.prompts), len(material.held_out_prompts)),
        parameters=(_count(teacher), _count(student)),
        text_losses=(teacher_loss, student_loss),
        pretraining=[teacher_curve, student_curve],
        results=comparison.results,
        taus=comparison.taus,
        losses=comparison.losses,
        samples=_samples(material, comparison.results, work.teacher, settings),
        costs=costs,
        seconds=console.elapsed(),
    )
    console.say("\n" + report.table(outcome) + "\n")
    path = report.write(outcome, out)
    console.say(f"Finished in {outcome.seconds / 60:.1f} minutes. The report: {path.resolve()}")
    return outcome


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _tokens(documents: list[list[int]]) -> int:
    return sum(map(len, documents))


def _samples(
    material: Material,
    results: list[measure.Result],
    teacher: PreTrainedModel,
    settings: Settings,
) -> list[Sample]:
    """The first response of each student to the first held-out prompts: not a selection."""
    texts = {result.name: result.written for result in results}
    scores = {name: preference.score(teacher, written) for name, written in texts.items()}
    decode = material.tokenizer.decode
    samples = []
    for prompt in range(min(settings.shown_samples, len(material.held_out_prompts))):
        shown = {
            name: (decode(written.tokens(prompt, 0)), scores[name][prompt, 0].item())
            for name, written in texts.items()
        }
        samples.append(Sample(decode(material.held_out_prompts[prompt].tolist()), shown))
    return samples
