"""The messages that docs/faq.md explains are the library's, and its links lead somewhere."""

from __future__ import annotations

import re

import pytest
from doc_pages import ROOT, Page

PAGE = Page("docs/faq.md")
MESSAGES = re.findall(r"^\| `(.*?)` \|", PAGE.text, re.M)
#: Of torch itself, about an op without a second derivative.
FOREIGN = ["no autograd formula was registered"]


@pytest.fixture(scope="module")
def sources() -> str:
    return "".join(path.read_text() for path in (ROOT / "pad_kernels").rglob("*.py"))


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_the_librarys(message: str, sources: str) -> None:
    # Where an argument fails, "expected " comes from the check and what follows from the caller.
    assert message in FOREIGN or message.removeprefix("expected ") in sources


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 20


def test_links_lead_somewhere() -> None:
    assert PAGE.links and not PAGE.broken_links()
