"""The reports of searches: for blocks to drop, and for windows of blocks to share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerfold.report import numerals
from layerfold.report.provenance import listing, phrase
from layerfold.report.report import (
    Card,
    Cards,
    Column,
    Details,
    Figure,
    Line,
    Part,
    Plot,
    Plots,
    Report,
    Section,
    Table,
    cells,
    certain,
    counted,
    figures,
    sentence,
)
from layerfold.report.search_columns import (
    BLOCKS,
    KL,
    MILLISECONDS,
    NONE,
    PARAMETERS,
    PARAMETERS_CHANGE,
    PERPLEXITY,
    PERPLEXITY_CHANGE,
    RATIO,
    REMOVED,
    SPEED_CHANGE,
    SPEEDUP,
    TEST_PERPLEXITY,
    TEST_RATIO,
    best,
    condensed,
    described,
    left,
    name,
    noun,
    ranked,
    ratio,
    removed,
    spanned,
    timing_check,
)
from layerfold.report.search_plots import sensitivity, sizes, starts, trade_off
from layerfold.search.results import Candidate, Figures, Found, FoundWindows, Searched, Window

MOST_ON_PAGE = 500
MOST_TOGETHER = 15
MOST_WINDOWS = 100

MEDIAN = replace(MILLISECONDS, interval=False, meaning="median time per generated token")
SELECTED = replace(PERPLEXITY, unit="selection")
INTERVALS = "95% intervals below the values"
QUICKLY_REPAIRED = (
    "candidates are listed with each block repaired by itself, the best of each number with a whole repair"
)
CHOSEN = "chosen on the selection text. A figure on the test text stands above its 95% interval"


def drop_report(found: Found) -> Report:
    """Return what a search for blocks to drop found: the sets that were measured, and the best of each number."""
    what, check = noun(found), timing_check(found.timings.get(0))
    subject = f"{counted(len(found.candidates), 'set')} of {found.model}'s {counted(found.parts, what)} measured"
    notes = [
        INTERVALS if found.tests or found.timings else "",
        "quartiles below ms/token" if found.timings else "",
        check,
    ]
    depends = (
        f"It depends on the architecture alone, that is on how many {what}s are removed and not on which: it is "
        f"measured once for each number, in turns with the base.{sentence(check)}"
    )
    return _report(
        found,
        _said(subject, [_finding(found, each) for each in _ends(best(found))]),
        [*_printed(found, candidate_table(found, MOST_TOGETHER), best_table(found), notes)],
        [_row(found, candidate) for candidate in (found.base, *found.candidates)],
        _results(found, best_table(found), candidate_table(found, MOST_ON_PAGE)),
        "What removing costs",
        [trade_off(found), sensitivity(found)],
        "Perplexities are those of the selection text. On the Pareto front are those than which none that leaves as "
        f"few {what}s or fewer has a lower perplexity.",
        "the best of each number removed",
        [Card([Line(depends)], "Latency")] if found.timings else [],
    )


def window_report(found: FoundWindows) -> Report:
    """Return what a search for a window found: the windows that were measured, and the best of each size."""
    sharing = phrase(found.settings.get("share"))
    subject = f"{counted(len(found.candidates), 'window')} of {found.model}'s blocks measured"
    notes = [INTERVALS if found.tests else ""]
    printed = _printed(found, windows_table(found, MOST_WINDOWS), best_windows_table(found), notes)
    shared = f"Each window is shared by itself, the other blocks being the base’s: {sharing}."
    return _report(
        found,
        _said(subject, [_window_finding(found, each) for each in _ends(best(found))]),
        [*printed, Line(f"shared with {sharing}")],
        [_window_row(found, window) for window in (found.base, *found.candidates)],
        _results(found, best_windows_table(found), windows_table(found, MOST_ON_PAGE)),
        "What sharing costs",
        [*starts(found), *([sizes(found)] if len(found.best) > 1 else [])],
        "A window’s blocks share one FFN base, each with a low-rank delta of its own. The dashed line is the base’s "
        "perplexity.",
        "the best window of each size",
        [Card([Line(shared)], "Sharing")],
    )


def candidate_table(found: Found, most: int) -> Table:
    """Return the published tables in one: the base, each block alone, then so many others at most, best first."""
    alone = [candidate for candidate in found.candidates if len(candidate.removed) == 1]
    together = ranked(found, [candidate for candidate in found.candidates if len(candidate.removed) > 1])
    columns = (_left(found), PERPLEXITY, MEDIAN, PARAMETERS, PERPLEXITY_CHANGE, SPEED_CHANGE, KL)
    caption = "Perplexity and KL are those of the selection text."
    return _table(found, columns, [found.base, *alone, *together[:most]], "candidates", caption)


def best_table(found: Found) -> Table:
    """Return the base and the best of each number removed, with what they score on the test text."""
    columns = (_left(found), SELECTED, TEST_PERPLEXITY, TEST_RATIO, MILLISECONDS, SPEEDUP, PARAMETERS)
    caption = f"The best of each number removed, {CHOSEN}; a time, above its quartiles."
    return _table(found, columns, [found.base, *best(found)], "best", caption)


def windows_table(found: FoundWindows, most: int) -> Table:
    """Return the base and the candidates in their order; of more than so many, the best."""
    kept = {window.blocks for window in ranked(found, found.candidates)[:most]}
    columns = (PARAMETERS, REMOVED, PERPLEXITY, RATIO, KL)
    windows = [found.base, *(each for each in found.candidates if each.blocks in kept)]
    return _table(found, columns, windows, "candidates", "Perplexity and KL are those of the selection text.")


def best_windows_table(found: FoundWindows) -> Table:
    """Return the base and the best window of each size, with what they score on the test text."""
    columns = (PARAMETERS, REMOVED, SELECTED, TEST_PERPLEXITY, TEST_RATIO)
    caption = f"The best window of each size, {CHOSEN}."
    return _table(found, columns, [found.base, *best(found)], "best", caption)


def texts_line(text: Mapping[str, Any], test_text: Mapping[str, Any]) -> Line:
    """Say which text was selected on, and which was tested on."""
    return Line(f"chosen on {described(text)}; tested on {described(test_text)}")


def method_section(found: Any, tested: str, method: Sequence[Card], work: Sequence[Card] = ()) -> Section:
    """Return how a search or a plan measured: its texts, what is particular to it, and its settings.

    Args:
        tested: what was measured on the test text besides the base.
    """
    selection = "Candidates are compared on it. Of many, the best looks better than it is: what it costs is read from "
    settings = found.settings | {"model": found.model, "model_sha256": found.model_sha256}
    cards = [
        Card([Line(f"{selection}the test text."), listing(found.text)], "Selection text"),
        Card(
            [
                Line(f"It took no part in choosing. Only the base and {tested} are measured on it."),
                listing(found.test_text),
            ],
            "Test text",
        ),
        *method,
        Card([listing(settings)], "Settings"),
        *work,
    ]
    return Section("protocols", "How it was measured", [Cards(cards)])


def environment_section(found: Any, *more: Part) -> Section:
    """Return where a search or a plan ran, and what else belongs at the end."""
    return Section("environment", "Environment", [Cards([Card([listing(found.environment)])]), *more])


def costs_section(title: str, plots: Sequence[Plot], note: str) -> Section:
    """Return the drawings of a search or a plan."""
    return Section("plots", title, [Plots(plots, "no candidate has the figure"), Line(note)])


def _report(
    found: Searched[Any],
    summary: str,
    printed: Sequence[Line | Table],
    rows: Sequence[Mapping[str, Figure]],
    results: Section,
    costs: str,
    plots: Sequence[Plot],
    plotted: str,
    tested: str,
    method: Sequence[Card],
) -> Report:
    about = Line("What the search computed, and what measuring each candidate by itself takes.")
    work = [Card([about, listing(found.work)], "Work")] if found.work else []
    sections = [
        results,
        costs_section(costs, plots, plotted),
        method_section(found, tested, method, work),
        environment_section(found),
    ]
    return Report("search", found.model, summary, printed, rows, sections)


def _results(found: Searched[Any], best: Table, candidates: Table) -> Section:
    below = [Line(f"{note}.") for note in _footnotes(found, candidates)]
    return Section("results", "Results", [best, Details("Candidates", [candidates, *below])])


def _printed(found: Searched[Any], candidates: Table, best: Table, notes: Sequence[str]) -> Iterator[Line | Table]:
    yield candidates
    if below := _footnotes(found, candidates):
        yield from (Line("; ".join(below)), Line(""))
    yield best
    if any(notes):
        yield Line("; ".join(filter(None, notes)))
    yield texts_line(found.text, found.test_text)


def _footnotes(found: Searched[Any], table: Table) -> list[str]:
    """Return what to say below a table of candidates: how many it leaves out, and why; and what was repaired."""
    # One row is the base's.
    more = len(found.candidates) + 1 - len(table.rows)
    given_up = "given up in the race, before all of the text was read"
    repaired = found.settings.get("objective") == "repaired"
    return [
        *([QUICKLY_REPAIRED] if repaired else []),
        *([f"{counted(more, 'more candidate')} in the CSV file"] if more else []),
        *([f"{counted(found.eliminated, 'more candidate')} {given_up}"] if found.eliminated else []),
    ]


def _table(found: Any, columns: Sequence[Column], candidates: Sequence[Any], title: str, caption: str) -> Table:
    header = "removed" if isinstance(found, Found) else "window (blocks)"
    rows = [(_label(candidate), cells(columns, found, candidate)) for candidate in candidates]
    return Table(header, NONE, columns, rows, title, caption)


def _label(candidate: Candidate | Window) -> str:
    if isinstance(candidate, Candidate):
        return removed(candidate)
    return f"{name(candidate)} ({spanned(candidate)})" if candidate.blocks else NONE


def _left(found: Found) -> Column:
    what = noun(found)
    title, _, unit = f"{what}s left".partition(" ")
    meaning = f"how many {what}s are left"
    return Column(title, unit, meaning, lambda found, each: certain(left(found, each)), numerals.whole)


def _row(found: Found, candidate: Candidate) -> dict[str, Figure]:
    changes = (PARAMETERS_CHANGE, PERPLEXITY_CHANGE, SPEED_CHANGE)
    measured = figures((BLOCKS, PERPLEXITY, KL, PARAMETERS, MEDIAN, *changes), found, candidate)
    return {"removed": removed(candidate), **measured, **_chosen(found, candidate)}


def _window_row(found: FoundWindows, window: Window) -> dict[str, Figure]:
    measured = figures((PERPLEXITY, KL, PARAMETERS, PARAMETERS_CHANGE, PERPLEXITY_CHANGE), found, window)
    place = {"start": window.blocks[0] if window.blocks else None, "k": len(window.blocks) or None}
    return {"window": name(window), **place, **measured, **_chosen(found, window)}


def _chosen(found: Searched[Any], candidate: Figures) -> dict[str, Figure]:
    """Say whether it is the best of its size, and what it scores on the test text."""
    chosen = found.best.get(len(candidate.changed), found.base).changed
    return {"best": candidate.changed == chosen, **figures((TEST_PERPLEXITY, TEST_RATIO), found, candidate)}


def _ends(chosen: Sequence[Any]) -> list[Any]:
    """Return the first and the last, which may be the same."""
    return list(dict.fromkeys((*chosen[:1], *chosen[-1:])))


def _said(subject: str, findings: Sequence[str]) -> str:
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
