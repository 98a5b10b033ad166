"""`layerfold compress`: a command for each method, which writes a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.command import Command, field_options, group, option
from layerfold.cli.console import loaded
from layerfold.cli.declared import Declared, methods
from layerfold.errors import InputError

if TYPE_CHECKING:
    from layerfold.checkpoint.model import Model
    from layerfold.methods import Method

_SEARCHED = (
    option("from_search", Path | None, "Instead of --blocks: search.json of a search for them."),
    option("remove", int | None, "With --from-search: number of blocks."),
)


def compress(
    name: str,
    output_dir: options.OutputDir,
    model: options.ModelName = "pocket",
    format: options.FormatName = "dense",
    save_dtype: options.SaveDtypeName = None,
    corpus: options.CalibrationCorpus = None,
    tokens: options.CalibrationTokens = defaults.CALIBRATION_TOKENS,
    repair: options.RepairLevel = "none",
    repair_tokens: options.RepairTokens = defaults.REPAIR_TOKENS,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
    **settings: Any,
) -> None:
    """Write a smaller checkpoint."""
    from layerfold import api, files
    from layerfold.checkpoint.weighing import weigh
    from layerfold.methods import METHODS
    from layerfold.pipeline import told

    text: dict[str, Any] = {"corpus": corpus, "tokens": tokens, "seed": seed}
    method = _searched(settings, repaired=repair != "none") if "from_search" in settings else None
    if method is None:
        own = {key: value for key, value in text.items() if key in methods()[name].fields}
        method = METHODS[name](**settings, **own)
    files.check_folder(output_dir, overwrite=overwrite)
    with loaded(model, revision, trust_remote_code) as (base, progress):
        dtype = options.dtype_of(save_dtype) or base.saved_dtype
        before = base.decoder.size(), base.decoder.n_blocks
        weighed = weigh(base.decoder, dtype)
        smaller = api.compress(
            base,
            method(base) if callable(method) else method,
            **text,
            repair=repair,
            repair_tokens=repair_tokens,
            in_place=True,
            progress=progress,
        )
        with progress.doing(f"writing {output_dir}"):
            written = smaller.save(output_dir, format=format, overwrite=overwrite, dtype=dtype)
    for done in smaller.provenance.steps[len(base.provenance.steps) :]:
        for line in told(done["method"], done["notes"]):
            typer.echo(line)
        if "warning" in done["notes"]:
            typer.echo(f"warning: {done['notes']['warning']}", err=True)
    after = smaller.decoder.size(), smaller.decoder.n_blocks
    typer.echo(
        f"{before[0].parameters:,} distinct parameters in {before[1]} blocks -> {after[0].parameters:,} in {after[1]}"
    )
    if before[0].nonzero - after[0].nonzero != before[0].parameters - after[0].parameters:
        typer.echo(f"{before[0].nonzero:,} of them not zero -> {after[0].nonzero:,}")
    typer.echo(f"on disk: {weigh(smaller.decoder, dtype).said(weighed)}")
    typer.echo(f"wrote {output_dir} ({written})")


def _searched(settings: dict[str, Any], *, repaired: bool) -> Method | Callable[[Model], Method] | None:
    """Return a reader of a drop from a search's file, None if no file is given; take its settings out."""
    from layerfold.search import best_drop

    file, remove = settings.pop("from_search"), settings.pop("remove")
    if file is None and remove is not None:
        raise InputError(f"--remove {remove} without --from-search; accepted: --random for so many at random")
    fields = methods()["drop"].fields
    if file is not None and any(value != fields[name].default for name, value in settings.items()):
        raise InputError(
            "--from-search, which says what to drop, beside --blocks, --random, --fraction, --every or --part"
        )
    return None if file is None else partial(best_drop, file, remove=remove, repaired=repaired)


def _command(name: str, method: Declared) -> Command:
    """Return the command of a method. `drop` can take its blocks from a search, and reads no text itself."""
    command = Command(partial(compress, name), partial(field_options, method), help=method.summary)
    if name == "drop":
        return replace(command, options=lambda: [*field_options(method), *_SEARCHED], without=("tokens",))
    if name == "share":
        return replace(command, defaults={"format": "compact"})  # the dense form has the deltas multiplied out
    return command


def _group() -> None:
    """Write a smaller checkpoint."""


app = group(lambda: {name: _command(name, method) for name, method in methods().items()}, _group)
