"""The tutorials from an empty folder with models, in order, and the how-to section by section."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doc_pages import ROOT, Block, Page

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("safetensors")
from safetensors.torch import load_file
from trainer_toys import logprobs
from transformers import AutoModelForCausalLM
from tutorial_toys import chat_tokenizer, fill

TUTORIALS = [Page(f"docs/tutorials/{name}.md") for name in ("README", "pad", "dckd", "adpa")]
BEFORE, PAD, DCKD, ADPA = TUTORIALS
HOWTO = Page("docs/howto.md")
#: Not in the development extra.
OPTIONAL = {"TRL": "trl", "Lightning": "lightning"}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As everywhere, but for a module: folders are made in fixtures too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, one_thread: None) -> Iterator[Path]:
    """Where the preparations were made; the working directory, too."""
    path = tmp_path_factory.mktemp("tutorials")
    fill(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        BEFORE.run()
        yield path
    sys.modules.pop("sampling", None)


@pytest.fixture(scope="module")
def after_dckd(folder: Path) -> dict[str, Any]:
    """What the tutorial on DCKD leaves behind; the one on ADPA goes on in its folder."""
    torch.manual_seed(0)
    return DCKD.run()


def changed(before: Path, after: Path) -> bool:
    """Whether two checkpoints of one model differ."""
    one, two = (load_file(path / "model.safetensors") for path in (before, after))
    assert one.keys() == two.keys()
    return any(not torch.equal(one[name], two[name]) for name in one)


def check(page: Page, namespace: dict[str, Any]) -> list[dict[str, float]]:
    """The history of a tutorial's trainer, which has the names that its page explains."""
    history = namespace["trainer"].state.log_history
    rows = re.findall(r"^\| (`.*?) \|", page.text.split("## What the logs say")[1], re.M)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(names) >= 4
    for name in names:
        values = [entry[name] for entry in history if name in entry]
        assert values and all(map(math.isfinite, values)), name
    assert math.isfinite(namespace["before"])
    return history


def test_pad(folder: Path, capsys: Any) -> None:
    namespace = PAD.run()
    history = check(PAD, namespace)
    assert changed(folder / "student", folder / "pad/final")
    rewards = [row["rewards"] for row in namespace["rows"]]
    assert len(rewards) == 12 and all(len(set(each)) == 4 for each in rewards)
    assert all(0 < entry["preference"] < math.log(2) for entry in history if "preference" in entry)
    assert "reward before" in capsys.readouterr().out


def test_pads_rewards_are_its_formula(folder: Path) -> None:
    """r = (mean log-prob + log p of the option's letter) / 2, from the teacher's own logits."""
    namespace: dict[str, Any] = {}
    before, after = PAD.blocks[1].text.split("del teacher, head")
    for text in (PAD.blocks[0].text, before):
        Block("python", text, "docs/tutorials/pad.md", 0).run(namespace)
    assert not after.strip()
    tokenizer = namespace["tokenizer"]
    teacher = AutoModelForCausalLM.from_pretrained("teacher")
    asked, questions = namespace["asked"], []
    for row in namespace["rows"][:2]:
        namespace["asked"] = lambda messages: questions.append(asked(messages)) or questions[-1]
        namespace["option_probability"](row["prompt"], row["responses"])
        last = teacher(input_ids=torch.tensor([questions[-1]])).logits[0, -1].log_softmax(-1)
        texts = tokenizer.batch_decode(row["responses"], skip_special_tokens=True)
        question = tokenizer.decode(questions[-1])
        for letter, text, response, found in zip(
            "ABCD", texts, row["responses"], row["rewards"], strict=True
        ):
            assert f"{letter}: {text}" in question
            mean = logprobs(teacher, asked(row["prompt"]), response).mean()
            chance = last[tokenizer.convert_tokens_to_ids(letter)].clamp(min=math.log(1e-8))
            torch.testing.assert_close(torch.tensor(found), (mean + chance) / 2)


def test_dckd(folder: Path, after_dckd: dict[str, Any]) -> None:
    check(DCKD, after_dckd)
    assert changed(folder / "teacher", folder / "teacher-aligned")
    assert changed(folder / "student", folder / "dckd/final")
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 12 and all(pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize("start", ["dckd/final", "student"])
def test_adpa(folder: Path, after_dckd: dict[str, Any], start: str) -> None:
    namespace: dict[str, Any] = {}
    for block in ADPA.blocks:
        if start == "student" and block.language == "sh":
            continue
        text = block.text.replace('start = "dckd/final"', f"start = {start!r}")
        Block(block.language, text, block.page, block.line).run(namespace)
    assert namespace["start"] == start
    history = check(ADPA, namespace)
    assert all(entry["advantage"] != 0 for entry in history if "advantage" in entry)
    assert changed(folder / start, folder / "adpa/final")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: Any) -> None:
    """Models and rows in the working directory, as the how-to has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # TRL then reports its use to nobody
    fill(tmp_path)
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i * i}."} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def begun() -> dict[str, Any]:
    """The how-to's namespace before its sections."""
    namespace: dict[str, Any] = {}
    for block in HOWTO.sections()[""]:
        block.run(namespace)
    return namespace


@pytest.mark.parametrize("section", [name for name in HOWTO.sections() if name])
def test_howto(section: str, rows: None, one_thread: None) -> None:
    package = OPTIONAL.get(section)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, nor part of the dev extra: pip install {package}")
    namespace = begun()
    before = [each.detach().clone() for each in namespace["student"].parameters()]
    losses = []
    loss_of = namespace["loss_of"]
    namespace["loss_of"] = lambda *arguments: losses.append(loss_of(*arguments)) or losses[-1]
    for block in HOWTO.sections()[section]:
        block.run(namespace)
        lines = [line for line in block.text.splitlines() if line.strip()]
        assert len([line for line in lines if "import" not in line]) <= 10
    assert losses and torch.isfinite(torch.stack(losses)).all()
    after = namespace["student"].parameters()
    assert not any(torch.equal(a, b.cpu()) for a, b in zip(before, after, strict=True))


def test_howtos_loss_is_its_formula(rows: None, one_thread: None) -> None:
    namespace = begun()
    batch = next(iter(namespace["loader"]))
    assert not batch["attention_mask"].all()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student, teacher = (
        namespace[name](**inputs).logits[:, :-1].log_softmax(-1) for name in ("student", "teacher")
    )
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    nll = F.nll_loss(student[counted], labels[counted], reduction="sum")
    kl = F.kl_div(student[counted], teacher[counted], log_target=True, reduction="sum")
    found = namespace["loss_of"](namespace["student"], batch, 7.0)
    torch.testing.assert_close(found, (nll + 0.5 * kl) / 7, rtol=1e-5, atol=1e-6)
    assert namespace["tokens_in"](batch) == counted.sum()


def test_the_howto_has_every_framework() -> None:
    assert set(HOWTO.sections()) == {"", "By hand", "Accelerate", "TRL", "Lightning"}


@pytest.mark.parametrize("page", [*TUTORIALS, HOWTO], ids=lambda page: page.path.stem)
def test_links_lead_somewhere(page: Page) -> None:
    assert page.links and not page.broken_links()


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.path.stem)
def test_a_tutorial_is_one_page(page: Page) -> None:
    assert len(page.text.splitlines()) < 150


def test_all_tutorials_run() -> None:
    """A page that is added has to be in a test."""
    assert {page.path for page in TUTORIALS} == set((ROOT / "docs/tutorials").iterdir())


def test_the_toys_have_a_token_for_everything() -> None:
    tokenizer = chat_tokenizer()
    text = "Zoë: 2 + 2 = 4 \N{GRINNING FACE}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
