"""`layerfold report`: a study's report again, and beside the published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerfold.cli import options
from layerfold.cli.console import present
from layerfold.errors import InputError, one_of


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a study.")],
    against: Annotated[
        str | None, typer.Option(help="published: put the published study's figures beside the run's.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print a study's table again, and write its files, from what was measured; no model is loaded."""
    from layerfold.records import read_results
    from layerfold.report import study_report, write_csv
    from layerfold.report.published import PUBLISHED, compare, published_report

    if against not in (None, PUBLISHED):
        raise InputError(f"--against {one_of(str(against), [PUBLISHED])}")
    results = read_results(run)
    comparisons = compare(results) if against == PUBLISHED else ()
    document, where = results.to_json(), {}
    if comparisons:
        document[PUBLISHED] = [comparison.to_json() for comparison in comparisons]
        where["published"] = run / "published.csv"
        write_csv(published_report(comparisons), where["published"])
    present(study_report(results, comparisons), run, "results.csv", document, as_json, where)
