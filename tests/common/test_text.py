import pytest

from heimdall_onnx.common.text import apart, listed, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("body.0.weight", "body.0.weight"),
        ("Größe μ", "Größe μ"),
        ("two\n  lines", "two lines"),
        ("\x1b[2J\x00", "\\x1b[2J\\x00"),
        ("\u202e\ud800", "\\u202e\\ud800"),
        ("x" * 300, "x" * 199 + "…"),
        ("\x00" * 200, "\\x00" * 49 + "\\x0…"),
        ((1, "a"), "(1, 'a')"),
    ],
)
def test_text_is_shown_on_one_visible_line(value, text):
    assert shown(value) == text
    assert len(shown(value)) <= 200


@pytest.mark.parametrize(
    ("one", "other", "texts"),
    [
        (0.1, 0.25, ("0.1", "0.25")),
        (-114.17880249, -114.17881012, ("-114.1788", "-114.17881")),
        (1.0, 1.0 + 2**-52, ("1", "1.0000000000000002")),
        (2.0, 2.0, ("2", "2")),
        (float("nan"), float("nan"), ("nan", "nan")),
    ],
)
def test_values_that_differ_do_not_read_alike(one, other, texts):
    assert apart(one, other) == texts


def test_integer_of_more_digits_than_python_prints_is_shown_by_its_type():
    assert shown(16**5000).startswith("<int")
    assert shown([16**5000]).strip("[").startswith("<")


def test_small_value_that_is_endless_when_written_out_is_abbreviated():
    nested = ()
    for _ in range(500):
        nested = (nested, nested)
    assert "..." in shown(nested)


def test_problems_are_listed_up_to_a_thousand():
    assert listed(["a", "b"]) == "\n  - a\n  - b"
    assert listed(["x"] * 1234).endswith("\n  - x\n  - and 234 more")
    assert listed(["x"] * 1234).count("\n") == 1001
