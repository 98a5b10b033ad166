"""The HTML page of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from layerfold.planning import Planned
from layerfold.report import numerals
from layerfold.report.plan import asked, done, front_table, outcome, trials_table, winner_table
from layerfold.report.plan_plots import trials_plot
from layerfold.report.provenance import listing
from layerfold.report.search import counted, timing_check
from layerfold.report.template import write_page
from layerfold.settings import yaml_text


def write_plan_html(planned: Planned, path: Path, recipe: dict[str, Any]) -> None:
    """Write what a plan found as one page: tables, plot, texts, settings, environment and the winner's recipe.

    The same findings give the same bytes.

    Args:
        recipe: the winner's, see `Planned.recipe`.

    Raises:
        OutputError: the file cannot be written.
    """
    plot = trials_plot(planned)
    write_page(
        path,
        "plan.html.j2",
        kind="plan",
        title=planned.model,
        summary=_summary(planned),
        winner=winner_table(planned),
        front=front_table(planned),
        trials=trials_table(planned),
        plots=[(plot, Markup(plot.svg))],
        selection_text=listing(planned.text),
        test_text=listing(planned.test_text),
        settings=listing(planned.settings | {"model": planned.model, "model_sha256": planned.model_sha256}),
        work=[],
        environment=listing(planned.environment),
        recipe=yaml_text(recipe),
    )


def _summary(planned: Planned) -> str:
    """Say what was asked for, what was found, what that costs, and whether it is what was asked for."""
    winner = planned.winner
    gone = 1 - winner.trial.parameters / planned.base.parameters
    speed = "" if winner.latency is None else f", at {numerals.times(winner.latency.speedup.value)} times its speed"
    check = timing_check(planned.base_latency)
    checked = f" {check[0].upper()}{check[1:]}." if check else ""
    return (
        f"Asked for: {asked(planned.budget)}. Found, of {counted(len(planned.trials), 'trial')}: {done(winner.trial)}. "
        f"It has {numerals.percent(gone)} fewer parameters than {planned.model}, and perplexity on the test text is "
        f"{numerals.times(winner.test.versus_base.value)} times the base's{speed}. "
        f"The budget is {outcome(planned)}.{checked}"
    )
