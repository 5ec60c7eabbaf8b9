"""Gates are all evaluated, and one that fails is enough."""

import math
from html import unescape

import pytest

from heimdall_onnx.common.errors import GateError
from heimdall_onnx.common.text import escape_markdown
from heimdall_onnx.common.verdict import Gate, Verdict

GOOD = Gate.at_most("good", 1.0, 0.5)
BAD = Gate.at_most("bad", 1e-5, 2e-5, "positions")


def test_value_at_its_limit_passes_and_beyond_fails():
    assert Gate.at_most("g", 1.0, 1.0).passed
    assert not Gate.at_most("g", 1.0, math.nextafter(1.0, 2.0)).passed


@pytest.mark.parametrize("measured", [1.0001e-5, 1.00000001e-5, 2e-5])
def test_what_is_beyond_a_limit_is_never_written_like_it(measured):
    gate = Gate.at_most("error", 1e-5, measured)
    assert float(gate.as_shown()["measured"]) > 1e-5
    assert f"measured {gate.as_shown()['measured']}" in gate.summary()


def test_nan_never_passes():
    assert not Gate.at_most("g", 1.0, math.nan).passed


def test_problems_fail_and_become_the_detail():
    assert Gate.none_of("g", []).passed
    failed = Gate.none_of("g", ["a", "b"])
    assert (failed.passed, failed.measured, failed.detail) == (False, 2, "a; b")


def test_no_gates_at_all_is_no_pass():
    assert not Verdict((), "quick").passed


def test_one_failed_gate_fails_the_verdict_and_every_failed_one_is_named():
    verdict = Verdict((GOOD, BAD, Gate("worse", "= 1", 2, False)), "quick")
    assert not verdict.passed
    with pytest.raises(GateError, match="2 of 3 gates failed") as caught:
        verdict.require()
    assert "bad: expected ≤ 1e-05, measured 2e-05 (positions)" in str(caught.value)
    assert "worse: expected = 1, measured 2" in str(caught.value)
    assert verdict.summary() == "2 of 3 gates failed: bad, worse"
    Verdict((GOOD,), "quick").require()


def test_json_has_no_nan():
    assert Gate.at_most("g", 1.0, math.nan).to_dict()["measured"] == "nan"
    assert Gate(**BAD.to_dict()) == BAD


def test_table_shows_failed_gates_first_and_keeps_its_columns():
    bars = Gate("bars", "≤ |x|", "[0, 1]", True, "a | b")
    rows = Verdict((GOOD, bars, BAD), "quick").to_markdown().splitlines()[2:]
    assert rows[0].startswith("| bad | **FAIL**")
    assert {row.count("|") for row in rows} == {6}


@pytest.mark.parametrize(
    "text",
    [
        *("<b>", "a|b", "`x`", "[a](b)", "# h", "*x*", "_x_", "~~x~~", "$x$", "a\n\nb"),
        *(
            "http://x",
            "HTTPS://x",
            "www.x.org",
            "a@x.org",
            "\u202egnp",
            "a\u200bb",
            "\x1b[31m",
            "\0",
        ),
    ],
)
def test_escaped_text_keeps_no_markup(text):
    escaped = escape_markdown(text)
    assert escaped != text
    assert not set("<>|`[]*~$@\n") & set(escaped)
    assert "://" not in escaped
    assert "www." not in escaped
    assert escaped.isprintable()


def test_escaped_text_reads_as_before():
    text = "v20261120_143000 a_b & <b> [x](http://y) _z_ $1 ~2 me@www.x.org"
    assert unescape(escape_markdown(text)) == text


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_measured_value_that_json_has_no_form_for_is_said_alike_when_it_is_read_again(text):
    stored, measured = (Gate("error", "≤ 1", value, False) for value in (text, float(text)))
    assert stored.summary() == measured.summary()
    assert stored.to_dict() == measured.to_dict()
