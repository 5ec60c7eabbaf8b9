"""Anybody's YAML is plain data whose lines are known, or is refused in words."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_onnx.common.yaml import line_of, parse, place_of

TEXT = b"""\
inputs:
  - name: x
    range: [-1e0, 1]
  - name: y
    # a comment
    masks:
      - x
empty:
"""


def test_plain_data_and_where_it_stands():
    data, node = parse(TEXT)
    assert data == {
        "inputs": [{"name": "x", "range": [-1.0, 1]}, {"name": "y", "masks": ["x"]}],
        "empty": None,
    }
    for path, line in {
        (): 1,
        ("inputs",): 1,
        ("inputs", 0): 2,
        ("inputs", 0, "range", 1): 3,
        ("inputs", 1): 4,
        ("inputs", 1, "masks"): 6,
        ("inputs", 1, "masks", 0): 7,
        ("empty",): 8,
        # What is not there stands where the innermost thing around it does.
        ("inputs", 1, "unit"): 4,
        ("empty", "unit"): 8,
        ("outputs",): 1,
    }.items():
        assert line_of(node, path) == line, path


def test_places_in_words():
    assert place_of(["outputs", 1, "unit"]) == "outputs[1].unit"
    assert place_of([0, "a"]) == "[0].a"
    assert place_of([]) == ""
    assert "\n" not in place_of(["a\nb"])


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"---\n"])
def test_nothing_is_none(text):
    data, node = parse(text)
    assert data is None
    assert node is None or line_of(node, ["a"]) == text.count(b"\n") + 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E3", -2000.0),
        ("1.5e+3", 1500.0),
        ("10", 10),
        ("true", True),
        ("e5", "e5"),
        ("'1e5'", "1e5"),
    ],
)
def test_numbers_are_those_of_json(text, value):
    found = parse(f"a: {text}".encode())[0]["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe\x00", "truncated data"),
        ("a: [", "line 1, column 5"),
        ("a: &a [x]\nb: *a", "line 2, column 4: found an alias"),
        ("a: &a\n  b: *a", "line 2, column 6: found an alias"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!int foo", "invalid literal"),
        ("a: !!timestamp foo", "'NoneType'"),
        ("a: !!bool foo", "'foo'"),
        ("a: !!int '-'", "index out of range"),
        ("a: !!float 1:" + "1:" * 500 + "1", "int too large"),
        ("<<: {a: 1}", "could not determine a constructor"),
        ("? [a]\n: b", "line 1, column 3: the key ['a'] is no text"),
        ("1: b", "the key 1 is no text"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: the key 'c' is there twice"),
        ("a: 1\n---\nb: 1", "line 2, column 1: expected a single document"),
        ("9" * 5_000, "Exceeds the limit"),
        ("[" * 3_000, "it is nested too deeply"),
        ("a: \x1b[31m", "special characters are not allowed"),
        ('"\\e[31m": 1\n"\\e[31m": 2', "line 2, column 1: the key"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_anything_else_is_refused_in_words_and_soon(text, words):
    started = time.perf_counter()
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        parse(text if isinstance(text, bytes) else text.encode())
    said = str(raised.value)
    assert words in said
    assert said.isprintable()
    assert len(said) < 300
    assert time.perf_counter() - started < 10


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_brings_anything_but_data_or_a_value_error(data):
    content = bytearray(TEXT)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        _, node = parse(bytes(content))
    except ValueError:
        return
    if node is not None:
        assert 1 <= line_of(node, ["inputs", "name"]) <= len(content) + 1
