"""`layerfold search`: commands that find out what to compress."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.output import print_json
from layerfold.console import drawn
from layerfold.errors import InputError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Find what a model does best without.")


class Strategy(StrEnum):
    """Which candidates are looked at."""

    exhaustive = "exhaustive"
    greedy = "greedy"
    beam = "beam"


class Objective(StrEnum):
    """What candidates are compared by."""

    perplexity = "perplexity"
    kl = "kl"


@app.callback()
def _group() -> None:
    """Keep `drop` a command of its own, though it is the only one."""


@app.command()
def drop(
    model: options.ModelName = "pocket",
    remove: Annotated[str | None, typer.Option(help="How many blocks to remove: 2, or 1..3.  [default: 1]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every number that leaves a block.")] = False,
    part: options.PartName = options.Part.block,
    strategy: Annotated[Strategy, typer.Option(help="Which candidates to look at.")] = Strategy.exhaustive,
    width: Annotated[int, typer.Option(help="Sets of each size that a beam goes on from.")] = 8,
    race: Annotated[bool, typer.Option("--race", help="Give up on candidates that are clearly behind.")] = False,
    objective: Annotated[Objective, typer.Option(help="What candidates are compared by.")] = Objective.perplexity,
    corpus: Annotated[str | None, typer.Option(help="Its validation split selects, its test split judges.")] = None,
    tokens: Annotated[int, typer.Option(help="Selection tokens.")] = defaults.SELECTION_TOKENS,
    test_tokens: Annotated[int, typer.Option(help="Test tokens.")] = defaults.LIMIT_TOKENS,
    context: Annotated[int | None, typer.Option(help="Window length; by default the model's.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the latency comparison; 0 times nothing.")] = 12,
    seed: Annotated[int, typer.Option(help="Orders the windows of a race.")] = 0,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="The search's folder; a search in it goes on.")
    ] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the candidates as Parquet too.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Remove blocks, alone and together, and tell the best set of each size."""
    from rich.console import Console

    from layerfold.hub import load
    from layerfold.report import (
        check_parquet,
        print_search,
        write_search_csv,
        write_search_html,
        write_search_parquet,
    )
    from layerfold.search import DropSearch

    if remove is not None and everything:
        raise InputError(f"--remove {remove} and --all; accepted: one of the two")
    search = DropSearch(
        remove=None if everything else _counts("1" if remove is None else remove),
        part=part.value,
        strategy=strategy.value,
        width=width,
        race=race,
        objective=objective.value,
        corpus=corpus,
        tokens=tokens,
        test_tokens=test_tokens,
        context=context,
        rounds=rounds,
        seed=seed,
    )
    kind = "drop" if part is options.Part.block else f"drop-{part.value}"
    folder = output_dir or Path("runs") / f"{Path(model).name or model}-{kind}"
    if parquet:
        check_parquet()
    with drawn() as progress:
        with progress.doing(f"loading {model}"):
            loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        found = search(loaded, folder, overwrite=overwrite, progress=progress)
    write_search_csv(found, folder / "candidates.csv")
    (folder / "candidates.parquet").unlink(missing_ok=True)  # an earlier search's
    if parquet:
        write_search_parquet(found, folder / "candidates.parquet")
    write_search_html(found, folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    print_search(found, Console())
    typer.echo(f"search: {folder / 'search.json'}\nreport: {folder / 'report.html'}")


def _counts(text: str) -> tuple[int, int]:
    """Read ``3`` or ``1..3``."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", text)
    if not match:
        raise InputError(f"--remove {text!r}; accepted: how many, as 2 or 1..3")
    return int(match[1]), int(match[2] or match[1])
