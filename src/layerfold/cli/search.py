"""`layerfold search`: commands that find out what to compress."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from layerfold.cli import options
from layerfold.cli.command import Command, field_options, group, option, range_text
from layerfold.cli.console import loaded, present
from layerfold.cli.declared import declared
from layerfold.errors import InputError

_SHARED = ("rank", "base", "init", "ranks", "align", "anchor")
"""Fields of `Share` that a search for a window takes; it finds the others."""


def search(
    kind: str,
    ctx: typer.Context,
    model: options.ModelName = "pocket",
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the search, which continues where it stopped.")
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.KeepOthers = False,
    as_json: options.AsJson = False,
    **settings: Any,
) -> None:
    """Run a search, and write and print what it found."""
    from layerfold.methods import Share
    from layerfold.report import drop_report, window_report
    from layerfold.search import DropSearch, WindowSearch

    made: DropSearch | WindowSearch
    if kind == "drop":
        if settings.pop("all"):
            source = ctx.get_parameter_source("remove")
            if source is not None and source.name == "COMMANDLINE":
                raise InputError(f"--remove {range_text(settings['remove'])} and --all; accepted: one of the two")
            settings["remove"] = None
        made = DropSearch(**settings)
        part = "" if made.part == "block" else f"-{made.part}"
    else:
        share = Share(**{name: settings.pop(name) for name in _SHARED})
        made = WindowSearch(share=share, **settings)
        part = ""
    folder = output_dir or Path("runs") / f"{Path(model).name or model}-{kind}{part}"
    with loaded(model, revision, trust_remote_code, as_json=as_json) as (base, progress):
        found: Any = made(base, folder, overwrite=overwrite, progress=progress)
    shown = drop_report(found) if kind == "drop" else window_report(found)
    present(shown, folder, "candidates.csv", found.to_json(), as_json, {"search": folder / "search.json"})


def _drop_options() -> Iterator[Parameter]:
    remove, *others = field_options(declared("layerfold.search.drop", "DropSearch"))
    yield from (remove, option("all", bool, "Try every number that leaves a block.", False), *others)


def _window_options() -> Iterator[Parameter]:
    k, *others = field_options(declared("layerfold.search.share", "WindowSearch"), without=["share"])
    yield from (k, *field_options(declared("layerfold.methods.share.method", "Share"), _SHARED), *others)


def _group() -> None:
    """Find what a model misses least."""


app = group(
    lambda: {
        "drop": Command(partial(search, "drop"), _drop_options, "Find the best set of blocks to drop, of each size."),
        "window": Command(
            partial(search, "window"), _window_options, "Find the best consecutive blocks to share one FFN."
        ),
    },
    _group,
)
