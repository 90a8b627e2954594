"""What sample and score compute, against the same written out densely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

import pipeline_toys as toys
from pipeline_toys import model, run, table
from trainer_toys import logprobs

from pad_kernels.pipeline import questions, rows, sample

pytestmark = pytest.mark.usefixtures("one_thread")


# sample.


def test_samples_do_not_depend_on_their_batch(home: Path) -> None:
    one = table(run("sample", "one", sample__batch_size=1, sample__shard_rows=20) / "samples")
    found = table(run("sample", "many", sample__batch_size=7, sample__shard_rows=9) / "samples")
    assert found == one
    assert [row["prompt"] for row in found] == [row["prompt"] for row in toys.pairs(20)]
    assert [row["chosen"] for row in found] == [row["chosen"] for row in toys.pairs(20)]
    assert len({row["sample_seed"] for row in found}) == 20
    other = table(run("sample", "seeded", seed=1) / "samples")
    assert [row["responses"] for row in other] != [row["responses"] for row in found]


def test_samples_end_where_the_model_ends_them(home: Path) -> None:
    tok, ends = toys.tokenizer(), 0
    for row in table(run("sample", "ends", sample__temperature=3.0, sample__n=8) / "samples"):
        assert len(row["responses"]) == 8
        for ids, text, finished in zip(
            row["responses"], row["texts"], row["finished"], strict=True
        ):
            assert 1 <= len(ids) <= 6 and finished == (ids[-1] == 2)
            assert 2 not in ids[:-1] and (finished or len(ids) == 6)
            assert text == tok.decode(ids, skip_special_tokens=True)
            ends += finished
    assert ends


def test_the_likeliest_token_alone_is_a_greedy_search(home: Path) -> None:
    student = model("student")
    found = table(run("sample", "greedy", sample__top_k=1, sample__n=1) / "samples")
    for row in found[:5]:
        ids = toys.tokenizer()(row["prompt"])["input_ids"]
        for token in row["responses"][0]:
            assert int(student(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_noise_samples_from_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -torch.inf, -1.0])
    count = 8000
    noise = sample.Noise([3, 4], count // 2, torch.device("cpu"))
    scores = noise(torch.zeros(count, 1), logits.expand(count, -1))
    counts = scores.argmax(-1).bincount(minlength=5).double()
    want = logits.softmax(-1).double() * count
    assert counts[3] == 0
    assert ((counts - want)[want > 0] ** 2 / want[want > 0]).sum() < 16.3  # chi2, 3: p = 0.001


def test_the_teacher_may_answer_chats(home: Path) -> None:
    tok = toys.tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{{ '<s> ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}w7 {% endif %}"
    )
    for name in ("talker", "chatty"):
        model("teacher").save_pretrained(name)
        tok.save_pretrained(name)
    changes = {"student": "chatty", "teacher": "talker", "sample__model": "teacher"}
    found = table(run("sample", "chat", sample__chat=True, **changes) / "samples")
    assert found[0]["prompt"] == [{"content": "w0 w1", "role": "user"}]
    scored = table(run("score", "chat", score__calibration="nway", **changes) / "scored")
    ids = tok("<s> w0 w1 w7")["input_ids"]
    want = logprobs(model("teacher"), ids, found[0]["responses"][0]).mean().item()
    assert scored[0]["teacher_logprob"][0] == pytest.approx(want, abs=1e-5)


def test_prompts_without_room_are_dropped(home: Path) -> None:
    long = {"prompt": " ".join(["w1"] * toys.CONTEXT)}
    toys.write_rows(Path("long.jsonl"), [{"prompt": "w1"}, long, {"prompt": "w2"}])
    changes = {"sample__prompts": "long.jsonl", "sample__overlong": "drop"}
    found = table(run("sample", "dropped", **changes) / "samples")
    assert [row["prompt"] for row in found] == ["w1", "w2"]
    assert found[1]["sample_seed"] == sample.seed_of(0, 2)


def test_all_of_a_models_ends_count(home: Path) -> None:
    student = model("student")
    student.generation_config.eos_token_id = [2, *range(100, 200)]
    student.generation_config.repetition_penalty = 9.0  # not asked for: not used
    student.save_pretrained("ending")
    toys.tokenizer().save_pretrained("ending")
    found = table(run("sample", "ending-run", student="ending") / "samples")
    flat = [ids for row in found for ids in row["responses"]]
    last = {ids[-1] for ids in flat}
    assert last & {*range(100, 200)}
    assert not any(100 <= each < 200 for ids in flat for each in ids[:-1])
    first = [row["responses"][0][0] for row in table(run("sample", "usual") / "samples")]
    assert [row["responses"][0][0] for row in found] == first


def test_rows_in_every_format(home: Path) -> None:
    want = toys.pairs(4)
    data = rows.datasets.Dataset.from_list(want)
    data.save_to_disk("on-disk")
    Path("several").mkdir()
    data.select(range(3)).to_parquet("several/a.parquet")
    toys.write_rows(Path("several/b.jsonl"), want[3:])
    data.to_parquet("one.parquet")
    toys.write_rows(Path("one.jsonl"), want)
    for path in ("on-disk", "several", "one.parquet", "one.jsonl"):
        assert table(Path(path)) == want
    rows.datasets.DatasetDict(train=data).save_to_disk("splits")
    with pytest.raises(ValueError, match="rows: expected"):
        rows.read("rows", "splits")


def test_large_files_are_known_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WHOLE", 1000)
    monkeypatch.setattr(rows, "PIECE", 10)
    data = bytearray(range(250)) * 8
    seen = set()
    for place in (None, 0, len(data) - 1):
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        (tmp_path / "file").write_bytes(changed)
        seen.add(rows.fingerprint(tmp_path / "file"))
    (tmp_path / "file").write_bytes(data + b"x")
    seen.add(rows.fingerprint(tmp_path))
    assert len(seen) == 4


# score.


def test_rewards_are_the_teachers_log_probs(home: Path) -> None:
    out = run("sample", "plain")
    run("score", "plain", score__calibration="none", score__alpha=0.0)
    teacher, tok = model("teacher"), toys.tokenizer()
    for row in table(out / "scored")[::5]:
        ids = tok(row["prompt"])["input_ids"]
        want = [logprobs(teacher, ids, each).mean().item() for each in row["responses"]]
        assert row["teacher_logprob"] == pytest.approx(want, abs=1e-5)
        assert row["rewards"] == row["teacher_logprob"]
        assert "option_probability" not in row


def letters(teacher: Any, request: str, texts: list[str]) -> list[float]:
    """Probability of each option's letter after a question, densely."""
    tok = toys.tokenizer()
    text = questions.question(request, texts) + "\n\nAnswer:"
    logits = teacher(torch.tensor([tok(text)["input_ids"]])).logits[0, -1]
    ids = [tok.convert_tokens_to_ids(letter) for letter in "ABCD"[: len(texts)]]
    return logits.softmax(-1)[ids].tolist()


@pytest.mark.parametrize("calibration", ["nway", "pairwise"])
def test_calibration_asks_the_teacher(calibration: str, home: Path) -> None:
    out = run("sample", f"asked-{calibration}")
    run("score", out.name, score__calibration=calibration, score__alpha=0.25)
    teacher = model("teacher")
    for row in table(out / "scored")[::5]:
        ask = row["prompt"], row["texts"]
        if calibration == "nway":
            want = letters(teacher, *ask)
        else:
            total = [0.0] * 3
            for i, j in ((0, 1), (0, 2), (1, 2)):
                pair = letters(teacher, row["prompt"], [row["texts"][i], row["texts"][j]])
                total[i] += pair[0] / 2
                total[j] += pair[1] / 2
            want = total
        assert row["option_probability"] == pytest.approx(want, rel=1e-4)
        for reward, mean, p in zip(row["rewards"], row["teacher_logprob"], want, strict=True):
            floored = torch.tensor(max(p, 1e-8)).log().item()
            assert reward == pytest.approx(0.25 * mean + 0.75 * floored, abs=1e-4)


def test_letters_with_and_without_a_space() -> None:
    class Decoder:
        texts = ("A", "x", " A", "B", "  A", " a", "AB", " B", "A ")

        def __len__(self) -> int:
            return len(self.texts)

        def batch_decode(self, ids: list[list[int]]) -> list[str]:
            return [self.texts[i] for (i,) in ids]

    assert questions.option_ids(Decoder(), 2) == [[0, 2], [3, 7]]
    with pytest.raises(ValueError, match="the letter 'C'"):
        questions.option_ids(Decoder(), 3)
