import inspect
import re

import pytest

from heimdall_onnx.common import errors
from heimdall_onnx.common.errors import HeimdallError, InputError, error_class

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, HeimdallError)
}


def drawn_tree() -> dict[str, tuple[str | None, str | None, int | None]]:
    """Class name to (parent, built-in base, exit code) as the module's docstring draws them."""
    drawing = errors.__doc__.split("```")[1]
    tree, path = {}, {}
    for line in drawing.strip().splitlines():
        indent, name, builtin, code = re.match(
            r"([│├└─ ]*)(\w+)(?: \((\w+)\))?(?:\s+exit (\d))?", line
        ).groups()
        depth = len(indent) // 4
        path[depth] = name
        tree[name] = (path.get(depth - 1) if depth else None, builtin, int(code) if code else None)
    return tree


def test_drawn_tree_equals_the_classes():
    drawn = drawn_tree()
    assert set(drawn) == set(CLASSES)
    for name, (parent, builtin, code) in drawn.items():
        bases = [base.__name__ for base in CLASSES[name].__bases__]
        assert bases == [b for b in (parent or "Exception", builtin) if b], name
        if code is not None:
            assert CLASSES[name].exit_code == code


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_exit_code_is_that_of_the_branch(name):
    drawn = drawn_tree()
    branch = name
    while drawn[branch][2] is None:
        branch = drawn[branch][0]
    assert CLASSES[name].exit_code == drawn[branch][2]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_found_by_its_name_and_documented(name):
    assert error_class(name) is CLASSES[name]
    assert CLASSES[name].__doc__


@pytest.mark.parametrize("name", ["ValueError", "annotations", "error_class", "", "__doc__"])
def test_other_names_are_no_error_class(name):
    assert error_class(name) is None


def test_bad_input_is_caught_as_value_error():
    with pytest.raises(ValueError, match="too large"):
        raise InputError("too large")
