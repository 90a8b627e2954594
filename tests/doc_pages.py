"""Pages of the documentation: their blocks, which run as they stand, and their links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pad_kernels.cli import main

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\((?!http|#)([^)#]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what it says on which line of which page."""

    language: str
    text: str
    page: str
    line: int

    def run(self, namespace: dict[str, Any]) -> None:
        """Run Python in a namespace, or each `pad-kernels` command of a shell block.

        A block that begins with a file's name in a comment is saved under it first.
        """
        if self.language == "sh":
            for command in self.text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(command)
                assert program == "pad-kernels"
                assert main(arguments) == 0, command
            return
        assert self.language == "python", f"{self.page}:{self.line} has a block that cannot run"
        if name := re.match(r"# (\w+\.py)\n", self.text):
            Path(name[1]).write_text(self.text)
        # Tracebacks name the page's lines.
        exec(compile("\n" * self.line + self.text, self.page, "exec"), namespace)


class Page:
    """A page by its path from the project's root."""

    def __init__(self, path: str) -> None:
        self.path = ROOT / path
        self.text = self.path.read_text()
        self.blocks = [
            Block(found[1], found[2], path, self.text[: found.start()].count("\n") + 1)
            for found in _FENCE.finditer(self.text)
        ]

    @property
    def python(self) -> list[str]:
        """The text of the Python blocks."""
        return [block.text for block in self.blocks if block.language == "python"]

    @property
    def links(self) -> list[str]:
        """Where its links to files lead, from the page's folder."""
        return sorted(set(_LINK.findall(self.text)))

    def broken_links(self) -> list[str]:
        """Those that lead nowhere."""
        return [link for link in self.links if not (self.path.parent / link).exists()]

    def run(self) -> dict[str, Any]:
        """Run all blocks in order, in the working directory; returns their namespace."""
        namespace: dict[str, Any] = {}
        for block in self.blocks:
            block.run(namespace)
        return namespace

    def sections(self) -> dict[str, list[Block]]:
        """Blocks by the heading (##) they stand under; "" is what comes before the first."""
        found: dict[str, list[Block]] = {"": []}
        headings = [
            (self.text[: each.start()].count("\n") + 1, each[1])
            for each in re.finditer(r"^## (.*)$", self.text, re.M)
        ]
        for block in self.blocks:
            above = [name for line, name in headings if line < block.line]
            found.setdefault(above[-1] if above else "", []).append(block)
        return found
