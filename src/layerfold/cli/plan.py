"""`layerfold plan`: the best model within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from layerfold.cli import options
from layerfold.cli.command import Command, field_options
from layerfold.cli.console import loaded, present
from layerfold.cli.declared import declared
from layerfold.errors import InputError, OutputError


def plan(
    model: options.ModelName = "pocket",
    format: Annotated[
        options.Format | None, typer.Option(help="By default dense where that is as small as compact.")
    ] = None,
    save_dtype: options.SaveDtypeName = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the plan, which continues where it stopped.")
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.KeepOthers = False,
    as_json: options.AsJson = False,
    **settings: Any,
) -> None:
    """Find, build and verify the best model within a budget."""
    from layerfold.checkpoint.weighing import weigh
    from layerfold.files import check_folder, write_text
    from layerfold.planning import Plan
    from layerfold.planning.results import RESULT, check_model
    from layerfold.report import plan_report
    from layerfold.settings import yaml_text

    planned = Plan(**settings)
    folder = output_dir or Path("runs") / f"{Path(model).name or model}-plan"
    written = folder / "model"
    if Path(model).resolve().is_relative_to(written.resolve()):
        raise InputError(f"--model {model!r} lies where the plan writes its own; accepted: another --output-dir")
    if written.exists() and not (folder / RESULT).is_file():
        raise OutputError(f"{str(written)!r} is no plan's, and is not replaced; accepted: another --output-dir")
    check_folder(written, overwrite=True)
    with loaded(model, revision, trust_remote_code, as_json=as_json) as (base, progress):
        if not overwrite:
            check_model(folder, base)
        found, made = planned(base, folder, overwrite=overwrite, progress=progress)
        recipe = found.recipe(model, revision)
        write_text(folder / RESULT, json.dumps(found.to_json(), indent=1))
        dtype = options.dtype_of(save_dtype) or made.saved_dtype
        weighed = weigh(made.decoder, dtype)
        kept: options.Format = format or ("dense" if weighed.as_small else "compact")
        with progress.doing(f"writing {written}"):
            said = made.save(written, format=kept, overwrite=True, dtype=dtype, figures=found.figures())
        said += f"; on disk: {weighed.said(weigh(base.decoder, dtype))}"
    where = {"model": f"{written} ({said})", "recipe": folder / "recipe.yaml"}
    write_text(folder / "recipe.yaml", yaml_text(recipe))
    present(plan_report(found, recipe), folder, "trials.csv", found.to_json(), as_json, where)


command = Command(plan, lambda: field_options(declared("layerfold.planning.plan", "Plan"), without=["rivals"]))
