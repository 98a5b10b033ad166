"""`layerfold plan`: the best model within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from layerfold import defaults
from layerfold.cli import options
from layerfold.cli.console import drawn, print_json
from layerfold.errors import InputError, OutputError


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
    save_dtype: options.SaveDtypeName = None,
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

    from layerfold.checkpoint.load import load
    from layerfold.files import check_folder, write_text
    from layerfold.planning import Plan
    from layerfold.planning.results import RESULT, check_model
    from layerfold.report import plan_report, print_report, write_csv, write_page
    from layerfold.settings import yaml_text

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
    written = folder / "model"
    if Path(model).resolve().is_relative_to(written.resolve()):
        raise InputError(f"--model {model!r} lies where the plan writes its own; accepted: another --output-dir")
    if written.exists() and not (folder / RESULT).is_file():
        raise OutputError(f"{str(written)!r} is no plan's, and is not replaced; accepted: another --output-dir")
    check_folder(written, overwrite=True)
    with drawn(as_json=as_json) as progress:
        with progress.doing(f"loading {model}"):
            loaded = load(model, revision=revision, trust_remote_code=trust_remote_code)
        if not overwrite:
            check_model(folder, loaded)
        found, made = planned(loaded, folder, overwrite=overwrite, progress=progress)
        recipe = found.recipe(model, revision)
        write_text(folder / RESULT, json.dumps(found.to_json(), indent=1))
        with progress.doing(f"writing {written}"):
            said = made.save(written, format=format.value, overwrite=True, dtype=options.dtype_of(save_dtype))
    write_text(folder / "recipe.yaml", yaml_text(recipe))
    shown = plan_report(found, recipe)
    write_csv(shown, folder / "trials.csv")
    write_page(shown, folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    print_report(shown, Console())
    typer.echo(f"model: {written} ({said})\nrecipe: {folder / 'recipe.yaml'}\nreport: {folder / 'report.html'}")
