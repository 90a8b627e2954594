"""PAD's multiple-choice questions: which of these responses is best, and how sure is the teacher?

The probability of a response is that of its letter, full vocabulary, summed over the entries that
decode to it. In a single question all n responses stand (as in the paper, arXiv 2502.14272);
pairwise each two of them do, the earlier one as A, and a response's probability is the mean over
its n - 1 questions (as in the released code, which looks at a sampler's top 20 tokens only and adds
1e-8 twice).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def option_ids(tokenizer: Any, count: int) -> list[list[int]]:
    """For each of the first letters, the vocabulary's entries that decode to it.

    A leading space may be there.

    Raises:
        ValueError: no entry decodes to a letter.
    """
    vocabulary = range(len(tokenizer)) if count else ()
    found: dict[str, list[int]] = {letter: [] for letter in LETTERS[:count]}
    for index, text in enumerate(tokenizer.batch_decode([[i] for i in vocabulary])):
        letter = text[1:] if text[:1] == " " else text
        if letter in found:
            found[letter].append(index)
    for letter, ids in found.items():
        if not ids:
            raise ValueError(
                f"score.calibration: expected a teacher whose vocabulary has the letter {letter!r} "
                "as an entry, to answer with; got one without"
            )
    return list(found.values())


def shown(calibration: str, n: int) -> list[tuple[int, ...]]:
    """Which of n responses each question shows, in the order of their letters."""
    if calibration == "pairwise":
        return list(combinations(range(n), 2))
    return [tuple(range(n))]


def question(request: str, responses: list[str]) -> str:
    """The text of a question."""
    options = "\n\n".join(
        f"Response {letter}:\n{text}" for letter, text in zip(LETTERS, responses, strict=False)
    )
    letters = ", ".join(LETTERS[: len(responses)])
    return (
        f"Here is a request and {len(responses)} responses to it.\n\nRequest:\n{request}\n\n"
        f"{options}\n\nWhich response is the best? Answer with its letter alone ({letters})."
    )


def prompt(text: str, tokenizer: Any, *, talk: bool) -> Any:
    """What the teacher is asked: a message, or a text that its answer follows."""
    if talk and tokenizer.chat_template:
        return [{"role": "user", "content": text}]
    return f"{text}\n\nAnswer:"


def plain(value: Any, tokenizer: Any) -> str:
    """A prompt or a response as text: ids are decoded, of a conversation all messages are given."""
    if isinstance(value, str):
        return value
    if isinstance(value[0], int):
        return str(tokenizer.decode(value, skip_special_tokens=True))
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in value)
