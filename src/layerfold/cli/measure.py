"""`layerfold eval` and `doctor`: commands that measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from layerfold.cli import options
from layerfold.cli.console import loaded, print_json

if TYPE_CHECKING:
    from layerfold.evaluators import Score


def evaluate(
    model: options.ModelArgument,
    metrics: Annotated[str, typer.Option(help="Comma-separated.")] = "perplexity,size,latency,generation",
    corpus: Annotated[str | None, typer.Option(help="imdb, a file or folder, or a Hub data set id.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, calibration, validation, test or all; by default all of a file without splits, else test."
        ),
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(help="Score this many tokens at most.")] = None,
    protocol: Annotated[options.Protocols, typer.Option(help="published repeats the published measurement.")] = "sound",
    revision: options.Revision = None,
    trust_remote_code: options.TrustCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure one model."""
    from layerfold import api

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    scores: dict[str, Score] = {}
    try:
        with loaded(model, revision, trust_remote_code, as_json=as_json) as (subject, progress):
            measured = api.each_score(
                subject,
                names,
                corpus=corpus,
                split=split,
                limit_tokens=limit_tokens,
                protocol=protocol,
                progress=progress,
            )
            scores.update(measured)
    finally:
        # What was measured is shown, also where a later metric refuses.
        if as_json and scores:
            print_json({name: score.to_json() for name, score in scores.items()})
        elif scores:
            _show(scores)


def _show(scores: Mapping[str, Score]) -> None:
    for name, score in scores.items():
        interval = "" if score.low == score.high else f" [{score.low:,.4g}, {score.high:,.4g}]"
        typer.echo(f"{name}: {score.value:,.6g}{interval} {score.unit}")
        for key, value in score.details.items():
            if isinstance(value, str | int | float):
                shown = f"{value:,}" if type(value) is int else " ".join(str(value).split())
                typer.echo(f"  {key}: {shown}")
        for sample in score.details.get("samples", []):
            typer.echo(f"  greedy > {sample['prompt']}{sample['text']!r}")
            typer.echo(f"  sampled > {sample['prompt']}{sample['sampled']['text']!r}")


def doctor(
    families: Annotated[
        bool, typer.Option("--families", help="Say what the structure of each architecture is and admits, instead.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say what is installed, how fast this machine multiplies, and what can be reached."""
    from layerfold.cli.doctor import examine, families_known

    found = families_known() if families else examine()
    if as_json:
        print_json(found)
        return
    for heading, entries in found.items():
        typer.echo(heading)
        for key, value in entries.items():
            typer.echo(f"  {key}: {value}")
