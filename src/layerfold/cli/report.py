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
    from layerfold.report import print_report, study_report, write_csv, write_page
    from layerfold.report.published import PUBLISHED, compare, published_report

    if against not in (None, PUBLISHED):
        raise InputError(f"--against {one_of(str(against), [PUBLISHED])}")
    results = read_results(run)
    comparisons = compare(results) if against == PUBLISHED else ()
    shown, beside = study_report(results, comparisons), published_report(comparisons)
    write_csv(shown, run / "results.csv")
    write_page(shown, run / "report.html")
    if comparisons:
        write_csv(beside, run / "published.csv")
    if as_json:
        document = {PUBLISHED: [comparison.to_json() for comparison in comparisons]} if comparisons else {}
        print_json(results.to_json() | document)
        return
    console = Console()
    print_report(shown, console)
    if comparisons:
        console.print()
        print_report(beside, console)
        typer.echo(f"published: {run / 'published.csv'}")
    typer.echo(f"report: {run / 'report.html'}")
