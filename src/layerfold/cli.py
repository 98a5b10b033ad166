"""The commands: a thin layer over `layerfold.api`, `layerfold.study` and `layerfold.report`."""

from __future__ import annotations

import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerfold.console import drawn
from layerfold.errors import InputError, LayerfoldError

if TYPE_CHECKING:
    from layerfold.methods import Method

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make GPT-2-style language models smaller by their layers, and measure what that cost.",
)
compress_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write a smaller checkpoint.")
app.add_typer(compress_app, name="compress")


class Align(StrEnum):
    """How neurons are aligned before they are averaged."""

    hungarian = "hungarian"
    none = "none"


class Anchor(StrEnum):
    """The block of a group that the others are aligned to."""

    first = "first"
    middle = "middle"
    last = "last"


class Format(StrEnum):
    """How a checkpoint is stored."""

    dense = "dense"
    compact = "compact"


class ProtocolName(StrEnum):
    """How figures are measured."""

    sound = "sound"
    published = "published"


ModelName = Annotated[str, typer.Option("--model", help="pocket, a checkpoint folder, a .gguf file or a Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="Folder to write; new or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something, whole.")]
FormatName = Annotated[Format, typer.Option("--format", help="dense loads anywhere; compact stores each tensor once.")]
GroupSize = Annotated[int | None, typer.Option("--n", help="Blocks a group, from block 0; 2 to the depth.")]
Groups = Annotated[str | None, typer.Option(help="Instead of --n: first-last block of each group, as 1-4,5-8.")]
AlignName = Annotated[Align, typer.Option(help="How neurons are aligned.")]
AnchorName = Annotated[Anchor, typer.Option(help="The block of each group that the others are aligned to.")]
CalibrationCorpus = Annotated[
    str | None, typer.Option("--corpus", help="Calibration text; by default the model's own.")
]
CalibrationTokens = Annotated[int, typer.Option("--tokens", help="Calibration tokens.")]
Seed = Annotated[int, typer.Option(help="Orders the calibration documents.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@compress_app.command()
def merge(
    output_dir: OutputDir,
    model: ModelName = "pocket",
    n: GroupSize = None,
    groups: Groups = None,
    align: AlignName = Align.hungarian,
    anchor: AnchorName = Anchor.first,
    tie: Annotated[bool, typer.Option("--tie", help="Let each group share one stored FFN (see --format).")] = False,
    format: FormatName = Format.dense,
    corpus: CalibrationCorpus = None,
    tokens: CalibrationTokens = 16_384,
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Give each block of a group the average of the group's FFNs; depth stays."""
    from layerfold.methods import Merge

    method = Merge(n=n, groups=groups, align=align.value, anchor=anchor.value, tie=tie)
    _compress(method, model, revision, trust_remote_code, corpus, tokens, seed, output_dir, format, overwrite)


@compress_app.command()
def collapse(
    output_dir: OutputDir,
    model: ModelName = "pocket",
    n: GroupSize = None,
    groups: Groups = None,
    align: AlignName = Align.hungarian,
    anchor: AnchorName = Anchor.first,
    format: FormatName = Format.dense,
    corpus: CalibrationCorpus = None,
    tokens: CalibrationTokens = 16_384,
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Replace each group of blocks by one block with the average of their FFNs."""
    from layerfold.methods import Collapse

    method = Collapse(n=n, groups=groups, align=align.value, anchor=anchor.value)
    _compress(method, model, revision, trust_remote_code, corpus, tokens, seed, output_dir, format, overwrite)


def _compress(
    method: Method,
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    corpus: str | None,
    tokens: int,
    seed: int,
    output_dir: Path,
    format: Format,
    overwrite: bool,
) -> None:
    from layerfold import checkpoint
    from layerfold.api import compress
    from layerfold.hub import load

    checkpoint.check_folder(output_dir, overwrite=overwrite)
    with drawn() as progress:
        base = load(name, revision=revision, trust_remote_code=trust_remote_code)
        before = base.decoder.size().parameters, base.decoder.n_blocks
        smaller = compress(base, method, corpus=corpus, tokens=tokens, seed=seed, in_place=True, progress=progress)
        smaller.save(output_dir, format=format.value, overwrite=overwrite)
    for pair in smaller.provenance.steps[-1]["notes"].get("pairs", []):
        typer.echo(
            f"block {pair['block']:>2} to {pair['anchor']:>2}: mean matched correlation {pair['correlation']:.3f} "
            f"(unaligned {pair['unaligned']:.3f})"
        )
    after = smaller.decoder.size().parameters, smaller.decoder.n_blocks
    typer.echo(f"{before[0]:,} distinct parameters in {before[1]} blocks -> {after[0]:,} in {after[1]}")
    typer.echo(f"wrote {output_dir} ({format.value})")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    output_dir: OutputDir,
    to: Annotated[Format, typer.Option("--to", help="The form to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a checkpoint in the other form."""
    from layerfold import checkpoint
    from layerfold.hub import load

    checkpoint.check_folder(output_dir, overwrite=overwrite)
    if not directory.is_dir():
        raise InputError(f"no checkpoint folder at {str(directory)!r}")
    load(directory).save(output_dir, format=to.value, overwrite=overwrite)
    typer.echo(f"wrote {output_dir} ({to.value})")


@app.command(name="eval")
def evaluate_(
    model: Annotated[str, typer.Argument(help="pocket, a checkpoint folder, a .gguf file or a Hub id.")],
    metrics: Annotated[str, typer.Option(help="Comma-separated.")] = "perplexity,size,latency,generation",
    corpus: Annotated[str | None, typer.Option(help="imdb, a file or folder, or a Hub data set id.")] = None,
    split: Annotated[str, typer.Option(help="train, calibration, validation or test.")] = "test",
    limit_tokens: Annotated[int | None, typer.Option(help="Score this many tokens at most.")] = None,
    protocol: Annotated[
        ProtocolName, typer.Option(help="published repeats the published measurement.")
    ] = ProtocolName.sound,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure one model."""
    from layerfold.api import evaluate
    from layerfold.hub import load

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    with drawn() as progress:
        loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        scores = evaluate(
            loaded,
            names,
            corpus=corpus,
            split=split,
            limit_tokens=limit_tokens,
            protocol=protocol.value,
            progress=progress,
        )
    if as_json:
        _print_json({name: score.to_json() for name, score in scores.items()})
        return
    for name, score in scores.items():
        interval = "" if score.low == score.high else f" [{score.low:,.4g}, {score.high:,.4g}]"
        typer.echo(f"{name}: {score.value:,.6g}{interval} {score.unit}")
        for key, value in score.details.items():
            if isinstance(value, str | int | float):
                typer.echo(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value}")
        for sample in score.details.get("samples", []):
            typer.echo(f"  > {sample['prompt']}{sample['text']!r}")


@app.command()
def study(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML file; by default the published comparison.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Takes the place of the recipe's base.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="The run's folder; a study in it goes on.")
    ] = None,
    trust_remote_code: TrustCode = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare variants of a model; measures only what is missing in the run's folder."""
    from rich.console import Console

    from layerfold.hub import POCKET, load
    from layerfold.recipe import default_recipe, read_recipe
    from layerfold.report import print_table, write_csv, write_html
    from layerfold.study import Study

    read = read_recipe(recipe) if recipe is not None else None
    name = model or (read.base if read is not None else POCKET)
    folder = (
        output_dir or Path("runs") / f"{Path(name).name or name}-{recipe.stem if recipe is not None else 'published'}"
    )
    revision = read.revision if read is not None and model is None else None
    with drawn() as progress:
        base = load(name, revision=revision, trust_remote_code=trust_remote_code)
        chosen = default_recipe(name, base.decoder.n_blocks) if read is None else read.with_base(name, revision)
        running = Study(chosen, folder, base=base, overwrite=overwrite)
        for _ in running.run(progress):
            pass
    results = running.results()
    write_csv(results, folder / "results.csv")
    write_html(results, folder / "report.html")
    if as_json:
        _print_json(results.to_json())
        return
    print_table(results, Console())
    typer.echo(f"run: {folder}\nreport: {folder / 'report.html'}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, how fast this machine multiplies, and what can be reached."""
    from layerfold.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
        return
    for heading, entries in found.items():
        typer.echo(heading)
        for key, value in entries.items():
            typer.echo(f"  {key}: {value}")


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def main() -> None:
    """Run a command; what layerfold raises on purpose becomes one line and exit code 2."""
    try:
        app()
    except LayerfoldError as error:
        print(f"layerfold: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("layerfold: stopped; finished records are kept", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
