"""The HTML page of a search."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from layerfold.report import numerals
from layerfold.report.provenance import listing
from layerfold.report.search_columns import best, best_table, candidate_table, condensed, counted, footnotes, noun
from layerfold.report.search_plots import sensitivity, trade_off
from layerfold.report.template import write_page
from layerfold.search.found import Candidate, Found

MOST_CANDIDATES = 500


def write_search_html(found: Found, path: Path) -> None:
    """Write what a search found as one page: tables, plots, texts, settings, work and environment.

    The same findings give the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    candidates = candidate_table(found, MOST_CANDIDATES)
    write_page(
        path,
        "search.html.j2",
        kind="search",
        title=found.model,
        summary=_summary(found),
        noun=noun(found),
        best=best_table(found),
        candidates=candidates,
        footnotes=footnotes(found, candidates),
        timed=bool(found.timings),
        plots=[(plot, Markup(plot.svg)) for plot in (trade_off(found), sensitivity(found))],
        selection_text=listing(found.text),
        test_text=listing(found.test_text),
        settings=listing(found.settings | {"model": found.model, "model_sha256": found.model_sha256}),
        work=listing(found.work),
        environment=listing(found.environment),
    )


def _summary(found: Found) -> str:
    """Return one sentence: how much was looked at, and what removing the least and the most costs."""
    sets, parts = counted(len(found.candidates), "set"), counted(found.parts, noun(found))
    subject = f"{sets} of {found.model}'s {parts} measured"
    chosen = best(found)[1:]
    findings = [_finding(found, candidate) for candidate in dict.fromkeys((*chosen[:1], *chosen[-1:]))]
    return f"{subject}: {'; '.join(findings)}." if findings else f"{subject}."


def _finding(found: Found, candidate: Candidate) -> str:
    test, timing = found.tests.get(candidate.removed), found.timings.get(len(candidate.removed))
    text = "selection" if test is None else "test"
    ratio = candidate.perplexity / found.base.perplexity if test is None else test.versus_base.value
    speed = "" if timing is None else f", at {numerals.times(timing.speedup.value)} times its speed"
    return (
        f"without {noun(found)}{'s' * (len(candidate.removed) > 1)} {condensed(candidate)}, perplexity on the {text} "
        f"text is {numerals.times(ratio)} times the base's{speed}"
    )
