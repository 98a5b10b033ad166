"""`layerfold search`: commands that find out what to compress."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.console import drawn, print_json
from layerfold.errors import InputError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Find what a model misses least.")


class Strategy(StrEnum):
    """Which candidates are looked at."""

    exhaustive = "exhaustive"
    greedy = "greedy"
    beam = "beam"


class Objective(StrEnum):
    """What candidates are compared by."""

    perplexity = "perplexity"
    kl = "kl"


class DropObjective(StrEnum):
    """What sets of blocks to drop are compared by."""

    perplexity = "perplexity"
    kl = "kl"
    repaired = "repaired"


Race = Annotated[bool, typer.Option("--race", help="Give up on candidates that are clearly behind.")]
ObjectiveName = Annotated[Objective, typer.Option(help="What candidates are compared by.")]
SelectionTokens = Annotated[int, typer.Option(help="Selection tokens.")]
TestTokens = Annotated[int, typer.Option(help="Test tokens.")]
Context = Annotated[int | None, typer.Option(help="Length of the text's windows; by default the model's.")]
SearchDir = Annotated[Path | None, typer.Option("--output-dir", help="The search's folder; a search in it goes on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")]


@app.command()
def drop(
    model: options.ModelName = "pocket",
    remove: Annotated[str | None, typer.Option(help="How many blocks to remove: 2, or 1..3.  [default: 1]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every number that leaves a block.")] = False,
    part: options.PartName = options.Part.block,
    strategy: Annotated[Strategy, typer.Option(help="Which candidates to look at.")] = Strategy.exhaustive,
    width: Annotated[int, typer.Option(help="Sets of each size that a beam goes on from.")] = 8,
    race: Race = False,
    objective: Annotated[
        DropObjective, typer.Option(help="What candidates are compared by; repaired is the perplexity after a repair.")
    ] = DropObjective.perplexity,
    finalists: Annotated[int, typer.Option(help="With repaired: how many of each number are repaired wholly.")] = 4,
    corpus: Annotated[
        str | None,
        typer.Option(help="Its validation split selects, its test split judges; repairs read its calibration split."),
    ] = None,
    tokens: SelectionTokens = defaults.SELECTION_TOKENS,
    test_tokens: TestTokens = defaults.LIMIT_TOKENS,
    calibration_tokens: Annotated[
        int, typer.Option(help="With repaired: tokens that whole repairs are fitted to, quick ones to a quarter.")
    ] = defaults.REPAIR_TOKENS,
    context: Context = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the latency comparison; 0 times nothing.")] = 12,
    seed: Annotated[int, typer.Option(help="Orders the windows of a race, and the calibration documents.")] = 0,
    output_dir: SearchDir = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Remove blocks, alone and together, and tell the best set of each size."""
    from rich.console import Console

    from layerfold.checkpoint.load import load
    from layerfold.report import drop_report, print_report, write_csv, write_page
    from layerfold.search import DropSearch

    if remove is not None and everything:
        raise InputError(f"--remove {remove} and --all; accepted: one of the two")
    search = DropSearch(
        remove=None if everything else _range("--remove", "1" if remove is None else remove),
        part=part.value,
        strategy=strategy.value,
        width=width,
        race=race,
        objective=objective.value,
        finalists=finalists,
        corpus=corpus,
        tokens=tokens,
        test_tokens=test_tokens,
        calibration_tokens=calibration_tokens,
        context=context,
        rounds=rounds,
        seed=seed,
    )
    kind = "drop" if part is options.Part.block else f"drop-{part.value}"
    folder = output_dir or Path("runs") / f"{Path(model).name or model}-{kind}"
    with drawn(as_json=as_json) as progress:
        with progress.doing(f"loading {model}"):
            loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        found = search(loaded, folder, overwrite=overwrite, progress=progress)
    shown = drop_report(found)
    write_csv(shown, folder / "candidates.csv")
    write_page(shown, folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    print_report(shown, Console())
    typer.echo(f"search: {folder / 'search.json'}\nreport: {folder / 'report.html'}")


@app.command()
def window(
    model: options.ModelName = "pocket",
    k: Annotated[str, typer.Option(help="How many consecutive blocks share: 4, or 2..6.")] = "4",
    rank: options.Rank = 8,
    base: options.BaseName = options.Base.fitted,
    init: options.InitName = options.Init.data_svd,
    ranks: options.RanksName = options.Ranks.uniform,
    align: options.AlignName = options.Align.hungarian,
    anchor: options.AnchorName = options.Anchor.first,
    race: Race = False,
    objective: ObjectiveName = Objective.perplexity,
    corpus: Annotated[
        str | None,
        typer.Option(help="Its calibration split calibrates, its validation split selects, its test split judges."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = defaults.CALIBRATION_TOKENS,
    tokens: SelectionTokens = defaults.SELECTION_TOKENS,
    test_tokens: TestTokens = defaults.LIMIT_TOKENS,
    context: Context = None,
    seed: Annotated[int, typer.Option(help="Orders the calibration documents, and the windows of a race.")] = 0,
    output_dir: SearchDir = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Share the FFNs of every window of consecutive blocks, and tell the best window of each size."""
    from rich.console import Console

    from layerfold.checkpoint.load import load
    from layerfold.methods import Share
    from layerfold.report import print_report, window_report, write_csv, write_page
    from layerfold.search import WindowSearch

    share = Share(
        rank=rank, base=base.value, init=init.value, ranks=ranks.value, align=align.value, anchor=anchor.value
    )
    search = WindowSearch(
        k=_range("--k", k),
        share=share,
        race=race,
        objective=objective.value,
        corpus=corpus,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        test_tokens=test_tokens,
        context=context,
        seed=seed,
    )
    folder = output_dir or Path("runs") / f"{Path(model).name or model}-window"
    with drawn(as_json=as_json) as progress:
        with progress.doing(f"loading {model}"):
            loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        found = search(loaded, folder, overwrite=overwrite, progress=progress)
    shown = window_report(found)
    write_csv(shown, folder / "candidates.csv")
    write_page(shown, folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    print_report(shown, Console())
    typer.echo(f"search: {folder / 'search.json'}\nreport: {folder / 'report.html'}")


def _range(option: str, text: str) -> tuple[int, int]:
    """Read ``3`` or ``1..3``."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", text)
    if not match:
        raise InputError(f"{option} {text!r}; accepted: how many, as 2 or 1..3")
    return int(match[1]), int(match[2] or match[1])
