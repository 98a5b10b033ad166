"""The reports of searches, for blocks to drop and for windows of blocks to share, and what plans' have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerfold.report import numerals
from layerfold.report import search_columns as columns
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
    Printed,
    Report,
    Section,
    Table,
    counted,
    figures,
    sentence,
    summed_up,
    table_of,
)
from layerfold.report.search_columns import best, condensed, described, noun, ranked, removed, spanned
from layerfold.report.search_plots import sensitivity, sizes, starts, trade_off
from layerfold.search.results import Candidate, Document, Figures, Found, FoundWindows, Searched, Window

MOST_ON_PAGE = 500
MOST_TOGETHER = 15
MOST_WINDOWS = 100

INTERVALS = "95% intervals below the values"
QUICKLY_REPAIRED = (
    "candidates are listed with each block repaired by itself, the best of each number with a whole repair"
)
CHOSEN = "chosen on the selection text. A figure on the test text stands above its 95% interval"


def drop_report(found: Found) -> Report:
    """Return what a search for blocks to drop found: the sets that were measured, and the best of each number."""
    what, check = noun(found), columns.timing_check(found.timing(found.base))
    subject = f"{counted(len(found.candidates), 'set')} of {found.model}'s {counted(found.parts, what)} measured"
    depends = (
        f"It depends on the architecture alone, that is on how many {what}s are removed and not on which: it is "
        f"measured once for each number, in turns with the base.{sentence(check)}"
    )
    plotted = (
        "Perplexities are those of the selection text. A set is on the Pareto front if none that leaves as few "
        f"{what}s or fewer has a lower perplexity."
    )
    return _searched(
        found,
        summed_up(subject, [_finding(found, each) for each in _ends(best(found))]),
        _printed(found, MOST_TOGETHER, "quartiles below ms/token" if found.timings else "", check),
        costs_section("What removing costs", [trade_off(found), sensitivity(found)], plotted),
        "the best of each number removed",
        [Card([Line(depends)], "Latency")] if found.timings else [],
    )


def window_report(found: FoundWindows) -> Report:
    """Return what a search for a window found: the windows that were measured, and the best of each size."""
    sharing = phrase(found.settings.get("share"))
    subject = f"{counted(len(found.candidates), 'window')} of {found.model}'s blocks measured"
    shared = f"Each window is shared by itself, the other blocks being the base’s: {sharing}."
    plotted = (
        "A window’s blocks share one FFN base, each with a low-rank delta of its own. The dashed line is the base’s "
        "perplexity."
    )
    plots = [*starts(found), *([sizes(found)] if len(found.best) > 1 else [])]
    return _searched(
        found,
        summed_up(subject, [_window_finding(found, each) for each in _ends(best(found))]),
        [*_printed(found, MOST_WINDOWS), Line(f"shared with {sharing}")],
        costs_section("What sharing costs", plots, plotted),
        "the best window of each size",
        [Card([Line(shared)], "Sharing")],
    )


def candidate_table(found: Searched[Any], most: int) -> Table:
    """Return the base and the candidates.

    Of sets of blocks: each block alone, as in the published tables, then the best `most` others, best first. Of
    windows: the best `most`, in order.
    """
    rows: Sequence[Any]
    shown: Sequence[Column]
    if isinstance(found, Found):
        alone = [candidate for candidate in found.candidates if len(candidate.removed) == 1]
        together = ranked(found, [candidate for candidate in found.candidates if len(candidate.removed) > 1])
        rows = [*alone, *together[:most]]
        shown = (
            *(columns.parts_left(found), columns.PERPLEXITY, columns.MEDIAN, columns.PARAMETERS),
            *(columns.PERPLEXITY_CHANGE, columns.SPEED_CHANGE, columns.KL),
        )
    else:
        kept = {window.changed for window in ranked(found, found.candidates)[:most]}
        rows = [each for each in found.candidates if each.changed in kept]
        shown = (columns.PARAMETERS, columns.REMOVED, columns.PERPLEXITY, columns.RATIO, columns.KL)
    return _table(found, shown, rows, "candidates", "Perplexity and KL are those of the selection text.")


def best_table(found: Searched[Any]) -> Table:
    """Return the base and the best of each number of blocks, with what they score on the test text."""
    shown: Sequence[Column]
    if isinstance(found, Found):
        shown = (columns.parts_left(found), columns.SELECTED, *columns.TESTS, *columns.TIMES, columns.PARAMETERS)
        caption = f"The best of each number removed, {CHOSEN}; a time, above its quartiles."
    else:
        shown = (columns.PARAMETERS, columns.REMOVED, columns.SELECTED, *columns.TESTS)
        caption = f"The best window of each size, {CHOSEN}."
    return _table(found, shown, best(found), "best", caption)


def texts_line(found: Document[Any]) -> Line:
    """Say which text was selected on, and which was tested on."""
    return Line(f"chosen on {described(found.text)}; tested on {described(found.test_text)}")


def costs_section(title: str, plots: Sequence[Plot], note: str) -> Section:
    """Return the drawings of a search or a plan."""
    return Section("plots", title, [Plots(plots, "no candidate has the figure"), Line(note)])


def method_section(found: Document[Any], tested: str, method: Sequence[Card], work: Sequence[Card] = ()) -> Section:
    """Return how a search or a plan measured: its texts, what is particular to it, and its settings.

    Args:
        tested: what was measured on the test text besides the base.
    """
    selected = (
        "Candidates are compared on it. The best of many looks better than it is: its cost is read from the test text."
    )
    held_out = f"It took no part in choosing. Only the base and {tested} are measured on it."
    settings = found.settings | {"model": found.model, "model_sha256": found.model_sha256}
    cards = [
        Card([Line(selected), listing(found.text)], "Selection text"),
        Card([Line(held_out), listing(found.test_text)], "Test text"),
        *method,
        Card([listing(settings)], "Settings"),
        *work,
    ]
    return Section("protocols", "How it was measured", [Cards(cards)])


def environment_section(found: Document[Any], *more: Part) -> Section:
    """Return where a search or a plan ran, and what else belongs at the end."""
    return Section("environment", "Environment", [Cards([Card([listing(found.environment)])]), *more])


def _searched(
    found: Searched[Any],
    summary: str,
    printed: Sequence[Printed],
    costs: Section,
    tested: str,
    method: Sequence[Card],
) -> Report:
    candidates = candidate_table(found, MOST_ON_PAGE)
    below = [Line(f"{note}.") for note in _footnotes(found, candidates)]
    about = Line("What the search computed, and what measuring each candidate by itself takes.")
    sections = [
        Section("results", "Results", [best_table(found), Details("Candidates", [candidates, *below])]),
        costs,
        method_section(found, tested, method, [Card([about, listing(found.work)], "Work")] if found.work else []),
        environment_section(found),
    ]
    rows = [_row(found, candidate) for candidate in (found.base, *found.candidates)]
    return Report("search", found.model, summary, printed, rows, sections)


def _printed(found: Searched[Any], most: int, *notes: str) -> list[Printed]:
    candidates = candidate_table(found, most)
    footnotes = "; ".join(_footnotes(found, candidates))
    said = "; ".join(filter(None, (INTERVALS if found.tests or found.timing(found.base) else "", *notes)))
    return [
        candidates,
        *([Line(footnotes), Line("")] if footnotes else []),
        best_table(found),
        *([Line(said)] if said else []),
        texts_line(found),
    ]


def _footnotes(found: Searched[Any], table: Table) -> list[str]:
    """Return the notes below a table of candidates: what was repaired, and how many are left out and why."""
    # One row is the base's.
    more = len(found.candidates) + 1 - len(table.rows)
    given_up = "given up in the race, before all of the text was read"
    repaired = found.settings.get("objective") == "repaired"
    return [
        *([QUICKLY_REPAIRED] if repaired else []),
        *([f"{counted(more, 'more candidate')} in the CSV file"] if more else []),
        *([f"{counted(found.eliminated, 'more candidate')} {given_up}"] if found.eliminated else []),
    ]


def _table(found: Searched[Any], shown: Sequence[Column], rows: Sequence[Any], name: str, caption: str) -> Table:
    header = "removed" if isinstance(found, Found) else "window (blocks)"
    return table_of(found, shown, [found.base, *rows], _label, header, found.base, name, caption)


def _label(candidate: Candidate | Window) -> str:
    if isinstance(candidate, Candidate):
        return removed(candidate)
    return f"{candidate.name} ({spanned(candidate)})" if candidate.blocks else columns.NONE


def _row(found: Searched[Any], candidate: Candidate | Window) -> dict[str, Figure]:
    """Return what the CSV file holds of a candidate: whether it is the best of its size, and its test score too."""
    own = (columns.PERPLEXITY, columns.KL, columns.PARAMETERS)
    place: Mapping[str, Figure]
    shown: Sequence[Column]
    if isinstance(candidate, Candidate):
        place = {"removed": removed(candidate)}
        shown = (columns.BLOCKS, *own, columns.MEDIAN, *columns.CHANGES, columns.SPEED_CHANGE)
    else:
        blocks = candidate.blocks
        place = {"window": columns.name(candidate), "start": blocks[0] if blocks else None, "k": len(blocks) or None}
        shown = (*own, *columns.CHANGES)
    chosen = found.best.get(len(candidate.changed), found.base).changed
    own_best = {"best": candidate.changed == chosen}
    return {**place, **figures(shown, found, candidate), **own_best, **figures(columns.TESTS, found, candidate)}


def _ends(chosen: Sequence[Any]) -> list[Any]:
    """Return the first and the last, which may be the same."""
    return list(dict.fromkeys((*chosen[:1], *chosen[-1:])))


def _finding(found: Found, candidate: Candidate) -> str:
    timing = found.timing(candidate)
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
    factor = columns.ratio(found, candidate) if test is None else test.versus_base.value
    return f"perplexity on the {text} text is {numerals.times(factor)} times the base's"
