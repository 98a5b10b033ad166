"""`layerfold report`: a study's report again, and beside the published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerfold.cli import options
from layerfold.cli.console import print_json
from layerfold.errors import InputError, one_of


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a study.")],
    against: Annotated[
        str | None, typer.Option(help="published: put the published study's figures beside the run's.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print a study's table again, and write its files, from what was measured; no model is loaded."""
    from rich.console import Console

    from layerfold.records import read_results
    from layerfold.report import print_table, write_csv, write_html
    from layerfold.report.published import PUBLISHED, compare, write_published_csv
    from layerfold.report.terminal import print_published

    if against not in (None, PUBLISHED):
        raise InputError(f"--against {one_of(str(against), [PUBLISHED])}")
    results = read_results(run)
    comparisons = compare(results) if against == PUBLISHED else ()
    write_csv(results, run / "results.csv")
    write_html(results, run / "report.html", comparisons)
    if comparisons:
        write_published_csv(comparisons, run / "published.csv")
    if as_json:
        beside = {PUBLISHED: [comparison.to_json() for comparison in comparisons]} if comparisons else {}
        print_json(results.to_json() | beside)
        return
    console = Console()
    print_table(results, console)
    if comparisons:
        console.print()
        print_published(comparisons, console)
        typer.echo(f"published: {run / 'published.csv'}")
    typer.echo(f"report: {run / 'report.html'}")
