"""The page of an executed notebook: what comes first, what is folded, who can read it."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
import records
from browser import DESKTOP, NARROW, chromium, violations, visit
from bs4 import BeautifulSoup
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
    new_raw_cell,
)
from PIL import Image

from heimdall_onnx.common.verdict import Gate, Verdict
from heimdall_onnx.report.page import put_verdict_first
from heimdall_onnx.report.rendering import arrange, render_html

GATE = {"name": "mean absolute error", "limit": "≤ 1e-05", "measured": 1e-7, "detail": ""}
WIDE = "| " + " | ".join(f"a quite long heading {n}" for n in range(20)) + " |\n|" + "---|" * 20
LONG = "value = " + " + ".join(f"something_{n}" for n in range(40))


def png(width: int = 400, height: int = 300) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def shown(data: dict[str, str], **metadata: object) -> nbformat.NotebookNode:
    return new_output("execute_result", data=data, metadata=metadata, execution_count=1)


def figure(alt: str | None = "the median is 3 ms") -> nbformat.NotebookNode:
    described = {"image/png": {"alt": alt}} if alt else {}
    return shown({"image/png": png(), "text/plain": "Chart()"}, **described)


def code(
    source: str, *outputs: nbformat.NotebookNode, tags: tuple[str, ...] = (), **more: object
) -> nbformat.NotebookNode:
    metadata = {"tags": list(tags)} if tags else {}
    return new_code_cell(
        source, outputs=list(outputs), metadata=metadata, **{"execution_count": 1, **more}
    )


ERROR = new_output(
    "error",
    ename="KeyError",
    evalue="'weights'",
    traceback=["\x1b[38;5;28mif\x1b[39m <b>"],
)
CELLS = (
    new_markdown_cell("# A notebook\n\nWhat it is about."),
    code("import this", id="imports"),
    code("table", shown({"text/markdown": f"{WIDE}\n| {'x | ' * 20}"}), tags=("details",)),
    new_markdown_cell("## 1. Section\n\nIts prose.", id="section"),
    code(LONG, shown({"text/plain": "3"})),
    new_markdown_cell("### Does it agree?\n\nPoints on the line agree.", id="question"),
    code("plot()", figure(), id="scatter"),
    new_markdown_cell("### Do the members agree?\n\nOf an ensemble.", id="members"),
    code("plot_members()", tags=("optional",)),
    new_markdown_cell("### What is computed?\n\nSomething.", id="computed"),
    code("only = computed"),
)


def write(
    folder: Path, *cells: nbformat.NotebookNode, verdict: dict | None = None, **metadata: object
) -> Path:
    path = folder / "report.ipynb"
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)
    if verdict is not None:
        put_verdict_first(path, **verdict)
    return path


def gates(*, passed: bool) -> Verdict:
    return Verdict((Gate(**{**GATE, "passed": passed}),), "quick")


PASSED = {
    "passed": True,
    "gates": gates(passed=True),
    "title": "v20261120_143000",
    "sentences": ("It is faithful.", "It is faster.", "It is made of this."),
    "facts": {"model": "net", "address": "s3://bucket/" + "x" * 90},
}
FAILED = {
    **PASSED,
    "passed": False,
    "gates": None,
    "problem": "code cell 3 raised KeyError:\n  - no weights",
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory) -> Path:
    return render_html(write(tmp_path_factory.mktemp("passed"), *CELLS, verdict=PASSED), "net v1")


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> Path:
    mark = new_markdown_cell(
        '<span style="color:red">An Exception was encountered</span>',
        metadata={"tags": ["papermill-error-cell-tag"]},
    )
    cells = (mark, *CELLS[:3], code("load()", ERROR, id="load"), code("x", execution_count=None))
    return render_html(write(tmp_path_factory.mktemp("failed"), *cells, verdict=FAILED), "net")


def soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(), "html.parser")


def test_verdict_sentences_gates_and_facts_come_before_the_notebook(passed):
    words = soup(passed).get_text(" ")
    order = ("✔ PASS", "It is faithful.", "It is made of this.", "mean absolute error", "s3://")
    places = [words.index(text) for text in (*order, "What it is about.")]
    assert places == sorted(places)


def test_contents_name_every_section_and_lead_there(passed):
    page = soup(passed)
    links = {a.get_text(): a["href"] for a in page.nav.find_all("a")}
    assert [*links] == [
        *("Verdict", "A notebook", "1. Section", "Does it agree?", "What is computed?")
    ]
    ids = [tag["id"] for tag in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in links.values()} <= set(ids)


def test_prose_before_a_figure_is_its_caption_and_stands_there_once(passed):
    page = soup(passed)
    (found,) = page.find_all("figure")
    assert found.figcaption.get_text(strip=True) == "Points on the line agree."
    assert found.img["alt"] == "the median is 3 ms"
    assert (found.img["width"], found.img["height"]) == ("400", "300")
    assert page.get_text().count("Points on the line agree.") == 1
    assert page.find(string="Its prose.")


def test_figure_without_words_of_its_own_is_named_after_its_cell(tmp_path):
    page = soup(render_html(write(tmp_path, code("b", figure(None), id="b")), "t"))
    assert page.img["alt"] == "Figure of the cell b"


def test_words_of_a_figure_are_inert(tmp_path):
    page = soup(render_html(write(tmp_path, code("b", figure('a "<b>" \' onerror=x'))), "t"))
    assert page.img["alt"] == 'a "<b>" \' onerror=x'
    assert set(page.img.attrs) == {"alt", "src", "width", "height"}


def test_code_and_details_are_folded(passed):
    page = soup(passed)
    folded = [d.summary.get_text() for d in page.main.find_all("details")]
    assert "Code: imports" in folded
    assert "Details: A notebook" in folded
    assert not page.find_all("details", open=True)
    assert not page.main.find(string="3").find_parent("details")


def test_questions_that_did_not_arise_are_left_out_and_named(passed):
    page = soup(passed)
    assert page.find(id="members") is None
    assert "Do the members agree?" in page.find(id="left-out").find_next("p").get_text()
    assert page.find(id="computed")


def test_question_whose_cell_never_ran_is_not_said_not_to_arise(tmp_path):
    cells = (
        new_markdown_cell("### Why?\n\nBecause."),
        code("x", tags=("optional",), execution_count=None),
        new_markdown_cell("### Raw?"),
        new_raw_cell("raw"),
    )
    assert arrange(new_notebook(cells=list(cells)))["left_out"] == []


def test_failed_run_says_first_what_went_wrong_and_folds_the_traceback(failed):
    page = soup(failed)
    words = page.get_text(" ")
    assert words.index("no weights") < words.index("It is faithful.")
    assert page.header.find("a", href="#load")
    traceback = page.find("pre", attrs={"aria-label": "Traceback"})
    assert traceback.find_parent("details")
    # The colours of a terminal can't be read on every ground.
    assert traceback.get_text(strip=True) == "if <b>"
    assert traceback.find(True) is None
    assert "An Exception was encountered" not in words


def test_verdict_of_a_failed_run_tells_the_same_in_the_notebook(failed):
    first = nbformat.read(failed.with_suffix(".ipynb"), 4).cells[0].source
    assert first.startswith("# ✘ FAIL — v20261120_143000\n\n**What went wrong**\n\n> code cell 3")


def test_widgets_are_shown_as_the_picture_that_they_carry(tmp_path):
    view = "application/vnd.jupyter.widget-view+json"
    output = shown({view: {"model_id": "m"}, "image/png": png(), "text/plain": "Widget()"})
    state = {"application/vnd.jupyter.widget-state+json": {"state": {"m": {}}}}
    html = render_html(write(tmp_path, code("explore()", output), widgets=state), "t").read_text()
    assert "widget" not in html.lower().partition("<body")[2].replace("explore", "")
    assert "<img" in html
    assert "<script" not in html


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "[a](http://evil)", "a | b\n# c", "`x` ![i](u)"]
)
def test_words_of_the_verdict_are_inert(tmp_path, text):
    verdict = {"passed": False, "title": text, "facts": {text: text}, "sentences": [text]}
    verdict["problem"] = text
    page = soup(render_html(write(tmp_path, *CELLS[:1], verdict=verdict), text))
    assert page.header.find(["script", "a", "img", "code"]) is None
    assert page.title.get_text() == text
    assert page.header.get_text().count(text) == 5


def test_who_decided_stands_at_the_head_as_inert_text(tmp_path):
    text = "<b>bold</b> [a](http://evil)"
    decided = records.move(by=text, note=f"looked at, {text}")
    page = soup(render_html(write(tmp_path, *CELLS, verdict=PASSED), "t", [decided]))
    found = page.find(class_="decisions").get_text()
    assert found.strip() == (
        f"Promoted as production by {text} on 2026-11-20 14:30 UTC: looked at, {text}"
    )
    words = page.get_text(" ")
    assert words.index("PASS") < words.index("Promoted as") < words.index("It is faithful.")


def test_gates_that_fail_come_first_and_say_so_in_words(tmp_path):
    verdict = {**FAILED, "gates": gates(passed=False)}
    page = soup(render_html(write(tmp_path, code("judge()"), verdict=verdict), "t"))
    (row,) = page.find(class_="gates").tbody.find_all("tr")
    assert row.get_text(" ", strip=True).startswith("mean absolute error FAIL")


def test_notebook_of_an_older_format_is_rendered(tmp_path):
    path = write(tmp_path, *CELLS)
    notebook = nbformat.read(path, 4)
    notebook.nbformat_minor = 4
    for cell in notebook.cells:
        del cell["id"]
    nbformat.write(notebook, path)
    assert soup(render_html(path, "t")).h2.get_text() == "A notebook"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.mark.parametrize("which", ["passed", "failed"])
def test_axe_finds_nothing_wrong_folded_or_open_in_any_style(which, request, browser):
    page_file = request.getfixturevalue(which)
    for scheme, (width, height) in (("light", DESKTOP), ("dark", NARROW)):
        size = {"width": width, "height": height}
        # axe is a script, which the page itself forbids.
        context = browser.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(page_file.as_uri())
        assert violations(page) == [], (scheme, width)
        page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
        assert violations(page) == [], (scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        context.close()


def test_page_needs_no_network_and_no_script(passed, browser):
    hosts, console, document = visit(browser, passed.as_uri())
    assert (hosts, console) == (set(), [])
    assert not re.search(r"<script|https?://", document)


def test_print_shows_details_and_leaves_the_code_out(passed, browser):
    page = browser.new_page()
    page.goto(passed.as_uri())
    page.emulate_media(media="print")
    assert page.get_by_text("a quite long heading 19").is_visible()
    assert not page.get_by_text("import this").is_visible()
    assert not page.get_by_role("navigation").is_visible()


def test_print_breaks_long_words_and_leaves_no_heading_alone(passed, browser):
    page = browser.new_page()
    page.goto(passed.as_uri())
    page.emulate_media(media="print")
    # What stands between a heading and its figure would let them part.
    assert not any(cell.is_visible() for cell in page.locator(".silent").all())
    style = "e => [getComputedStyle(e).breakAfter, getComputedStyle(e).overflowWrap]"
    assert page.locator("main h2").first.evaluate(style)[0] == "avoid"
    assert page.locator("summary").first.evaluate(style)[0] == "avoid"
    assert page.locator("td:last-child").first.evaluate(style)[1] == "anywhere"


def test_contents_stand_beside_a_wide_page_and_are_folded_on_a_narrow_one(passed, browser):
    for (width, height), visible in ((DESKTOP, True), (NARROW, False)):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(passed.as_uri())
        assert page.get_by_role("link", name="1. Section").is_visible() == visible


def test_keyboard_reaches_the_content_first(passed, browser):
    page = browser.new_page()
    page.goto(passed.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#content"


def test_browser_checks_see_requests_and_errors(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text('<script src="http://cdn.test/x.js"></script><script>nope()</script>')
    hosts, console, _ = visit(browser, page.as_uri())
    assert "cdn.test" in hosts
    assert any("nope is not defined" in line for line in console)
