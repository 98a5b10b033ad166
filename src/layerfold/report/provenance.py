"""Where the figures come from: the protocols, what the methods found, and the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerfold.files import Json
from layerfold.records import RECOVERY, Record, Results
from layerfold.report.study import COLUMNS
from layerfold.report.tables import MISSING

NOT_A_SETTING = {"value", "low", "high", "unit", "lower_is_better", "parameters", "base_value", "mean", "deviation"} | {
    column.key for column in COLUMNS if column.evaluator != RECOVERY
}

Listing = list[tuple[str, str]]
"""Names with their values, as shown."""


@dataclass(frozen=True)
class Protocol:
    """How an evaluator measured: its protocols (one, unless records of two versions meet) and its settings."""

    evaluator: str
    versions: Sequence[str]
    settings: Listing
    published: bool


@dataclass(frozen=True)
class Pair:
    """A block matched to an anchor: the mean correlation of their neurons, and that without alignment."""

    anchor: int
    correlation: float
    unaligned: float

    @property
    def tenth(self) -> int:
        """The correlation in tenths, 0 to 10, for shading."""
        return round(10 * self.correlation) if 0 <= self.correlation <= 1 else 0


@dataclass(frozen=True)
class MatchedPairs:
    """The pairs of every variant that has any, by label and block; anchors is what each variant matched to."""

    blocks: Sequence[int]
    rows: Mapping[str, Mapping[int, Sequence[Pair]]]
    anchors: Mapping[str, frozenset[int]]


def protocols(results: Results) -> list[Protocol]:
    """Return the protocol of each evaluator that has been measured."""
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
                    settings.setdefault(key, []).append(_phrase(value))
        if records:
            versions = list(dict.fromkeys(record.protocol for record in records))
            entries = [(_words(key), "; ".join(dict.fromkeys(values))) for key, values in settings.items()]
            published = any(record.score.get("protocol") == "published" for record in records)
            found.append(Protocol(evaluator, versions, entries, published))
    return found


def matched_pairs(results: Results) -> MatchedPairs:
    """Return the correlations that merging and collapsing found, variant by block."""
    rows: dict[str, dict[int, list[Pair]]] = {}
    anchors: dict[str, set[int]] = {}
    for label, notes in _notes(results):
        for pair in notes.get("pairs") or ():
            entry = Pair(pair["anchor"], pair["correlation"], pair["unaligned"])
            rows.setdefault(label, {}).setdefault(pair["block"], []).append(entry)
            anchors.setdefault(label, set()).add(pair["anchor"])
    involved = set().union(*rows.values(), *anchors.values())
    return MatchedPairs(sorted(involved), rows, {label: frozenset(found) for label, found in anchors.items()})


def other_notes(results: Results) -> list[tuple[str, Listing]]:
    """Return what else the methods noted, by label."""
    listings = (
        (label, [_note(key, value) for key, value in notes.items() if key != "pairs"])
        for label, notes in _notes(results)
    )
    return [(label, entries) for label, entries in listings if entries]


def environments(results: Results) -> list[Listing]:
    """Return each distinct environment that records were made in."""
    found = [listing(record.environment) for record in _records(results)]
    return [entries for index, entries in enumerate(found) if entries and entries not in found[:index]]


def listing(values: Mapping[str, Json]) -> Listing:
    """Return names with their values as the page lists them."""
    return [(_words(name), _phrase(value)) for name, value in values.items()]


def _phrase(value: Json) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_phrase(of)}" for name, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_phrase, value))
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
    """What a method noted: what a search scored, and of a repair the share of each block's target that is missed."""
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
