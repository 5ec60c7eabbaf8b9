"""The report of a fleet: its table, what it puts first, and where it is stored."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from heimdall_onnx.cli.main import main
from heimdall_onnx.common.errors import DataError, NotebookError
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.release.fleet import report as fleet_report
from heimdall_onnx.release.fleet.item import ItemOutcome
from heimdall_onnx.release.fleet.plan import FleetItem, FleetPlan
from heimdall_onnx.release.fleet.plots import pareto
from heimdall_onnx.release.fleet.report import (
    CSV,
    PARQUET,
    PLAN,
    outcomes_frame,
    read_outcomes,
    store_report,
)
from heimdall_onnx.release.fleet.run import FleetResult
from heimdall_onnx.release.fleet.tables import (
    cost_of,
    every_item,
    facts,
    failures,
    outliers,
    outliers_table,
    ranked,
    ranking,
)


def released(number: int, error_m: float, ms: float = 2.0) -> ItemOutcome:
    uri = f"s3://models/net-{number}/v1"
    result = {"verdict": "pass", "s3_uri": f"{uri}/model.onnx", "gates": []}
    metrics = {"displacement_p99_m": error_m, "inference_time_onnx_ms": ms}
    metrics["onnx_file_size_bytes"] = 1e6
    return ItemOutcome(
        number,
        f"{number}: net-{number}.pt",
        f"/runs/net-{number}.pt",
        "ab" * 32,
        "released",
        0,
        host="node1",
        processors=(number % 2,),
        seconds=10.0 + number,
        result={**result, "report_html_uri": f"{uri}/report.html"},
        metrics=metrics,
    )


def failed(number: int) -> ItemOutcome:
    gates = [
        {"name": "opset", "passed": True},
        {"name": "batch independence", "passed": False},
    ]
    return ItemOutcome(
        number,
        f"{number}: bad|one.pt",
        "/runs/bad.pt",
        "cd" * 32,
        "failed",
        3,
        error="1 of 2 gates failed:\n  - batch independence: expected ≤ 1, measured 7",
        result={"gates": gates},
    )


@pytest.fixture
def outcomes():
    # Nine alike, of which one is better, and one that stands out.
    errors = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 1.0, 1.05, 40.0]
    return [*(released(n, e, ms=5 - 0.1 * n) for n, e in enumerate(errors, 1)), failed(11)]


@pytest.fixture
def frame(outcomes):
    return outcomes_frame(outcomes)


def test_table_has_a_row_for_each_item_in_the_order_of_the_plan(outcomes):
    frame = outcomes_frame(outcomes[::-1])
    assert frame.number.tolist() == list(range(1, 12))
    assert frame.loc[10, "failed_gates"] == "batch independence"
    assert np.isnan(frame.loc[10, "displacement_p99_m"])
    assert frame.loc[0, "s3_uri"] == "s3://models/net-1/v1/model.onnx"


def test_what_differs_between_items_is_a_column(outcomes):
    made = [ReleaseParameters(threads=1 + n % 2, model_kwargs={"width": 8}) for n in range(10)]
    items = [FleetItem(n, "/runs/a.pt", p, None) for n, p in enumerate(made, 1)]
    frame = outcomes_frame(outcomes, items)
    given = [name for name in frame.columns if name.startswith("parameter_")]
    assert given == ["parameter_threads"]
    assert frame.parameter_threads.tolist()[:2] == ["1", "2"]


def test_what_somebody_must_see_is_first(frame):
    found = facts(frame, 12.0, 2)
    assert found["items"] == "11: 10 released, 0 kept, 1 failed"
    assert found["failed"] == "1 at a gate or in the notebook"
    assert found["stands out"].startswith("10: net-10.pt")
    assert found["best"].startswith("6: net-6.pt")
    assert found["best"].endswith("(p99 of the displacement by the export 0.8 m)")
    without = facts(frame.tail(1), 12.0, 2)
    assert (without["stands out"], "best" in without) == ("none", False)


def test_smoke_runs_are_called_so(outcomes):
    for one in outcomes[3:6]:
        one.result["verdict"] = "pass (smoke)"
    frame = outcomes_frame(outcomes)
    found = facts(frame, 12.0, 2)
    assert found["items"].endswith("1 failed, 3 of them smoke runs, which are no evidence")
    assert found["best"].startswith("6 (smoke): net-6.pt")
    assert "| 6 (smoke): net-6.pt |" in ranking(frame).data
    assert "| 1: net-1.pt |" in every_item(frame).data
    done, column, words = ranked(frame)
    chart = pareto(done.head(1), column, words, *cost_of(done))
    assert chart.title == "One model beats the others in both: 6 (smoke): net-6.pt"


def test_failures_come_with_what_was_measured(frame):
    text = failures(frame).data
    assert "1 of 2 gates failed: batch independence: expected ≤ 1, measured 7" in text
    assert "bad&#124;one.pt" in text
    assert "net-1.pt" not in text
    assert failures(frame.head(3)).data == "No item failed."


def test_of_many_failures_the_rest_is_counted():
    text = failures(outcomes_frame([failed(n) for n in range(1, 1003)])).data
    assert text.endswith("\n\nand 2 more, which are in the stored table.")


def test_an_item_leads_to_its_report_in_the_same_bucket(frame):
    linked = every_item(frame, "models").data
    assert "[1: net-1.pt](../../../net-1/v1/report.html)" in linked
    # It has none, and its name must not make one.
    assert "| 11: bad&#124;one.pt |" in linked
    for other in ("", "mod", "elsewhere"):
        assert "](" not in every_item(frame, other).data
    frame.loc[0, "report_html_uri"] = "s3://models/a b)](javascript:x)/report.html"
    assert (
        "(../../../a%20b%29%5D%28javascript%3Ax%29/report.html)" in every_item(frame, "models").data
    )


def test_what_stands_out_is_first(frame):
    found = outliers(frame)
    assert found.iloc[0].label == "10: net-10.pt"
    assert found.iloc[0].figure == "displacement_p99_m"
    assert "10: net-10.pt" in outliers_table(frame).data
    assert outliers_table(frame.head(2)).data == "No item stands out in any figure."


def test_an_item_stands_out_once_with_its_farthest_figure(frame):
    frame["a_mae"] = [*([1e-8] * 9), 1e-7, np.nan]
    lines = outliers_table(frame).data.splitlines()
    # The others are equal to the last bit, and it is still the one that stands out.
    assert len(lines) == 3
    assert "10: net-10.pt" in lines[2]


def test_ranking_is_by_the_error_and_names_the_cost(frame):
    done, column, words = ranked(frame)
    assert (column, done.label[0]) == ("displacement_p99_m", "6: net-6.pt")
    assert "metre" in words or words.endswith("m")
    assert cost_of(done)[0] == "inference_time_onnx_ms"
    assert ranking(frame).data.splitlines()[2].startswith("| 1 | 6: net-6.pt |")
    without = frame.drop(columns="inference_time_onnx_ms")
    assert cost_of(without)[0] == "onnx_file_size_bytes"


def test_items_without_figures_are_not_ranked(outcomes):
    frame = outcomes_frame(outcomes[-1:])
    assert ranking(frame).data == "No released item has a figure to be ranked by."
    assert pareto(*ranked(frame), *cost_of(frame)) is None


def test_pareto_shows_what_no_other_beats(frame):
    done, column, words = ranked(frame)
    chart = pareto(done, column, words, *cost_of(done))
    # 10 is the fastest, 9, 8 and 6 each the best of those that are as fast.
    assert chart.title == "4 of 10 models are beaten by no other in both"
    assert "6: net-6.pt" in chart.alt
    assert "5: net-5.pt" not in chart.alt
    assert len(chart.to_png()) < 200_000


def test_pareto_tells_what_is_exact_and_what_is_close(frame):
    done, _, words = ranked(frame)
    # An error of zero is the best there is, and no reason to leave a model out.
    done["displacement_p99_m"] = [0.0, *(1000.0 + n for n in range(9))]
    chart = pareto(done, "displacement_p99_m", words, *cost_of(done))
    assert " of 10 models" in chart.title
    done["displacement_p99_m"] = [5_200_000.0 + 20_000 * n for n in range(10)]
    chart = pareto(done, "displacement_p99_m", words, *cost_of(done))
    chart.to_png()
    (axes,) = chart.figure.axes
    assert axes.get_ylabel().endswith(", km")
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(ticks)) == len(ticks)


def test_every_item_is_there_with_its_place(frame):
    assert len(every_item(frame).data.splitlines()) == 2 + 11
    assert "node1, processors 1, load 0.00" in every_item(frame).data
    # Nobody knows any more where it was measured.
    frame.loc[0, "host"] = ""
    assert "| not noted |" in every_item(frame).data


@pytest.mark.parametrize("content", [b"no parquet", None])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "outcomes.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="expected the outcomes of a fleet at"):
        read_outcomes(path)


def test_another_table_is_refused(tmp_path):
    pd.DataFrame({"number": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"it lacks .*checkpoint"):
        read_outcomes(tmp_path / "other.parquet")


def test_a_report_that_can_not_be_made_says_where_its_table_is(outcomes, tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell("raise ValueError('no such figure')")]
    broken = tmp_path / "broken.ipynb"
    language = {"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=language), broken)
    monkeypatch.setattr(fleet_report, "notebook_path", lambda name: broken)
    plan = FleetPlan("july", (), json.dumps({"name": "july"}))
    result = FleetResult("july", tuple(outcomes), 12.0, 2)
    with pytest.raises(NotebookError, match=r"no such figure; its table is .*/outcomes\.csv"):
        store_report(SimpleNamespace(name="models"), plan, result, tmp_path)


@pytest.mark.services
def test_report_is_stored_beside_plan_and_table(outcomes, s3, bucket, tmp_path):
    plan = FleetPlan("july", (), json.dumps({"name": "july"}))
    outcomes[5].result["verdict"] = "pass (smoke)"
    result = FleetResult("july", tuple(outcomes), 12.0, 2)
    stored = store_report(bucket, plan, result, tmp_path)
    names = {key.rpartition("/")[2] for key in bucket.list_keys("fleets/july/")}
    assert names == {PLAN, CSV, PARQUET, "report.ipynb", "report.html"}
    assert stored.report_html_uri == f"{stored.folder_uri}/report.html"
    page = stored.local_report.read_text()
    for text in (
        "✘ FAIL",
        "fleet july (smoke)",
        "6 (smoke): net-6.pt",
        "batch independence",
        "What failed, and why?",
    ):
        assert text in page
    executed = nbformat.read(stored.local_report.with_suffix(".ipynb"), 4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1
    table = read_outcomes(Path(stored.local_report).with_name(PARQUET))
    assert len(table) == len(outcomes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either PLAN.yml or --checkpoints"),
        (("--checkpoints", "x.pt", "--workers", "1", "--scheduler", "tls://h:1"), "--workers is"),
        (("--checkpoints", "none/*.pt"), "none/\\*.pt|no file"),
    ],
)
def test_bad_usage_is_answered_before_anything_starts(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["fleet", *arguments])
    assert result.exit_code == 2, result.output
    assert re.search(words, result.output), result.output
    assert not (tmp_path / ".heimdall").exists()


def test_whoever_stores_a_report_needs_no_pytorch():
    code = "import sys, heimdall_onnx.release.fleet.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
