"""Commands whose help ends with an example."""

from __future__ import annotations

import inspect
from typing import Any

import click


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


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
