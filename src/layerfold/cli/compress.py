"""`layerfold compress`: commands that write smaller checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.console import drawn
from layerfold.errors import InputError

if TYPE_CHECKING:
    from layerfold.checkpoint.model import Model
    from layerfold.methods import Method

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write a smaller checkpoint.")


@app.command()
def merge(
    output_dir: options.OutputDir,
    model: options.ModelName = "pocket",
    n: options.GroupSize = None,
    groups: options.Groups = None,
    align: options.AlignName = options.Align.hungarian,
    anchor: options.AnchorName = options.Anchor.first,
    tie: Annotated[bool, typer.Option("--tie", help="Let each group share one stored FFN (see --format).")] = False,
    format: options.FormatName = options.Format.dense,
    save_dtype: options.SaveDtypeName = None,
    corpus: options.CalibrationCorpus = None,
    tokens: options.CalibrationTokens = defaults.CALIBRATION_TOKENS,
    repair: options.RepairLevel = options.Level.none,
    repair_tokens: options.RepairTokens = defaults.REPAIR_TOKENS,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Give each block of a group the average of the group's FFNs; depth stays."""
    from layerfold.methods import Merge

    method = Merge(n=n, groups=groups, align=align.value, anchor=anchor.value, tie=tie)
    base = (model, revision, trust_remote_code)
    text = _Text(corpus, tokens, repair, repair_tokens, seed)
    _compress(method, base, _Output(output_dir, format, save_dtype, overwrite), text)


@app.command()
def collapse(
    output_dir: options.OutputDir,
    model: options.ModelName = "pocket",
    n: options.GroupSize = None,
    groups: options.Groups = None,
    align: options.AlignName = options.Align.hungarian,
    anchor: options.AnchorName = options.Anchor.first,
    format: options.FormatName = options.Format.dense,
    save_dtype: options.SaveDtypeName = None,
    corpus: options.CalibrationCorpus = None,
    tokens: options.CalibrationTokens = defaults.CALIBRATION_TOKENS,
    repair: options.RepairLevel = options.Level.none,
    repair_tokens: options.RepairTokens = defaults.REPAIR_TOKENS,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Replace each group of blocks by one block with the average of their FFNs."""
    from layerfold.methods import Collapse

    method = Collapse(n=n, groups=groups, align=align.value, anchor=anchor.value)
    base = (model, revision, trust_remote_code)
    text = _Text(corpus, tokens, repair, repair_tokens, seed)
    _compress(method, base, _Output(output_dir, format, save_dtype, overwrite), text)


@app.command()
def drop(
    output_dir: options.OutputDir,
    model: options.ModelName = "pocket",
    blocks: options.Blocks = None,
    random: options.DrawnCount = None,
    fraction: options.DrawnFraction = None,
    every: options.EveryBlock = None,
    from_search: Annotated[
        Path | None, typer.Option("--from-search", help="Instead: the search.json of a search for what to drop.")
    ] = None,
    remove: Annotated[int | None, typer.Option(help="With --from-search: how many.")] = None,
    seed: options.DrawSeed = 0,
    part: options.PartName = options.Part.block,
    format: options.FormatName = options.Format.dense,
    save_dtype: options.SaveDtypeName = None,
    corpus: options.CalibrationCorpus = None,
    repair: options.RepairLevel = options.Level.none,
    repair_tokens: options.RepairTokens = defaults.REPAIR_TOKENS,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Remove blocks, or the attention or the FFN of blocks."""
    from layerfold.methods import Drop
    from layerfold.search import best_drop

    method: Method | Callable[[Model], Method]
    if from_search is None:
        if remove is not None:
            raise InputError(f"--remove {remove} without --from-search; accepted: --random for so many at random")
        method = Drop(blocks=blocks, random=random, fraction=fraction, every=every, part=part.value, seed=seed)
    elif [blocks, random, fraction, every] != [None] * 4 or part is not options.Part.block:
        raise InputError(
            "--from-search, which says what to drop, beside --blocks, --random, --fraction, --every or --part"
        )
    else:
        method = partial(best_drop, from_search, remove=remove, repaired=repair is not options.Level.none)
    text = _Text(corpus, defaults.CALIBRATION_TOKENS, repair, repair_tokens, seed)
    _compress(method, (model, revision, trust_remote_code), _Output(output_dir, format, save_dtype, overwrite), text)


@app.command()
def prune(
    output_dir: options.OutputDir,
    model: options.ModelName = "pocket",
    nonzero: options.NonZero = None,
    sparsity: options.Sparsity = None,
    criterion: options.CriterionName = options.Criterion.magnitude,
    structure: options.StructureName = options.Structure.unstructured,
    scope: options.ScopeName = None,
    parts: options.Parts = "attention,ffn",
    format: options.FormatName = options.Format.dense,
    save_dtype: options.SaveDtypeName = None,
    corpus: options.CalibrationCorpus = None,
    tokens: options.CalibrationTokens = defaults.CALIBRATION_TOKENS,
    repair: options.RepairLevel = options.Level.none,
    repair_tokens: options.RepairTokens = defaults.REPAIR_TOKENS,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Zero weights and hold them at zero, or remove neurons and heads, to a budget."""
    from layerfold.methods import Prune

    method = Prune(
        nonzero=nonzero,
        sparsity=sparsity,
        criterion=criterion.value,
        structure=structure.value,
        scope=None if scope is None else scope.value,
        parts=parts,
    )
    base = (model, revision, trust_remote_code)
    text = _Text(corpus, tokens, repair, repair_tokens, seed)
    _compress(method, base, _Output(output_dir, format, save_dtype, overwrite), text)


@app.command()
def share(
    output_dir: options.OutputDir,
    model: options.ModelName = "pocket",
    window: Annotated[str, typer.Option(help="START:K, the K blocks from START on; or auto, by a search.")] = "auto",
    k: Annotated[int | None, typer.Option(help="With --window auto: how many blocks.  [default: 4]")] = None,
    rank: options.Rank = 8,
    base: options.BaseName = options.Base.fitted,
    init: options.InitName = options.Init.data_svd,
    ranks: options.RanksName = options.Ranks.uniform,
    align: options.AlignName = options.Align.hungarian,
    anchor: options.AnchorName = options.Anchor.first,
    format: options.FormatName = options.Format.compact,
    save_dtype: options.SaveDtypeName = None,
    corpus: options.CalibrationCorpus = None,
    tokens: options.CalibrationTokens = defaults.CALIBRATION_TOKENS,
    repair: options.RepairLevel = options.Level.none,
    repair_tokens: options.RepairTokens = defaults.REPAIR_TOKENS,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Let a window of blocks share one FFN, with a low-rank delta for each."""
    from layerfold.methods import Share

    method = Share(
        window=window,
        k=k,
        rank=rank,
        base=base.value,
        init=init.value,
        ranks=ranks.value,
        align=align.value,
        anchor=anchor.value,
    )
    text = _Text(corpus, tokens, repair, repair_tokens, seed)
    _compress(method, (model, revision, trust_remote_code), _Output(output_dir, format, save_dtype, overwrite), text)


@dataclass(frozen=True)
class _Text:
    """Which text is read, how much of it, and for what."""

    corpus: str | None
    tokens: int
    repair: options.Level
    repair_tokens: int
    seed: int


@dataclass(frozen=True)
class _Output:
    """Where the checkpoint goes, and in which form."""

    directory: Path
    format: options.Format
    dtype: options.SaveDtype | None
    overwrite: bool


def _compress(
    method: Method | Callable[[Model], Method],
    base: tuple[str, str | None, bool],
    output: _Output,
    text: _Text,
) -> None:
    from layerfold import files
    from layerfold.api import compress
    from layerfold.checkpoint.load import load

    files.check_folder(output.directory, overwrite=output.overwrite)
    name, revision, trust_remote_code = base
    with drawn() as progress:
        with progress.doing(f"loading {name}"):
            loaded = load(name, revision=revision, trust_remote_code=trust_remote_code)
        if callable(method):
            method = method(loaded)
        before = loaded.decoder.size(), loaded.decoder.n_blocks
        settings = {**text.__dict__, "repair": text.repair.value}
        smaller = compress(loaded, method, **settings, in_place=True, progress=progress)
        with progress.doing(f"writing {output.directory}"):
            written = smaller.save(
                output.directory,
                format=output.format.value,
                overwrite=output.overwrite,
                dtype=options.dtype_of(output.dtype),
            )
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
    typer.echo(f"wrote {output.directory} ({written})")


def _told(method: dict[str, Any], notes: dict[str, Any]) -> Iterator[str]:
    """Say what a method did besides what the sizes say."""
    from layerfold.pipeline import told

    return told(method, notes)
