"""The templates of the pages (Jinja2): they escape every value, and ``uri`` makes an image a data URI."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from v2flow_cli import __version__
from v2flow_cli.bench.report.illustrations import data_uri

_TEMPLATES = Environment(
    loader=PackageLoader("v2flow_cli.bench", "report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["uri"] = data_uri


def fill(template: str, **values: Any) -> str:
    """A page, or a part of one, as HTML."""
    return _TEMPLATES.get_template(template).render(version=__version__, **values)
