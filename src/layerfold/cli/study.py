"""`layerfold study` and `generate`: the variants of a recipe, measured or read side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerfold.cli import options
from layerfold.cli.console import drawn, print_json
from layerfold.errors import InputError

if TYPE_CHECKING:
    from layerfold.records import Results
    from layerfold.study.recipe import Recipe

_FOLDERS = {"default": "published"}
"""What a run's folder is called after, where not after the preset."""


def study(
    recipe: options.RecipeFile = None,
    preset: options.PresetName = None,
    model: options.BaseModel = None,
    output_dir: options.RunFolder = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.KeepOthers = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare variants of a model; measures only what is missing in the run's folder."""
    from rich.console import Console

    from layerfold.report import print_report, study_report

    results, folder = _run(recipe, preset, model, output_dir, trust_remote_code, overwrite, as_json)
    if as_json:
        print_json(results.to_json())
        return
    print_report(study_report(results), Console())
    typer.echo(f"run: {folder}\nreport: {folder / 'report.html'}")


def generate(
    recipe: options.RecipeFile = None,
    preset: options.PresetName = None,
    model: options.BaseModel = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="May be given several times; by default the published two.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="How many are added to each prompt.")] = 40,
    output_dir: options.RunFolder = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.KeepOthers = False,
    as_json: options.AsJson = False,
) -> None:
    """Let all variants of a recipe continue the same prompts, greedily, and print what they wrote side by side."""
    from rich.console import Console

    from layerfold.evaluators.generation import Generation, published_prompts
    from layerfold.report import print_report
    from layerfold.report.study import samples_report

    prompts = tuple(prompt) if prompt else published_prompts()
    wanted = Generation(prompts=prompts, new_tokens=new_tokens)

    def only_text(chosen: Recipe) -> Recipe:
        # Of several seeds the first: texts have no mean.
        seed = chosen.seeds[0] if chosen.seeds else chosen.seed
        return chosen.with_seed(seed).model_copy(update={"evaluate": [wanted]})

    results, folder = _run(
        recipe, preset, model, output_dir, trust_remote_code, overwrite, as_json, only_text, "generate"
    )
    if as_json:
        print_json({label: (results.score(label, wanted.name) or {}).get("samples") for label in results.labels})
        return
    print_report(samples_report(results), Console())
    typer.echo(f"report: {folder / 'report.html'}")


def _run(
    recipe: Path | None,
    preset: options.Preset | None,
    model: str | None,
    output_dir: Path | None,
    trust_remote_code: bool,
    overwrite: bool,
    as_json: bool,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    subfolder: str = "",
) -> tuple[Results, Path]:
    """Run a recipe, changed, and write its report into the run's folder or below; return its results and where."""
    from layerfold.checkpoint.load import load
    from layerfold.checkpoint.model import POCKET
    from layerfold.records import write_results
    from layerfold.report import study_report, write_csv, write_page
    from layerfold.study.recipe import default_recipe, read_recipe
    from layerfold.study.study import Study

    if recipe is not None and preset is not None:
        raise InputError(f"recipe {str(recipe)!r} and preset {preset!r}; accepted: one of the two")
    read = read_recipe(recipe) if recipe is not None else None
    name = model or (read.base if read is not None else POCKET)
    chosen_preset = preset or "default"
    kind = recipe.stem if recipe is not None else _FOLDERS.get(chosen_preset, chosen_preset)
    folder = output_dir or Path("runs") / f"{Path(name).name or name}-{kind}"
    revision = read.revision if read is not None and model is None else None
    with drawn(as_json=as_json) as progress:
        with progress.doing(f"loading {name}"):
            base = load(name, revision=revision, trust_remote_code=trust_remote_code)
        chosen = default_recipe(name, base.decoder, chosen_preset) if read is None else read.with_base(name, revision)
        running = Study(change(chosen), folder, base=base, overwrite=overwrite)
        for _ in running.run(progress):
            pass
    results, folder = running.results(), folder / subfolder
    write_results(results, folder)
    shown = study_report(results)
    write_csv(shown, folder / "results.csv")
    write_page(shown, folder / "report.html")
    return results, folder
