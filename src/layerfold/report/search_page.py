"""The HTML page of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from layerfold.report import numerals
from layerfold.report.drawing import Plot
from layerfold.report.provenance import listing
from layerfold.report.search import (
    best,
    best_table,
    candidate_table,
    condensed,
    counted,
    footnotes,
    noun,
    ratio,
    timing_check,
)
from layerfold.report.search_plots import sensitivity, trade_off
from layerfold.report.tables import Table
from layerfold.report.template import write_page
from layerfold.report.window_columns import best_windows, best_windows_table, sharing, spanned, windows_table
from layerfold.report.window_plots import sizes, starts
from layerfold.search import Candidate, Found, FoundWindows, Window
from layerfold.search.results import Figures, Searched

MOST_CANDIDATES = 500


def write_search_html(found: Found, path: Path) -> None:
    """Write what a search found as one page: tables, plots, texts, settings, work and environment.

    The same findings give the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    subject = f"{counted(len(found.candidates), 'set')} of {found.model}'s {counted(found.parts, noun(found))} measured"
    findings = [_finding(found, each) for each in _ends(best(found)[1:])]
    _write(
        found,
        path,
        "search.html.j2",
        summary=_sentence(subject, findings),
        best=best_table(found),
        candidates=candidate_table(found, MOST_CANDIDATES),
        plots=(trade_off(found), sensitivity(found)),
        noun=noun(found),
        timed=bool(found.timings),
        timing_check=timing_check(found.timings.get(0)),
    )


def write_windows_html(found: FoundWindows, path: Path) -> None:
    """Write what a search for a window found as one page: tables, plots, texts, settings, work and environment.

    The same findings give the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    subject = f"{counted(len(found.candidates), 'window')} of {found.model}'s blocks measured"
    findings = [_window_finding(found, each) for each in _ends(best_windows(found))]
    _write(
        found,
        path,
        "windows.html.j2",
        summary=_sentence(subject, findings),
        best=best_windows_table(found),
        candidates=windows_table(found, MOST_CANDIDATES),
        plots=(*starts(found), *([sizes(found)] if len(found.best) > 1 else [])),
        sharing=sharing(found),
    )


def _write(
    found: Searched[Any], path: Path, template: str, candidates: Table, plots: Sequence[Plot], **values: Any
) -> None:
    write_page(
        path,
        template,
        kind="search",
        title=found.model,
        candidates=candidates,
        footnotes=footnotes(found, candidates),
        plots=[(plot, Markup(plot.svg)) for plot in plots],
        selection_text=listing(found.text),
        test_text=listing(found.test_text),
        settings=listing(found.settings | {"model": found.model, "model_sha256": found.model_sha256}),
        work=listing(found.work),
        environment=listing(found.environment),
        **values,
    )


def _ends(chosen: Sequence[Any]) -> list[Any]:
    """Return the first and the last, which may be the same."""
    return list(dict.fromkeys((*chosen[:1], *chosen[-1:])))


def _sentence(subject: str, findings: Sequence[str]) -> str:
    """Say how much was looked at, and what removing or sharing the least and the most costs."""
    return f"{subject}: {'; '.join(findings)}." if findings else f"{subject}."


def _finding(found: Found, candidate: Candidate) -> str:
    timing = found.timings.get(len(candidate.removed))
    speed = "" if timing is None else f", at {numerals.times(timing.speedup.value)} times its speed"
    blocks = f"{noun(found)}{'s' * (len(candidate.removed) > 1)} {condensed(candidate)}"
    return f"without {blocks}, {_cost(found, candidate)}{speed}"


def _window_finding(found: FoundWindows, window: Window) -> str:
    gone = 1 - window.parameters / found.base.parameters
    than = f"{numerals.percent(abs(gone))} {'fewer' if gone >= 0 else 'more'} parameters"
    return f"with one FFN base for blocks {spanned(window)}, {_cost(found, window)}, at {than}"


def _cost(found: Searched[Any], candidate: Figures) -> str:
    test = found.test(candidate)
    text = "selection" if test is None else "test"
    factor = ratio(found, candidate) if test is None else test.versus_base.value
    return f"perplexity on the {text} text is {numerals.times(factor)} times the base's"
