"""Text for readers from Jinja templates, which stand in files of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_onnx.common.text import count_of, distance, escape_markdown, number, shown

if TYPE_CHECKING:
    from jinja2 import Template

_Filters = dict[str, Callable[..., object]]


def render(template: Path, filters: _Filters, **values: object) -> str:
    """A template with these values; all that it names must be there.

    Args:
        template: The template; of others than HTML's nothing is escaped by itself.
        filters: Further ones than ``distance``, ``inert`` (`escape_markdown`), ``number`` and
            ``shown``.
        **values: What it is about.
    """
    return _opened(template, filters).render(**values)


def inert_macros(template: Path, filters: _Filters) -> Any:
    """The macros of a Markdown template as functions that give text.

    Args:
        template: The template; each value in it is inert but what is marked as safe.
        filters: As for `render`.
    """
    from markupsafe import Markup

    def inert(value: object) -> object:
        return value if isinstance(value, Markup) else escape_markdown(str(value))

    return _opened(template, filters, inert).make_module()


def _opened(
    template: Path, filters: _Filters, finalize: Callable[[object], object] | None = None
) -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["count_of"] = count_of
    ours: dict[str, Any] = {"distance": distance, "number": number, "shown": shown}
    environment.filters |= {**ours, "inert": escape_markdown, **filters}
    return environment.get_template(template.name)
