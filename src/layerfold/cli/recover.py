"""`layerfold recover`: the command that trains."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import typer

from layerfold.cli import options
from layerfold.cli.command import Command, field_options
from layerfold.cli.console import loaded
from layerfold.cli.declared import declared
from layerfold.errors import InputError

RecoveryName = Literal["finetune", "distill", "lowrank"]
_FIELDS = ("tokens", "corpus", "learning_rate", "freeze", "report_to")
"""Fields of all recoveries that are options; the others are given by ``--set``."""


def recover(
    model: options.ModelArgument,
    output_dir: options.OutputDir,
    method: Annotated[
        RecoveryName,
        typer.Option(
            help="finetune learns the text, distill the teacher; lowrank the text, by deltas of shared FFNs alone."
        ),
    ] = "distill",
    teacher: Annotated[
        str | None, typer.Option(help="Model to learn from; by default the base that the model was made from.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as batch_size=16; may be repeated.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Corpus that must share no document with the training text: its test split, or all of a file."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Orders the training text.")] = 0,
    format: Annotated[
        options.Format | None, typer.Option(help="By default dense; compact where there are low-rank deltas to keep.")
    ] = None,
    save_dtype: options.SaveDtypeName = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
    **settings: Any,
) -> None:
    """Train a compressed model to recover quality.

    A run that was stopped continues where it was when it is started again.
    """
    from layerfold import api, files
    from layerfold.checkpoint.weighing import weigh
    from layerfold.model import deltas
    from layerfold.recovery.processes import is_main
    from layerfold.recovery.workspace import clear
    from layerfold.study.recipe import build_recovery

    recovery = build_recovery(method, _merged(settings, setting or []))
    files.check_folder(output_dir, overwrite=overwrite)
    training_dir = output_dir.with_name(f"{output_dir.name}.training")
    with loaded(model, revision, trust_remote_code, show=is_main()) as (before, progress):
        after = api.recover(
            before,
            recovery,
            teacher=teacher,
            held_out=held_out,
            training_dir=training_dir,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
        kept: options.Format = format or ("compact" if deltas.ranks(after.decoder) else "dense")
        if is_main():
            dtype = options.dtype_of(save_dtype) or after.saved_dtype
            written = after.save(output_dir, format=kept, overwrite=overwrite, dtype=dtype)
            weighed = weigh(after.decoder, dtype)
        clear(training_dir)
    if not is_main():
        return
    done = after.provenance.steps[-1]["notes"]
    spent = f"{done['tokens']:,} tokens" + (
        f" and {done['search_tokens']:,} to choose the learning rate" if done["search_tokens"] else ""
    )
    start = math.exp(done["curve"]["validation"][0][1])
    if done["learning_rate"] is None:
        typer.echo("the model is its own teacher: there is nothing to learn")
    else:
        typer.echo(f"trained on {spent}, {done['seconds']:.0f} s, learning rate {done['learning_rate']:g}")
    typer.echo(
        f"validation perplexity {start:,.4g} -> {done['validation_perplexity']:,.4g} "
        f"(weights of step {done['best_step']} of {done['steps']})"
    )
    typer.echo(f"on disk: {weighed.said(weighed)}")
    typer.echo(f"wrote {output_dir} ({written})")


def _merged(given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Add key=value settings, with values as in recipes, to the options that were given."""
    from layerfold.settings import read_value

    merged = {key: value for key, value in given.items() if value is not None}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or key in merged:
            raise InputError(f"--set {setting!r}; accepted: key=value, each key once, and not one given as an option")
        merged[key] = read_value(value)
    return merged


command = Command(recover, lambda: field_options(declared("layerfold.recovery.base", "Recovery"), _FIELDS, unset=True))
