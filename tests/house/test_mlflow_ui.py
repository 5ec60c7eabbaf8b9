"""What MLflow's own pages show of two releases, as somebody sees them in Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import mlflow
import numpy as np
import pytest
from browser import DESKTOP, chromium
from packaging.version import Version
from playwright.sync_api import Locator, Page, expect
from releases import Inputs, changed_notebook, make_small_inputs, smoke

from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.evidence.metrics import run_metrics
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.review.compare.gates import Limits
from heimdall_onnx.review.promotion import promote_release
from heimdall_onnx.services import embedded as services
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.settings import Settings

pytestmark = [
    pytest.mark.services,
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(mlflow.__version__) < Version("3.17"), reason="older pages are laid out differently"
    ),
]

HOSTILE = "<img src=x> | **[it](https://evil.example)** `code` ![a](b)"
NAME, BUCKET = "test-model", "test-mlflow-ui"
# MLflow's pages come in parts, and the machine may be busy.
expect.set_options(timeout=20_000)


@dataclass(frozen=True)
class Shown:
    """A release, and where MLflow shows it."""

    address: str
    inputs: Inputs
    result: ReleaseResult

    @property
    def run(self) -> str:
        return f"{self.address}/#/experiments/1/runs/{self.result.run_id}"


@pytest.fixture(scope="module")
def settings(make_settings) -> Iterator[Settings]:
    settings = make_settings("mlflow-ui")
    yield settings
    services.services_down(settings)


@pytest.fixture(scope="module")
def shown(settings, tmp_path_factory) -> Shown:
    inputs = make_small_inputs(tmp_path_factory.mktemp("mlflow-ui"))
    with np.load(inputs.eval_data) as arrays:
        named = dict(arrays) | {"meta": json.dumps({"provenance": HOSTILE})}
    np.savez(inputs.eval_data, **named)
    notebook = changed_notebook(tmp_path_factory.mktemp("changed"), figure="parity-scatter")
    quick = smoke(inputs, BUCKET)
    result = release_checkpoint(quick, settings, notebook=notebook)
    assert result.error is None
    connection = connect(settings)
    promote_release(
        Release.at(connection, str(result.manifest_uri).removesuffix("/manifest.json")),
        alias="production",
        reviewer=HOSTILE,
        note=HOSTILE,
        limits=Limits(allow_smoke=True),
        compare=False,
    )
    # As of a next version, whose release would take as long again.
    again = connection.tracker.create_run("release of version 2")
    connection.tracker.log_metrics(run_metrics({"positions_mae": 1e-7}), 2, run_id=again)
    _, server = services.services_up(settings)
    return Shown(str(server.address), inputs, result)


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    width, height = DESKTOP
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": height})
        # Its assistant would take a third of the page.
        for key, value in (("panelOpen_v1", "false"), ("fab.autoOpenedOnFirstLoad_v1", "true")):
            page.context.add_init_script(
                f"localStorage.setItem('mlflow.assistant.{key}', '{value}')"
            )
        yield page


@pytest.fixture
def page(browser_page) -> Page:
    # What follows differs from what was shown only behind the address's hash.
    browser_page.goto("about:blank")
    return browser_page


def is_loaded(image: Locator) -> bool:
    image.wait_for()
    return image.evaluate("async image => { await image.decode(); return image.naturalWidth > 0 }")


def test_a_version_says_what_was_measured_and_leads_to_its_report(page, shown):
    page.goto(f"{shown.address}/#/models/{NAME}/versions/1")
    expect(page.get_by_text("PASS (SMOKE), ")).to_contain_text("a test run, not evidence")
    expect(page.get_by_role("row", name=re.compile(r"^parity of positions"))).to_be_visible()
    for row, address in (
        ("model", shown.result.s3_uri),
        ("notebook", shown.result.report_uri),
        ("manifest", shown.result.manifest_uri),
        ("evaluation data", hash_file(shown.inputs.eval_data)),
        ("checkpoint", hash_file(shown.inputs.checkpoint)),
    ):
        line = page.get_by_role("row", name=re.compile(rf"^{row}\s"))
        expect(line.get_by_text(str(address), exact=True)).to_be_visible()
    report = page.get_by_role("row", name=re.compile(r"^report\s"))
    with page.context.expect_page() as opened:
        report.get_by_role("link", name="open").click()
    frame = opened.value.frame_locator("iframe.mlflow-html-iframe")
    expect(frame.get_by_role("heading", name=re.compile("PASS"))).to_be_visible()
    # A page in a page, under its own policy and that of the frame.
    assert is_loaded(frame.locator("img").first)
    opened.value.close()


def test_what_comes_from_outside_is_text_on_the_page(page, shown):
    page.goto(f"{shown.address}/#/models/{NAME}/versions/1")
    data = page.get_by_role("row", name=re.compile("^evaluation data"))
    expect(data).to_contain_text(HOSTILE)
    review = page.get_by_role("listitem").filter(has_text="promoted to production by")
    expect(review).to_contain_text(f"{HOSTILE}: {HOSTILE}")
    for found in (data, review):
        assert found.locator("img, a, em").count() == 0
        assert found.locator("strong").all_inner_texts() in ([], ["production"])


def test_a_model_lists_how_its_versions_did(page, shown):
    page.goto(f"{shown.address}/#/models/{NAME}")
    begins = f"PASS (SMOKE), {len(shown.result.gates)} gates held"
    expect(page.get_by_role("row").filter(has_text="Version 1")).to_contain_text(begins)


def test_a_run_names_its_evaluation_data(page, shown):
    page.goto(shown.run)
    digest = hash_file(shown.inputs.eval_data)
    named = page.get_by_text(re.compile(rf"eval\.npz \({digest[:36]}\)"))
    expect(named.first).to_be_visible()
    named.first.click()
    drawer = page.get_by_role("dialog")
    expect(drawer.get_by_text(f"objects/sha256/{digest}")).to_be_visible()
    expect(drawer.get_by_text("float32 (2, 8, 8)")).to_be_visible()
    expect(drawer.get_by_text("evaluation", exact=True).first).to_be_visible()
    expect(drawer.get_by_text("samples: 8")).to_be_visible()


def test_a_figure_is_shown_among_the_artifacts(page, shown):
    page.goto(f"{shown.run}/artifacts/figures/parity-scatter.png")
    assert is_loaded(page.get_by_role("img", name="figures/parity-scatter.png"))


def test_charts_of_both_versions_stand_under_one_name(page, shown):
    page.goto(f"{shown.address}/#/experiments/1/runs?compareRunsMode=CHART")
    page.get_by_placeholder("Search metric charts").fill("parity/positions_mae")
    charts = page.get_by_test_id("experiment-view-compare-runs-chart-area")
    expect(charts.get_by_text("parity/positions_mae_1e-6", exact=True)).to_be_visible()
    # A point for each version, at the version's number.
    expect(charts.locator(".scatterlayer .point").nth(1)).to_be_visible()
    ticks = charts.locator(".xtick")
    assert {"1", "2"} <= {tick.text_content() for tick in ticks.all()}
