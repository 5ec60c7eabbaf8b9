"""The READMEs lead to one another, and name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import READMES, ROOT, anchors, prose

import heimdall_onnx

PAGES = (*READMES, ROOT / "SECURITY.md")
FILES = [
    path
    for folder in ("heimdall_onnx", "notebooks", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".ipynb", ".md", ".py", ".sh"}
]
PACKAGE = ROOT / "heimdall_onnx"
NAMES = {*heimdall_onnx.__all__, "__all__", "__file__"}
# A slip of the pen that is tested.
ELSEWHERE = {"heimdall_onnx.localisation"}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    return [link for link in found if not link.startswith("https://")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_readme_is_reached_from_the_first():
    seen: set[Path] = set()
    todo = [READMES[0]]
    while todo:
        page = todo.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            todo += [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
    assert seen >= set(PAGES)


def test_the_first_readme_is_short():
    assert len(READMES[0].read_text().splitlines()) <= 220


def is_there(dotted: str) -> bool:
    """Whether a module of that name is there, or a name in one."""
    place = ROOT
    for rest, word in enumerate(words := dotted.split("."), start=1):
        if (place / word).is_dir():
            place = place / word
        elif (module := place / f"{word}.py").is_file():
            return rest == len(words) or defines(module, words[rest])
        else:
            return word in NAMES if place == PACKAGE else defines(place / "__init__.py", word)
    return True


def defines(module: Path, word: str) -> bool:
    return re.search(rf"\b{word}\b", module.read_text()) is not None


def test_modules_that_are_named_are_there():
    wrong = {}
    for file in (*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml", *FILES):
        text = file.read_text()
        named = re.findall(r"\bheimdall_onnx(?:\.[A-Za-z_]\w*)+", text)
        for module, names in re.findall(r"from (heimdall_onnx[\w.]*) import (\w+(?:, \w+)*)", text):
            named += [f"{module}.{each}" for each in names.split(", ")]
        if missing := sorted({each for each in named if not is_there(each)} - ELSEWHERE):
            wrong[name(file)] = missing
    assert wrong == {}
