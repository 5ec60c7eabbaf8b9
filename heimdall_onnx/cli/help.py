"""Help that says what is taken where nothing is given, and ends with an example."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import click

from heimdall_onnx.common.text import visible_lines


class Command(click.Command):
    """A command with an example that can be typed as it stands.

    Args:
        arguments: As for click.
        example: The example, in one line or several.
        options: As for click.
    """

    def __init__(self, *arguments: Any, example: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.example = inspect.cleandoc(example)

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example as it is, where click would join its lines."""
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def all_of(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Several options as one decorator, in the order in which the help shows them."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def as_yaml(found: dict[str, Any]) -> str:
    """What was found as YAML for a terminal, which its text must not steer."""
    import yaml

    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None}
    return visible_lines(yaml.safe_dump(found, width=10**6, **style))


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """A bar on standard error, moved by the share that is done and what is being done."""
    with click.progressbar(
        length=100, file=sys.stderr, item_show_func=lambda what: what or ""
    ) as bar:
        yield lambda share, what: bar.update(int(100 * share) - bar.pos, what)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


class ParameterOption(click.Option):
    """An option for the field of its name of a pydantic model, whose default its help shows.

    Args:
        arguments: As for click.
        parameters: The model, ``package.module:Class``; imported when the help is asked for.
        options: As for click, but without a default: what is not given is left to the model.
    """

    def __init__(self, *arguments: Any, parameters: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parameters = parameters

    def get_help_extra(self, context: click.Context) -> Any:
        """Click's own, with the field's default, unless it is empty."""
        field = pkgutil.resolve_name(self.parameters).model_fields[self.name]
        default = field.get_default(call_default_factory=True)
        extra = super().get_help_extra(context)
        return extra if default in (None, "", {}) else {**extra, "default": str(default)}
