"""`layerfold recover`: the command that trains."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any

import typer

from layerfold.cli import options
from layerfold.cli.console import drawn
from layerfold.errors import InputError


class RecoveryName(StrEnum):
    """How a model is trained."""

    finetune = "finetune"
    distill = "distill"
    lowrank = "lowrank"


def recover(
    model: Annotated[str, typer.Argument(help="pocket, a checkpoint folder, a .gguf file or a Hub id.")],
    output_dir: options.OutputDir,
    tokens: Annotated[int, typer.Option(help="Training tokens.")],
    method: Annotated[
        RecoveryName,
        typer.Option(
            help="finetune learns the text, distill the teacher; lowrank the text, by deltas of shared FFNs alone."
        ),
    ] = RecoveryName.distill,
    teacher: Annotated[
        str | None, typer.Option(help="What distill learns from; by default the base that the model was made from.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Training text; by default the model's own.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest; by default chosen on validation text.")
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="Tensors not to train, as '*.wte.*'; may be repeated.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as batch_size=16; may be repeated.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Corpus whose test split, or another file all of which, must share no document with the training text."
        ),
    ] = None,
    report_to: Annotated[str | None, typer.Option(help="A tracker, as tensorboard or wandb.")] = None,
    seed: Annotated[int, typer.Option(help="Orders the training text.")] = 0,
    format: Annotated[
        options.Format | None,
        typer.Option("--format", help="By default dense; compact where there are low-rank deltas to keep."),
    ] = None,
    save_dtype: options.SaveDtypeName = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Train a model, as what compression has broken. Killed, it goes on where it was when started again."""
    from layerfold import api, files
    from layerfold.checkpoint.load import load
    from layerfold.model import deltas
    from layerfold.recovery.processes import is_main
    from layerfold.recovery.workspace import clear
    from layerfold.study.recipe import build_recovery

    given = {
        "tokens": tokens,
        "corpus": corpus,
        "learning_rate": learning_rate,
        "freeze": freeze or None,
        "report_to": report_to,
    }
    recovery = build_recovery(method.value, _merged(given, settings or []))
    files.check_folder(output_dir, overwrite=overwrite)
    training_dir = output_dir.with_name(f"{output_dir.name}.training")
    with drawn(is_main()) as progress:
        with progress.doing(f"loading {model}"):
            before = load(model, revision=revision, trust_remote_code=trust_remote_code)
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
        kept = format or (options.Format.compact if deltas.ranks(after.decoder) else options.Format.dense)
        if is_main():
            written = after.save(output_dir, format=kept.value, overwrite=overwrite, dtype=options.dtype_of(save_dtype))
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
    typer.echo(f"wrote {output_dir} ({written})")


def _merged(given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Put the key=value settings, the values as recipes have them, beside the options that were given."""
    from layerfold.settings import read_value

    merged = {key: value for key, value in given.items() if value is not None}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or key in merged:
            raise InputError(f"--set {setting!r}; accepted: key=value, each key once, and not one given as an option")
        merged[key] = read_value(value)
    return merged
