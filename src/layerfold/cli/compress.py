"""`layerfold compress`: a command for each method, which writes a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.command import Command, field_options, group, option
from layerfold.cli.console import drawn
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
    from layerfold.checkpoint.load import load
    from layerfold.methods import METHODS

    text: dict[str, Any] = {"corpus": corpus, "tokens": tokens, "seed": seed}
    method = _searched(settings, repaired=repair != "none") if "from_search" in settings else None
    if method is None:
        own = {key: value for key, value in text.items() if key in methods()[name].fields}
        method = METHODS[name](**settings, **own)
    files.check_folder(output_dir, overwrite=overwrite)
    with drawn() as progress:
        with progress.doing(f"loading {model}"):
            loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        before = loaded.decoder.size(), loaded.decoder.n_blocks
        smaller = api.compress(
            loaded,
            method(loaded) if callable(method) else method,
            **text,
            repair=repair,
            repair_tokens=repair_tokens,
            in_place=True,
            progress=progress,
        )
        with progress.doing(f"writing {output_dir}"):
            dtype = options.dtype_of(save_dtype)
            written = smaller.save(output_dir, format=format, overwrite=overwrite, dtype=dtype)
    for done in smaller.provenance.steps[len(loaded.provenance.steps) :]:
        for line in _told(done["method"], done["notes"]):
            typer.echo(line)
        if "warning" in done["notes"]:
            typer.echo(f"warning: {done['notes']['warning']}", err=True)
    after = smaller.decoder.size(), smaller.decoder.n_blocks
    typer.echo(
        f"{before[0].parameters:,} distinct parameters in {before[1]} blocks -> {after[0].parameters:,} in {after[1]}"
    )
    if before[0].nonzero - after[0].nonzero != before[0].parameters - after[0].parameters:
        typer.echo(f"{before[0].nonzero:,} of them not zero -> {after[0].nonzero:,}")
    typer.echo(f"wrote {output_dir} ({written})")


def _searched(settings: dict[str, Any], *, repaired: bool) -> Method | Callable[[Model], Method] | None:
    """Return what reads a drop from a search's file, where one is given; it leaves the settings of `Drop`."""
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


def _told(method: dict[str, Any], notes: dict[str, Any]) -> Iterator[str]:
    """Say what a method did besides what the sizes say."""
    for pair in notes.get("pairs", []):
        yield (
            f"block {pair['block']:>2} to {pair['anchor']:>2}: mean matched correlation {pair['correlation']:.3f} "
            f"(unaligned {pair['unaligned']:.3f})"
        )
    if method["name"] == "drop":
        kind = "blocks" if method["part"] == "block" else f"the {method['part']} of blocks"
        yield f"dropped {kind} {method['blocks']}"
    search = notes.get("search", {})
    kind = "window" if "window" in method else "groups"
    for spelled, perplexity in search.get("perplexity", {}).items():
        yield f"{kind} {spelled:>5}: selection perplexity {perplexity:,.4g}"
    if "scored" in search:
        yield f"groups {method['groups']} are the best of {search['scored']} groupings scored"
    if "ranks" in notes:
        ranks = _range(notes["ranks"].values())
        yield f"blocks {method['window']} (START:K) share one FFN, with deltas of rank {ranks}"
    if "zeros" in notes:
        parts = ", ".join(f"{100 * share:.1f}% of {part}" for part, share in notes["sparsity"].items())
        yield f"{notes['zeros']:,} of {notes['weights']:,} weights are zero: {parts}"
    if "removed" in method:
        kind, of = ("neurons",) * 2 if "neurons" in method else ("parameters", "parameters of neurons and heads")
        yield f"removed {method['removed']:,} of {method[kind]:,} {of}"
    if "heads_left" in notes:
        neurons, heads = sum(notes["neurons_left"]), sum(notes["heads_left"])
        yield f"{neurons:,} neurons and {heads:,} groups of heads are left"
    if "speed" in notes:
        yield notes["speed"]
    for each in notes.get("rescaled", []):
        yield f"block {each['block']:>2}: neurons' deviations were {100 * each['shrunk']:.0f}% of what they are now"
    for each in notes.get("repaired", []):
        before, after = (f"{100 * each[error]:.2f}%" for error in ("error", "repaired"))
        yield f"block {each['block']:>2}: misses {before} of its target -> {after}"


def _range(ranks: Iterable[int]) -> str:
    low, high = min(ranks := list(ranks)), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"
