"""What the pages say, taken apart: code blocks, shell lines, links, inline code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_WORDS = re.compile(r"[|;&<>()]+")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match.group(1), match.group(2))


def prose(page: Path) -> str:
    return re.sub(r"^```\w*\n.*?^```", "", page.read_text(), flags=re.M | re.S)


def shell_lines(block: Block) -> Iterator[str]:
    """Lines to be typed, without here-documents: after `$ ` where output is shown too, else all."""
    text = re.sub(r"(<<\s*'?(\w+)'?[^\n]*\n).*?^\2$", r"\1", block.text, flags=re.M | re.S)
    lines = text.replace("\\\n", " ").splitlines()
    typed = [line[2:] for line in lines if line.startswith("$ ")]
    if block.language in ("", "sh", "bash", "console"):
        yield from typed or lines


def calls(line: str) -> Iterator[list[str]]:
    """Each call of `sublet` in a shell line, as its words: `[]` for no words."""
    line = re.sub(r"<[a-z' ]+>", "X", line).replace('"$(', "( ").replace(')"', " )")
    reader = shlex.shlex(line.replace("$(", "( "), posix=True, punctuation_chars=";|&()<>")
    reader.whitespace_split = True
    words: list[str] | None = None
    is_start = True
    for token in reader:
        if SHELL_WORDS.fullmatch(token):
            if words is not None:
                yield words
            words, is_start = None, not set(token) <= {"<", ">"}
        elif words is not None:
            words.append(token)
        elif is_start and re.fullmatch(r"\w+=.*", token, re.S):
            continue
        elif is_start and token.rpartition("/")[2] == "sublet":
            words = []
        else:
            is_start = False
    if words is not None:
        yield words


def links(page: Path) -> Iterator[str]:
    for match in re.finditer(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        yield match.group(1)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made for the web."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


def spans(page: Path) -> Iterator[str]:
    yield from re.findall(r"`([^`\n]+)`", prose(page))
