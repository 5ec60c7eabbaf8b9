"""What the project says of itself: its READMEs, their code blocks, headings and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", *sorted((ROOT / "heimdall_onnx").rglob("README.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block: its text, the heading that it stands below, and the file that both are in."""

    text: str
    heading: str
    file: Path


@cache
def blocks() -> tuple[Block, ...]:
    """Every fenced block of every README."""
    found, heading = [], ""
    for file in READMES:
        for match in re.finditer(
            r"^#+ ([^\n]+)$|^```\w*\n(.*?)^```$", file.read_text(), re.M | re.S
        ):
            heading = match[1] or heading
            if match[2]:
                found.append(Block(match[2], heading, file))
    return tuple(found)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """What a forge makes of a page's headings for links into it."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
