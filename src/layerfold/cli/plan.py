"""`layerfold plan`: the best model within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.output import print_json
from layerfold.console import drawn


def plan(
    model: options.ModelName = "pocket",
    parameters: Annotated[
        str | None, typer.Option(help="Budget: at most so many distinct parameters, as 82M or 66%.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Or: so many times as fast at least, as 1.5.")] = None,
    perplexity: Annotated[str | None, typer.Option(help="Or: so much higher a perplexity at most, as +10%.")] = None,
    points: Annotated[int, typer.Option(help="With --parameters: sizes on the way to it that are tried too.")] = 3,
    finalists: Annotated[int, typer.Option(help="How many of the best are repaired on all of the text.")] = 2,
    corpus: Annotated[
        str | None,
        typer.Option(help="Its calibration split calibrates, its validation split selects, its test split verifies."),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Calibration tokens that methods read activations from.")
    ] = defaults.CALIBRATION_TOKENS,
    repair_tokens: Annotated[
        int, typer.Option(help="Calibration tokens that repairs are fitted to; a quarter of them while trying.")
    ] = defaults.REPAIR_TOKENS,
    tokens: Annotated[int, typer.Option(help="Selection tokens.")] = defaults.SELECTION_TOKENS,
    test_tokens: Annotated[int, typer.Option(help="Test tokens.")] = defaults.LIMIT_TOKENS,
    rounds: Annotated[int, typer.Option(help="Rounds of the latency comparison; 0 times nothing.")] = 12,
    seed: options.Seed = 0,
    format: options.FormatName = options.Format.compact,
    output_dir: Annotated[Path | None, typer.Option(help="The plan's folder; a plan in it goes on.")] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")] = (
        False
    ),
    as_json: options.AsJson = False,
) -> None:
    """Find, build and verify the best model within a budget."""
    from rich.console import Console

    from layerfold.hub import load
    from layerfold.planning import Plan
    from layerfold.report import print_plan, write_plan_csv, write_plan_html
    from layerfold.yamlfiles import write_yaml

    planned = Plan(
        parameters=parameters,
        speedup=speedup,
        perplexity=perplexity,
        points=points,
        finalists=finalists,
        corpus=corpus,
        calibration_tokens=calibration_tokens,
        repair_tokens=repair_tokens,
        tokens=tokens,
        test_tokens=test_tokens,
        rounds=rounds,
        seed=seed,
    )
    folder = output_dir or Path("runs") / f"{Path(model).name or model}-plan"
    with drawn() as progress:
        with progress.doing(f"loading {model}"):
            loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        found, made = planned(loaded, folder, overwrite=overwrite, progress=progress)
        with progress.doing(f"writing {folder / 'model'}"):
            made.save(folder / "model", format=format.value, overwrite=True)
    write_yaml(found.recipe(model, revision), folder / "recipe.yaml")
    write_plan_csv(found, folder / "trials.csv")
    write_plan_html(found, folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    print_plan(found, Console())
    typer.echo(
        f"model: {folder / 'model'} ({format.value})\nrecipe: {folder / 'recipe.yaml'}\n"
        f"report: {folder / 'report.html'}"
    )
