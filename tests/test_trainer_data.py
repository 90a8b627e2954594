"""Rows to token ids in every format, and one clear error for each that is not one."""

# ruff: noqa: E402 - what these need is only there where transformers is

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
datasets = pytest.importorskip("datasets")

from trainer_toys import tokenizer

from pad_kernels.integrations.transformers.collate import Collator, first_rows
from pad_kernels.integrations.transformers.data import Format, encode

PAIRS = Format(("chosen", "rejected"))
GROUPS = Format(many="responses", at_least=2, scores="rewards")
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' else '' }}{{ m['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<s> {% endif %}"
)
# The words w0, w1, ... have the ids 3, 4, ...; <s> is 1 and </s> is 2.


def said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def run(rows: Any, format: Format = PAIRS, **options: Any) -> Any:
    tok = options.pop("tokenizer", None) or tokenizer()
    return encode(rows, format, tok, limit=options.pop("limit", 64), **options)


def test_plain_strings() -> None:
    rows = [{"prompt": "w0 w1", "chosen": "w2", "rejected": "w3 w4 </s>", "other": 1}]
    (found,) = run(datasets.Dataset.from_list(rows))
    assert found == {
        "prompt_ids": [3, 4],
        "response_ids": [[5, 2], [6, 7, 2]],  # each ends once
        "length": 9,
        "first_cache_row": 0,
    }


def test_ids_are_taken_as_they_are() -> None:
    (found,) = run([{"prompt": [9, 8], "chosen": [7], "rejected": "w0"}])
    assert found["response_ids"] == [[7], [3, 2]]
    assert found["prompt_ids"] == [9, 8]


def test_conversations_go_through_the_template() -> None:
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s> {{ m['content'] }} w9 "
        "{% else %}{{ m['content'] }} </s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    answers = {"chosen": said("", "w2")[1:], "rejected": said("", "w3 w4")[1:]}
    (found,) = run([{"prompt": said("w0"), **answers}], tokenizer=tok)
    assert found["prompt_ids"] == [1, 3, 12]
    assert found["response_ids"] == [[5, 2], [6, 7, 2]]
    # The same where chosen and rejected begin with the prompt.
    whole = {name: said("w0") + answer for name, answer in answers.items()}
    (again,) = run([whole], tokenizer=tok)
    assert again == found


def test_a_prompt_that_the_tokenizer_ends_is_opened_again() -> None:
    class Ending:
        """A tokenizer that puts an end behind every text."""

        eos_token, eos_token_id = "</s>", 2

        def __init__(self) -> None:
            self.inner = tokenizer()

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = self.inner(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [*ids, 2] if add_special_tokens else ids}

        def __len__(self) -> int:
            return 300

    (found,) = run([{"prompt": "w0", "chosen": "w1", "rejected": "w2"}], tokenizer=Ending())
    assert found["prompt_ids"] == [3]
    assert found["response_ids"] == [[4, 2], [5, 2]]


def test_groups_and_their_rewards() -> None:
    rows = [
        {"prompt": "w0", "responses": ["w1", "w2 w3"], "rewards": [1, -0.5]},
        {"prompt": "w0", "responses": ["w1", "w2", "w3"], "rewards": [0.0, 1.0, 2.0]},
    ]
    first, second = run(rows, GROUPS)
    assert first["rewards"] == [1.0, -0.5]
    assert second["response_ids"] == [[4, 2], [5, 2], [6, 2]]
    assert (first["first_cache_row"], second["first_cache_row"]) == (0, 2)


def test_overlong_rows_are_dropped_if_asked(caplog: Any) -> None:
    rows = [{"prompt": [5] * 3, "chosen": [6] * n, "rejected": [6]} for n in (2, 9, 7)]
    found = run(rows, limit=10, overlong="drop")
    assert [len(row["response_ids"][0]) for row in found] == [2, 7]
    assert found["first_cache_row"] == [0, 2]
    assert "1 of 3 rows are left out, longer than 10 tokens" in caplog.text


def test_several_processes() -> None:
    rows = [{"prompt": f"w{i}", "chosen": "w1", "rejected": "w2 w3"} for i in range(5)]
    assert list(run(rows, num_proc=2)) == list(run(rows))
    rows[4]["chosen"] = ""
    with pytest.raises(ValueError, match="column 'chosen', row 4: expected a text or ids"):
        run(rows, num_proc=2)


def test_responses_of_the_row_before() -> None:
    format = Format(("completion",), flag="label", unrelated=True)
    rows = [{"prompt": [i], "completion": [i + 10] * (i + 1), "label": i == 1} for i in (0, 1, 2)]
    found = run(rows, format, limit=4)
    assert found["unrelated_ids"] == [[12, 12, 12], [10], [11, 11]]
    assert found["label"] == [False, True, False]
    tight = run(rows[::-1], format, limit=4)  # what does not fit behind the prompt is left out
    assert tight["unrelated_ids"] == [[10], [12, 12, 12], [11, 11]]
    with pytest.raises(ValueError, match="at least two rows"):
        run(rows[:1], format)


GOOD = {"prompt": "w0", "chosen": "w1", "rejected": "w2"}
SCORED = {"prompt": "w0", "responses": ["w1", "w2"], "rewards": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (PAIRS, {"chosen": ""}, "column 'chosen', row 1: expected a text or ids, not empty"),
        (PAIRS, {"chosen": None}, "column 'chosen', row 1: expected a text or ids"),
        (PAIRS, {"prompt": ""}, "column 'prompt', row 1: expected a text, a conversation or ids"),
        (PAIRS, {"rejected": "w3 " * 70}, "column 'rejected', row 1: expected at most 64 tokens"),
        (GROUPS, {"responses": ["w1"]}, "column 'responses', row 1: expected a list of at least 2"),
        (GROUPS, {"responses": ["w1", ""]}, "column 'responses', row 1: expected a text or ids"),
        (GROUPS, {"rewards": [0.0]}, "column 'rewards', row 1: expected 2 numbers, one for each"),
        (GROUPS, {"rewards": [0.0, float("nan")]}, "row 1: expected a finite number, got nan"),
    ],
)
def test_a_bad_row_is_named(format: Format, row: dict[str, Any], message: str) -> None:
    good = SCORED if format is GROUPS else GOOD
    with pytest.raises(ValueError, match=message):
        run([good, {**good, **row}], format)


@pytest.mark.parametrize(
    ("rows", "format", "message"),
    [
        ([{"prompt": "w0", "chosen": "w1"}], PAIRS, "a column 'rejected', got columns"),
        ([], PAIRS, "train_dataset: expected at least one row"),
        ([{"chosen": "w1", "rejected": "w2"}], PAIRS, "begins with the prompt"),
        ([{**GOOD, "prompt": [400]}], PAIRS, "column 'prompt', row 0: expected ids from 0 to 299"),
        ([{**GOOD, "chosen": said("w0")}], PAIRS, "row 0: expected a text or ids"),
        ([{**GOOD, "prompt": said("w0")}], PAIRS, "a tokenizer with a chat_template"),
        (
            [{"prompt": "w0", "completion": "w1", "label": 1}],
            Format(("completion",), flag="label"),
            "column 'label', row 0: expected True or False, got 1",
        ),
    ],
)
def test_bad_data_sets(rows: list[Any], format: Format, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(rows, format)


def test_a_conversation_must_wait_for_an_answer() -> None:
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    answer = said("", "w1")[1:]
    row = {"prompt": said("w0", "w1"), "chosen": answer, "rejected": answer}
    with pytest.raises(ValueError, match="row 0: expected a conversation that the user ends"):
        run([row], tokenizer=tok)


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tok = tokenizer()
    tok.chat_template = "{{ messages | length }} w{{ messages | length }}"
    answer = said("", "w1")[1:]
    with pytest.raises(ValueError, match="a chat template that only adds to the prompt"):
        run([{"prompt": said("w0"), "chosen": answer, "rejected": answer}], tokenizer=tok)


def test_streams_are_refused() -> None:
    with pytest.raises(TypeError, match="not a stream"):
        run(datasets.Dataset.from_list([GOOD]).to_iterable_dataset())


# Batches.


def rows() -> list[dict[str, Any]]:
    return list(
        run(
            [
                {"prompt": [5, 6], "chosen": [7, 8, 9], "rejected": [10]},
                {"prompt": [11], "chosen": [12], "rejected": [13, 14]},
            ]
        )
    )


def test_a_padded_batch() -> None:
    batch = Collator(0)(rows())
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9],
        [5, 6, 10, 0, 0],
        [11, 12, 0, 0, 0],
        [11, 13, 14, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 2, 3]
    assert batch["positions"].tolist() == [1, 2, 3, 6, 10, 15, 16]
    flat = batch["input_ids"].flatten()
    assert torch.equal(flat[batch["positions"] + 1], batch["targets"])
    assert batch["offsets"].tolist() == [0, 3, 4, 5, 7]
    assert batch["second"].int().tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert batch["counts"].tolist() == [2, 4, 3]
    assert batch["cache_rows"] == [0, 1, 2, 3]


def test_a_packed_batch_has_the_same_tokens() -> None:
    padded, packed = Collator(0)(rows()), Collator(0, padding_free=True)(rows())
    assert packed["input_ids"].shape == (1, 13)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2]]
    flat = packed["input_ids"].flatten()
    assert torch.equal(flat[packed["positions"] + 1], packed["targets"])
    for name in ("targets", "offsets", "second", "counts"):
        assert torch.equal(padded[name], packed[name])


def test_a_batch_of_unequal_groups() -> None:
    many = [
        {"prompt": [5], "responses": [[6], [7, 8], [9]], "rewards": [0.5, 1.0, 2.0]},
        {"prompt": [5], "responses": [[6, 7], [8]], "rewards": [3.0, 4.0]},
    ]
    batch = Collator(0, grouped=True)(list(run(many, GROUPS)))
    assert batch["valid"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["offsets"].tolist() == [0, 1, 3, 4, 6, 7, 7]
    assert batch["rewards"].tolist() == [[0.5, 1.0, 2.0], [3.0, 4.0, 0.0]]
    assert batch["counts"].tolist() == [2, 7, 0]


def test_what_a_teacher_is_asked_about() -> None:
    format = Format(("chosen",), many="responses", taught_from=1)
    own = [
        {"prompt": [5, 6], "chosen": [7], "responses": [[8, 9], [10]]},
        {"prompt": [5], "chosen": [7, 8], "responses": [[9]]},
    ]
    batch = Collator(0, taught_from=1)(list(run(own, format)))
    assert batch["taught"]["input_ids"].tolist() == [[5, 6, 8, 9], [5, 6, 10, 0], [5, 9, 0, 0]]
    assert torch.equal(batch["taught"]["targets"], batch["targets"][batch["second"]])
    assert batch["taught"]["cache_rows"] == [0, 1, 2]


@pytest.mark.parametrize("taught_from", [0, 1])
def test_the_first_rows_of_a_batch(taught_from: int) -> None:
    """All but the models' inputs are those of a batch of these rows alone."""
    format = Format(("chosen",), many="responses", taught_from=taught_from, flag="good")
    data = [
        {"prompt": [5, 6], "chosen": [7], "responses": [[8, 9], [10]], "good": True},
        {"prompt": [5], "chosen": [7, 8], "responses": [[9]], "good": False},
        {"prompt": [5], "chosen": [7], "responses": [[9, 9], [9]], "good": True},
    ]
    encoded, collator = list(run(data, format)), Collator(0, taught_from=taught_from)
    cut, alone = first_rows(collator(encoded), 2), collator(encoded[:2])
    names = ["targets", "offsets", "second", "counts", "valid", "good"]
    assert all(torch.equal(cut[name], alone[name]) for name in names)
    flat = cut["input_ids"].flatten()
    assert torch.equal(flat[cut["positions"] + 1], alone["targets"])
    assert cut["cache_rows"] == alone["cache_rows"]
    if taught_from:
        cut, alone = cut["taught"], alone["taught"]
        assert torch.equal(cut["targets"], alone["targets"])
        assert torch.equal(cut["input_ids"].flatten()[cut["positions"] + 1], alone["targets"])
        assert cut["cache_rows"] == alone["cache_rows"]


def test_the_first_rows_of_a_batch_with_unrelated_responses() -> None:
    format = Format(("completion",), flag="label", unrelated=True)
    data = [{"prompt": [i + 3], "completion": [9] * (i + 1), "label": True} for i in range(3)]
    encoded, collator = list(run(data, format)), Collator(0)
    cut, alone = first_rows(collator(encoded), 1)["unrelated"], collator(encoded[:1])["unrelated"]
    assert torch.equal(cut["targets"], alone["targets"])
    assert torch.equal(cut["offsets"], alone["offsets"])
