"""How a page is made: its template, one style, and a policy under which it loads and runs nothing."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerfold.files import write_text
from layerfold.records import BASE_LABEL
from layerfold.report.tables import MISSING


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a template with its values, which are escaped, as one self-contained page.

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
    environment.globals.update(BASE_LABEL=BASE_LABEL, MISSING=MISSING)
    style = files("layerfold.report").joinpath("report.css").read_text(encoding="utf-8")
    text = environment.get_template(template).render(
        style=Markup(style),
        style_hash=b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        **values,
    )
    # Half of a surrogate pair, which a recipe in JSON can hold, has no UTF-8.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
