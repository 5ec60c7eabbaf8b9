"""The notebook in a real JupyterLab: samples are chosen with mouse and keyboard, and what is saved
needs no kernel."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import nbformat
import numpy as np
import papermill
import pytest
import servers
import torch
from browser import DESKTOP, NARROW, chromium
from models import SmallNet

from heimdall_onnx.common.text import distance, number
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.parity.tolerance import EVALUATION
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.report.explore.entry import NOTE, WIDGET_VIEW
from heimdall_onnx.report.judge import judge_notebook
from heimdall_onnx.report.notebook import notebook_path
from heimdall_onnx.report.rendering import render_html

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OUTLIER = 5
SAMPLES = 8  # all that the profile smoke looks at
_START_S, _RUN_S, _ANSWER_MS = 120, 300, 60_000
# Waits until nothing in an element has changed for a moment.
_QUIET = """element => new Promise(done => {
  const end = () => { watch.disconnect(); done(); };
  let timer = setTimeout(end, 400);
  const watch = new MutationObserver(() => { clearTimeout(timer); timer = setTimeout(end, 400); });
  watch.observe(element, { subtree: true, childList: true, attributes: true });
})"""


@dataclass(frozen=True)
class Lab:
    """A notebook that has run in JupyterLab, and what it ran on."""

    page: Page
    notebook: Path
    signal: np.ndarray
    onnx: Path
    requested: list[str]

    @property
    def widget(self) -> Locator:
        return self.page.locator(".heimdall-explore")

    def select(self, label: str, value: str) -> None:
        self.widget.get_by_label(label, exact=True).select_option(value)

    def says(self, text: str | re.Pattern[str]) -> None:
        self.widget.get_by_text(text).first.wait_for(timeout=_ANSWER_MS)

    def reset(self) -> None:
        """Show the evaluation data's positions, drawn to the end."""
        self.widget.get_by_label("Inputs", exact=True).scroll_into_view_if_needed()
        self.select("Output", "positions")
        self.select("Inputs", "zeros")
        self.says(re.compile("· zeros, batch"))
        self.select("Inputs", EVALUATION)
        self.says(re.compile(f"· {EVALUATION}, batch {SAMPLES}"))
        self.has_points(SAMPLES)

    def has_points(self, count: int) -> None:
        """So many samples of the evaluation data are drawn, in the order of the data."""
        from playwright.sync_api import expect

        expect(self.points).to_have_count(count, timeout=_ANSWER_MS)
        self.widget.evaluate(_QUIET)

    @property
    def points(self) -> Locator:
        return self.widget.locator(".scatterlayer .trace").first.locator(".point")

    def read_saved(self) -> nbformat.NotebookNode | None:
        """The notebook's file; None while it is being written."""
        try:
            return nbformat.read(self.notebook, 4)
        except nbformat.reader.NotJSONError:
            return None

    def answers(self, rows: np.ndarray) -> tuple[dict, dict]:
        """Both models' answers to a batch, run here."""
        model = SmallNet()
        batch = {"signal": rows}
        return (
            run_pytorch(model, batch, model.signature),
            run_onnx(open_session(self.onnx, spinning=False), batch, model.signature),
        )

    def has_shown(self, sample: int, rows: np.ndarray, place: int, kind: str, size: int) -> None:
        """Heading, both answers and the metres are those of the row ``place`` of a batch."""
        self.says(f"Sample {sample} · {kind}, batch {size}")
        pytorch, onnx = self.answers(rows)
        text = self.widget.inner_text()
        for side in (pytorch, onnx):
            for value in (*side["positions"][place], *side["spread"][place]):
                assert f"{float(value):.9g}" in text
        pair = (side["positions"][place : place + 1] for side in (onnx, pytorch))
        assert f"positions {distance(float(distance_m(*pair)[0]))} apart" in text
        picture = self.widget.get_by_role("img", name=re.compile(f"Inputs of sample {sample}"))
        values = rows[place]
        # The picture is drawn from these inputs: their shape and span stand in its description.
        said = f"from {number(float(values.min()), 3)} to {number(float(values.max()), 3)}"
        assert said in (picture.get_attribute("alt") or "")
        assert picture.evaluate("image => image.complete && image.naturalWidth > 100")


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """Address of the notebook in ``folder/files`` in a JupyterLab with nothing of the user's."""
    port, token = servers.free_port(), secrets.token_hex(16)
    own = {
        **{f"JUPYTER_{what}_DIR": folder / what.lower() for what in ("CONFIG", "DATA", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "HEIMDALL_HOME": folder / "home",
        # Kept out of the command line, which everyone can read.
        "JUPYTER_TOKEN": token,
    }
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        # Or a cell that is not in view is drawn when there is time for it.
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, chosen in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(chosen))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"),
                *("--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder / 'files'}"),
            ],
            env={**os.environ, **{name: str(value) for name, value in own.items()}},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + _START_S
        while not servers.answers(f"http://127.0.0.1:{port}/api?token={token}"):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail("JupyterLab did not start:\n" + (folder / "log").read_text())
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/release.ipynb?token={token}"
    finally:
        # It ends its kernels first.
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """The committed notebook on a small model, opened and run from top to bottom once."""
    pytest.importorskip("jupyterlab", reason="the extra lab is not installed")
    folder = tmp_path_factory.mktemp("lab")
    signal = np.random.default_rng(0).standard_normal((SAMPLES, 2, 8, 8)).astype(np.float32)
    signal[OUTLIER] *= 40
    np.savez(folder / "eval.npz", signal=signal)
    torch.save(SmallNet().state_dict(), folder / "model.pt")
    (folder / "files").mkdir()
    notebook = folder / "files" / "release.ipynb"
    papermill.execute_notebook(
        str(notebook_path()),
        str(notebook),
        prepare_only=True,
        parameters={
            "checkpoint": str(folder / "model.pt"),
            "model": "models:SmallNet",
            "eval_data": str(folder / "eval.npz"),
            "output_dir": str(folder / "run"),
            "profile": "smoke",
            "opset": 14,
            "measure_latency": False,
        },
    )
    written = nbformat.read(notebook, 4)
    end = f"from pathlib import Path\nPath({str(folder / 'ended')!r}).touch()"
    written.cells.append(nbformat.v4.new_code_cell(end))
    nbformat.write(written, notebook)
    with chromium() as browser, jupyter_lab(folder) as address:
        page = browser.new_page(viewport=dict(zip(("width", "height"), DESKTOP, strict=True)))
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        status = page.locator("#jp-main-statusbar")
        status.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=_START_S * 1000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        # Between two cells the kernel is idle, too, and a widget is answered beside them.
        deadline = time.monotonic() + _RUN_S
        while not (folder / "ended").exists():
            assert time.monotonic() < deadline, "the notebook has not come to its end"
            time.sleep(0.2)
        status.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=_RUN_S * 1000)
        page.locator(".heimdall-explore .point").first.wait_for(
            state="attached", timeout=_RUN_S * 1000
        )
        yield Lab(page, notebook, signal, folder / "run" / "model.onnx", requested)


def test_point_that_is_clicked_shows_its_sample(lab):
    lab.reset()
    lab.points.nth(OUTLIER).scroll_into_view_if_needed()
    lab.widget.evaluate(_QUIET)  # JupyterLab draws what comes into view, which moves the rest
    box = lab.points.nth(OUTLIER).bounding_box()
    lab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    lab.widget.locator(".hoverlayer").get_by_text(f"sample {OUTLIER}, ").wait_for(
        timeout=_ANSWER_MS
    )
    lab.page.mouse.down()
    lab.page.mouse.up()
    lab.has_shown(OUTLIER, lab.signal, OUTLIER, EVALUATION, 8)


def test_pointing_is_enough_where_it_is_asked_for(lab):
    lab.reset()
    lab.page.mouse.move(0, 0)
    pointing = lab.widget.get_by_label("choose by pointing")
    pointing.check()
    lab.points.nth(OUTLIER).scroll_into_view_if_needed()
    lab.points.nth(OUTLIER).hover(force=True)
    lab.has_shown(OUTLIER, lab.signal, OUTLIER, EVALUATION, 8)
    pointing.uncheck()


def test_sample_is_chosen_by_number_and_from_the_list_without_a_mouse(lab):
    lab.reset()
    number_ = lab.widget.get_by_label("Sample", exact=True)
    number_.fill("3")
    number_.press("Enter")
    lab.has_shown(3, lab.signal, 3, EVALUATION, 8)
    listed = lab.widget.get_by_label("Worst first")
    assert listed.locator("option").count() == SAMPLES
    samples = [int(text.split(":")[0]) for text in listed.locator("option").all_inner_texts()]
    assert sorted(samples) == list(range(SAMPLES))
    assert samples[0] == OUTLIER
    listed.focus()
    lab.page.keyboard.press("Home")
    lab.has_shown(OUTLIER, lab.signal, OUTLIER, EVALUATION, 8)
    lab.page.keyboard.press("ArrowDown")
    lab.has_shown(samples[1], lab.signal, samples[1], EVALUATION, 8)


def test_kind_of_input_and_batch_size_are_chosen(lab):
    lab.reset()
    lab.select("Inputs", "amplitude ×100")
    lab.select("Batch size", "3")
    lab.says("3 of 3 samples within the limits")
    number_ = lab.widget.get_by_label("Sample", exact=True)
    number_.fill("2")
    number_.press("Enter")
    lab.has_shown(2, lab.signal[:3] * np.float32(100), 2, "amplitude ×100", 3)


def test_errors_are_limited_with_the_keyboard(lab):
    lab.reset()
    listed = lab.widget.get_by_label("Worst first").locator("option")
    unequal = [text for text in listed.all_inner_texts() if "equal" not in text]
    assert 0 < len(unequal) < SAMPLES
    # From zero to the first step, which the smallest error reaches.
    lab.widget.get_by_role("slider", name="Error, × allowed, lowest").press("ArrowRight")
    lab.says(f"{len(unequal)} of {SAMPLES} samples within the limits")
    lab.has_points(len(unequal))
    assert listed.all_inner_texts() == unequal


def test_widget_fits_into_a_narrow_window(lab):
    lab.reset()
    page = lab.page
    try:
        page.set_viewport_size(dict(zip(("width", "height"), NARROW, strict=True)))
        page.keyboard.press("Control+b")  # the file browser
        page.wait_for_function(
            "() => { const plot = document.querySelector('.heimdall-explore .main-svg'); const box "
            "= document.querySelector('.heimdall-explore').getBoundingClientRect();"
            "return plot.getBoundingClientRect().right <= box.right + 1; }"
        )
    finally:
        page.keyboard.press("Control+b")
        page.set_viewport_size(dict(zip(("width", "height"), DESKTOP, strict=True)))


def test_widget_is_for_readers_without_mouse_or_sight_too(lab):
    from axe_playwright_python.sync_playwright import Axe

    lab.reset()
    found = Axe().run(lab.page, context=".heimdall-explore").response
    assert [rule["id"] for rule in found["violations"]] == []
    assert "aria-input-field-name" in {rule["id"] for rule in found["passes"]}


def test_nothing_leaves_the_machine(lab):
    assert {urlsplit(url).hostname for url in lab.requested if url.startswith("http")} == {
        "127.0.0.1"
    }
    bar = lab.widget.locator(".modebar-btn")
    titles = {bar.nth(i).get_attribute("data-title") for i in range(bar.count())}
    assert "Zoom" in titles
    assert not [title for title in titles if "hare" in title or "loud" in title]


def test_saved_notebook_has_the_picture_and_renders_without_a_widget(lab):
    lab.page.keyboard.press("Control+s")
    saved, deadline = lab.read_saved(), time.monotonic() + 30
    while not (saved and saved.cells[-1].outputs == [] and saved.cells[-1].execution_count):
        assert time.monotonic() < deadline, "not saved"
        time.sleep(0.2)
        saved = lab.read_saved()
    assert judge_notebook(lab.notebook).passed
    (cell,) = [cell for cell in saved.cells if cell.id == "explore"]
    picture, widget = cell.outputs
    assert set(picture.data) == {"image/png", "text/plain"}
    assert widget.data["text/plain"] == NOTE
    assert WIDGET_VIEW in widget.data
    assert "widgets" not in saved.metadata
    html = render_html(lab.notebook, "saved").read_text()
    assert picture.data["image/png"].replace("\n", "") in html.replace("\n", "")
    assert NOTE in html
    for trace in ("widget-view", "widget-state", "<script", "plotly"):
        assert trace not in html
