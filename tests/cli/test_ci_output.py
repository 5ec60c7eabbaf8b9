"""What continuous integration shows of a release: read back by what reads it there."""

from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from heimdall_onnx.cli.ci_output import junit, markdown
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.release.result import ReleaseResult

PASSED = Gate.at_most("mean absolute error", 1e-5, 2.5e-8, "positions, batch 2").to_dict()
FAILED = Gate.at_most("batch independence", 1, float("nan"), "spread beside <zeros> & co").to_dict()


def result(*gates, **changes):
    held = all(gate["passed"] for gate in gates)
    given = {
        "success": held,
        "exit_code": 0 if held else 3,
        "verdict": "pass" if held else "fail",
        "version": "v20261120_143000",
        "s3_uri": "s3://models/net/v20261120_143000/model.onnx",
        "model_name": "net",
        "model_version": "7",
        "alias": "staging",
        "speedup": 2.345,
        "gates": list(gates),
        "costs": [{"step": "export", "seconds": 1.25}, {"step": "parity", "seconds": 2}],
        "error": None if held else "1 of 2 gates failed:\n  - batch independence",
    }
    return ReleaseResult(**{**given, **changes})


def suite_of(found):
    return ElementTree.fromstring(junit(found))


def test_every_gate_is_a_test_case_with_its_limit_and_value():
    suite = suite_of(result(PASSED, FAILED))
    counts = {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "time")}
    assert counts == {"name": "net", "tests": "3", "failures": "1", "errors": "0", "time": "3.250"}
    held, missed, release = suite.findall("testcase")
    assert (held.get("name"), held.find("failure")) == ("mean absolute error", None)
    assert "expected ≤ 1e-05, measured 2.5e-08" in held.findtext("system-out")
    assert missed.find("failure").get("message").startswith("batch independence: expected ≤ 1, ")
    assert missed.findtext("failure") == "spread beside <zeros> & co"
    # The run failed because of its gate, and for no other reason.
    assert release.find("error") is None
    assert "model: s3://models/net/v20261120_143000/model.onnx" in release.findtext("system-out")


def test_release_is_green_only_if_it_is_one():
    assert suite_of(result(PASSED)).find(".//error") is None
    lost = result(PASSED, success=False, exit_code=4, error="the store\ncan't be reached")
    suite = suite_of(lost)
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")
    (error,) = suite.findall(".//error")
    assert error.get("message") == "the store"
    assert error.text == "the store\ncan't be reached"
    # A run that came to no gate is not one without a fault.
    assert suite_of(result(success=False, exit_code=2, error="no file")).get("errors") == "1"


def test_what_xml_has_no_form_for_is_replaced():
    hostile = result(success=False, exit_code=2, error="a\x00b\x1b[31m\ud800 ]]> <x>&amp;")
    assert suite_of(hostile).findtext(".//error") == "a�b�[31m� ]]> <x>&amp;"


def test_summary_puts_first_what_does_not_hold():
    text = markdown(result(PASSED, FAILED))
    lines = text.splitlines()
    assert lines[0] == "## ✘ net: FAIL"
    assert lines[2].startswith("> 1 of 2 gates failed")
    assert text.index("batch independence | **FAIL**") < text.index("mean absolute error | pass")
    assert "| speedup | 2.35× (PyTorch over ONNX Runtime) |" in text
    assert markdown(result(PASSED)).startswith("## ✔ net: PASS\n")
    refused = markdown(result(success=False, exit_code=2, error="no file"))
    assert refused.startswith("## ✘ net: NOT JUDGED, exit code 2\n\n> no file")


def test_summary_holds_names_and_messages_as_inert_text():
    text = markdown(
        result(
            {**FAILED, "detail": "a | b\n# <img src=x> http://x.example"},
            model_name="<script>",
            error="| # [x](http://x.example) <b>",
        )
    )
    assert "<script>" not in text
    assert "<img" not in text
    assert "http://" not in text
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 1


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_files_are_written_where_nothing_could_be_released(tmp_path, options):
    xml, md = tmp_path / "gates.xml", tmp_path / "summary.md"
    command = ["release", "none.ckpt", "-p", "tolerance", "-1", *options]
    done = CliRunner().invoke(main, [*command, "--junit", str(xml), "--summary", str(md)])
    assert done.exit_code == 2
    assert "tolerance" in ElementTree.fromstring(xml.read_bytes()).findtext(".//error")
    assert "NOT JUDGED, exit code 2" in md.read_text()


def test_file_that_can_not_be_written_changes_no_exit_code(tmp_path):
    (tmp_path / "file").write_text("")
    command = ["release", "none.ckpt", "-p", "tolerance", "-1"]
    done = CliRunner().invoke(main, [*command, "--junit", str(tmp_path / "file" / "x.xml")])
    assert done.exit_code == 2
    assert "warning: " in done.output
    assert "can't be written" in done.output
