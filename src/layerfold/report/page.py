"""A report as an HTML page: one file that loads nothing, runs nothing and can be sent to anyone."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerfold.files import write_text
from layerfold.report.report import MISSING, Part, Report


def write_page(report: Report, path: Path) -> None:
    """Write a report as one self-contained page: all text is escaped, and a policy forbids to load or run anything.

    The same report gives the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("layerfold.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = _kind
    style = files("layerfold.report").joinpath("page.css").read_text(encoding="utf-8")
    text = environment.get_template("page.html.j2").render(
        report=report,
        style=Markup(style),
        style_hash=b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        MISSING=MISSING,
    )
    # Half of a surrogate pair, which a recipe in JSON can hold, has no UTF-8.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def _kind(part: Part) -> str:
    return type(part).__name__
