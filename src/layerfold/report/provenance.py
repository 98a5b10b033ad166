"""Where the figures come from: the protocols, what the methods found, and the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from layerfold.files import Json
from layerfold.records import RECOVERY, Record, Results
from layerfold.report.columns import COLUMNS
from layerfold.report.report import MISSING, Card, Cards, Details, Line, Listing, Pair, Pairs, Part

NOT_A_SETTING = {"value", "low", "high", "unit", "lower_is_better", "parameters", "base_value", "mean", "deviation"} | {
    column.key for column in COLUMNS if column.evaluator != RECOVERY
}

UNSOUND = "The published protocol, reproduced for comparison with published tables. It is not sound."
APART = "Rows were measured by different versions of the protocol and cannot be compared."


def protocols(results: Results) -> Cards:
    """Return the protocol and the settings of each evaluator that has been measured."""
    found = []
    for evaluator in results.evaluators:
        records = [record for record in _records(results) if record.evaluator == evaluator]
        settings: dict[str, list[str]] = {}
        for record in records:
            given = record.subject.get("settings")
            # A recovery's score holds what came of it, variant by variant, and no settings.
            reported = {} if evaluator == RECOVERY else record.score
            for key, value in [*(given if isinstance(given, dict) else {}).items(), *reported.items()]:
                if key not in NOT_A_SETTING and not isinstance(value, (list, dict)) and value is not None:
                    settings.setdefault(key, []).append(phrase(value))
        if records:
            versions = list(dict.fromkeys(record.protocol for record in records))
            published = any(record.score.get("protocol") == "published" for record in records)
            warnings = [*([UNSOUND] if published else []), *([APART] if len(versions) > 1 else [])]
            entries = [(_words(key), "; ".join(dict.fromkeys(values))) for key, values in settings.items()]
            parts: list[Part] = [*(Line(warning, "warning") for warning in warnings), Listing(entries)]
            found.append(Card(parts, evaluator, ", ".join(versions)))
    return Cards(found)


def matched_pairs(results: Results) -> Pairs:
    """Return the correlations that merging and collapsing found, variant by block."""
    rows: dict[str, dict[int, list[Pair]]] = {}
    anchors: dict[str, set[int]] = {}
    for label, notes in _notes(results):
        for pair in notes.get("pairs") or ():
            entry = Pair(pair["anchor"], pair["correlation"], pair["unaligned"])
            rows.setdefault(label, {}).setdefault(pair["block"], []).append(entry)
            anchors.setdefault(label, set()).add(pair["anchor"])
    involved = set().union(*rows.values(), *anchors.values())
    return Pairs(sorted(involved), rows, {label: frozenset(found) for label, found in anchors.items()})


def other_notes(results: Results) -> list[Details]:
    """Return the other notes of the methods, by variant."""
    listings = (
        (label, [_note(key, value) for key, value in notes.items() if key != "pairs"])
        for label, notes in _notes(results)
    )
    return [Details(label, [Listing(entries)]) for label, entries in listings if entries]


def environments(results: Results) -> Cards:
    """Return each distinct environment that records were made in."""
    found = [listing(record.environment) for record in _records(results)]
    distinct = [each for index, each in enumerate(found) if each.entries and each not in found[:index]]
    return Cards([Card([each]) for each in distinct])


def listing(values: Mapping[str, Json]) -> Listing:
    """Return names with their values as the page lists them."""
    return Listing([(_words(name), phrase(value)) for name, value in values.items()])


def phrase(value: Json) -> str:
    """Write a value in words, with commas between its parts."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {phrase(of)}" for name, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(phrase, value))
    if value is None:
        return MISSING
    return f"{value:,}" if type(value) is int else str(value)


def _records(results: Results) -> Iterator[Record]:
    for label in results.labels:
        for evaluator in results.evaluators:
            if (label, evaluator) in results.records:
                yield results.records[label, evaluator]


def _notes(results: Results) -> Iterator[tuple[str, dict[str, Json]]]:
    for label in results.labels:
        yield label, next((record.notes for record in _records(results) if record.label == label and record.notes), {})


def _words(key: str) -> str:
    return key.replace("_", " ")


def _note(key: str, value: Any) -> tuple[str, str]:
    """Write one note: a search's scores, or the share of each block's target that a repair misses."""
    if key == "search":
        scored = (
            f"{name}: {each:,.4g}" if isinstance(each, float) else name for name, each in value["perplexity"].items()
        )
        text = value["text"]
        return (
            "selection perplexity",
            f"{'; '.join(scored)} (on {text['corpus']}, {text['split']}, {text['tokens']:,} tokens)",
        )
    if key != "repaired":
        return _words(key), _text(value)
    blocks = (f"block {each['block']}: {100 * each['error']:.2f}% -> {100 * each['repaired']:.2f}%" for each in value)
    return "missed of each block's target", "; ".join(blocks)


def _text(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
