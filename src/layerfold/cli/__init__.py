"""The commands: a thin layer over `layerfold.api`, `layerfold.study` and `layerfold.report`."""

from __future__ import annotations

import sys

import typer

from layerfold.cli import compress, export, measure, plan, recover, report, search, study
from layerfold.errors import LayerfoldError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make GPT-2-style language models smaller by their layers, and measure what that cost.",
)
app.add_typer(compress.app, name="compress")
app.add_typer(search.app, name="search")
app.command("plan")(plan.plan)
app.command("recover")(recover.recover)
app.command("export")(export.export)
app.command("eval")(measure.evaluate)
app.command("study")(study.study)
app.command("generate")(study.generate)
app.command("report")(report.report)
app.command("doctor")(measure.doctor)


def main() -> None:
    """Run a command; what layerfold raises on purpose becomes one line and exit code 2."""
    try:
        app()
    except LayerfoldError as error:
        print(f"layerfold: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
