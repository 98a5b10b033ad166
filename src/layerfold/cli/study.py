"""`layerfold study` and `generate`: the variants of a recipe, measured or read side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerfold.cli import options
from layerfold.cli.command import Command, option
from layerfold.cli.console import loaded, present
from layerfold.errors import InputError

if TYPE_CHECKING:
    from layerfold.records import Record

_TOLD = ("perplexity", "imdb", "rouge", "lm-eval")
"""Evaluators whose figures are shown as soon as they are measured."""

_WRITTEN = (
    option("prompt", list[str] | None, "May be given several times; by default the published two."),
    option("new_tokens", int, "How many are added to each prompt.", 40),
    option("temperature", float, "Of the sampled text: divides the logits.", 0.8),
    option("top_p", float, "Of the sampled text: share of the probability that is drawn from.", 0.9),
    option("seed", int, "Of the sampled text: seed of its random numbers.", 0),
)
"""Options of `generate`, which takes those of `study` too."""


def study(
    recipe: options.RecipeFile = None,
    preset: options.PresetName = None,
    model: options.BaseModel = None,
    output_dir: options.RunFolder = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.KeepOthers = False,
    as_json: options.AsJson = False,
    **written: Any,
) -> None:
    """Compare variants of a model; measures only what is missing in the run's folder."""
    from layerfold.checkpoint.model import POCKET
    from layerfold.environment import VARIABLES, placed
    from layerfold.evaluators.generation import Generation, published_prompts
    from layerfold.records import write_results
    from layerfold.report.study import samples_report, study_report
    from layerfold.study.recipe import default_recipe, read_recipe
    from layerfold.study.study import Study

    wanted = None
    if written:
        drawn = {name: written[name] for name in ("new_tokens", "temperature", "top_p", "seed")}
        wanted = Generation(tuple(written["prompt"] or published_prompts()), **drawn)
    if recipe is not None and preset is not None:
        raise InputError(f"recipe {str(recipe)!r} and preset {preset!r}; accepted: one of the two")
    read = read_recipe(recipe) if recipe is not None else None
    name = model or (read.base if read is not None else POCKET)
    chosen_preset = preset or "demo"
    kind = recipe.stem if recipe is not None else chosen_preset
    folder = output_dir or Path("runs") / f"{Path(name).name or name}-{kind}"
    revision = read.revision if read is not None and model is None else None
    with (
        placed(*(None if read is None else getattr(read, name) for name in VARIABLES)),
        loaded(name, revision, trust_remote_code, as_json=as_json) as (base, progress),
    ):
        chosen = default_recipe(name, base.decoder, chosen_preset) if read is None else read.with_base(name, revision)
        # What options said otherwise.
        chosen = chosen.model_copy(
            update={key: None for key, name in VARIABLES.items() if getattr(chosen, key) != os.environ.get(name)}
        )
        if wanted is not None:
            # Of several seeds the first: texts have no mean.
            seed = chosen.seeds[0] if chosen.seeds else chosen.seed
            chosen = chosen.with_seed(seed).model_copy(update={"evaluate": [wanted]})
        running = Study(chosen, folder, base=base, overwrite=overwrite)
        for record in running.run(progress):
            if record.evaluator in _TOLD:
                progress.result(_line_of(record))
    results = running.results()
    shown = study_report(results)
    if wanted is None:
        write_results(results, folder)
        present(shown, folder, "results.csv", results.to_json(), as_json, {"run": folder})
        return
    folder /= "generate"
    write_results(results, folder)
    samples = {label: (results.score(label, wanted.name) or {}).get("samples") for label in results.labels}
    present(shown, folder, "results.csv", samples, as_json, {}, samples_report(results))


def _line_of(record: Record) -> str:
    """Write the figure of a row that was just measured."""
    from layerfold.report.numerals import significant

    value, low, high = (significant(record.score[name]) for name in ("value", "low", "high"))
    after = " after recovery" if "recovery" in record.subject else ""
    return f"{record.label}: {record.score['unit']}{after} {value} [{low}, {high}]"


commands = {
    "study": Command(study),
    "generate": Command(
        study,
        lambda: _WRITTEN,
        "Let all variants of a recipe continue the same prompts, greedily and sampled, and print what they wrote.",
    ),
}
