"""Text for readers from Jinja templates, which stand in files of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from heimdall_onnx.common.text import count_of, distance, escape_markdown, number, shown


def render(template: Path, filters: dict[str, Callable[..., object]], **values: object) -> str:
    """A template with these values; all that it names must be there.

    Args:
        template: The template; of others than HTML's nothing is escaped by itself.
        filters: Further ones than ``distance``, ``inert`` (`escape_markdown`), ``number`` and
            ``shown``.
        **values: What it is about.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["count_of"] = count_of
    ours: dict[str, Any] = {"distance": distance, "number": number, "shown": shown}
    environment.filters |= {**ours, "inert": escape_markdown, **filters}
    return environment.get_template(template.name).render(**values)
