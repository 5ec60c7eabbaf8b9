"""YAML that anybody may have written, read as plain data whose places in the text are known.

Aliases, which can make a small text endless, and keys that are there twice are refused. How large a
text may be is for the caller to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from heimdall_onnx.common.text import shown

# How PyYAML fails on tags of its own that fit no value.
_UNFIT = (AttributeError, TypeError, LookupError, OverflowError)


class PlainLoader(yaml.SafeLoader):
    """Plain data only, each key once, no aliases, and numbers as JSON and YAML 1.2 write them."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose the next node, which must be no alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="found an alias (*name), expected what it stands for",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping, whose keys must be texts, each there once."""
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in mapping:
                problem = "is there twice" if isinstance(key, str) else "is no text"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown(repr(key))} {problem}",
                    problem_mark=key_node.start_mark,
                )
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


# YAML 1.1 takes 1e-5, without a dot, for text.
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse(content: bytes) -> tuple[Any, yaml.Node | None]:
    """Read one document.

    Returns:
        Its data, and the node that `line_of` finds lines by; None and None if there is nothing.

    Raises:
        ValueError: If it is no YAML of plain data; says in words what is wrong, and where.
    """
    loader = None
    try:
        loader = PlainLoader(content)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except (yaml.YAMLError, ValueError, RecursionError, *_UNFIT) as error:
        raise ValueError(yaml_problem(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def yaml_problem(error: Exception) -> str:
    """What is wrong with text that `PlainLoader` could not read, with its line and column."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = ", ".join(filter(None, (error.context, error.problem)))
        return f"line {mark.line + 1}, column {mark.column + 1}: {shown(said)}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return shown(str(error) or type(error).__name__)


def line_of(node: yaml.Node, path: Sequence[str | int]) -> int:
    """The line, from 1, of what is at ``path``, or of the innermost thing that is there."""
    mark = node.start_mark
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == part), None)
            if pair is None:
                break
            mark, node = pair[0].start_mark, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            mark = node.start_mark
    return int(mark.line) + 1


def place_of(path: Sequence[str | int]) -> str:
    """What is at ``path``, in words, e.g. ``outputs[1].unit``."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{shown(str(part))}" for part in path
    ).removeprefix(".")
