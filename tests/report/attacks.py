"""Results, and reports of every kind, in which every text that someone else writes is an attack on the page."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from made import (
    generation_score,
    make_found,
    make_plan,
    make_record,
    make_recovered,
    make_results,
    make_windows,
    pairs_of,
    size_score,
)
from pages import HOSTILE, report_of
from plans import saying

from layerfold.records import Results
from layerfold.report.report import Report


def hostile_results() -> Results:
    """Results in which every text that someone else writes is an attack on the page."""
    hostile = HOSTILE
    sample = {"prompt": hostile, "text": f"{hostile}</p></style>{{{{ 7 * 7 }}}}", "repeated_fraction": float("nan")}
    size = size_score(6566016, 12) | {"dtype": hostile}
    generation = generation_score(1) | {"samples": [sample]}
    results = make_results(
        rename={"merged_2": hostile},
        replace={
            (hostile, "size"): make_record(
                hostile,
                "size",
                size,
                notes={"pairs": pairs_of("merged_2"), hostile: hostile},
                environment={"processor": hostile},
                subject={"method": hostile},
            ),
            (hostile, "generation"): make_record(hostile, "generation", generation, protocol=hostile),
        },
    )
    return Results(hostile, {"base": hostile}, results.labels, results.evaluators, results.records)


def hostile_recovery() -> Results:
    """Results in which all that recovery says is an attack on the page."""
    hostile = HOSTILE
    results = make_recovered(
        {hostile: {"method": hostile, "best_step": 0}, "merged_4": {"method": "&lt;b>", "curve": {"validation": []}}},
        rename={"merged_2": hostile},
    )
    changed = {
        (label, evaluator): replace(
            found, subject={"method": hostile, "settings": {hostile: hostile}}, protocol=hostile
        )
        for (label, evaluator), found in results.records.items()
        if label == hostile
    }
    return replace(results, records={**results.records, **changed})


@functools.cache
def hostile(kind: str) -> Report:
    """A report in which every text that someone else writes is an attack on the page; its drawings are made once."""
    model = f"{HOSTILE}\x1b\x00\ud800</title></style>{{{{ 7 * 7 }}}}"
    texts = ("text", "test_text", "environment")
    attack: dict[str, Any] = {HOSTILE: HOSTILE}
    if kind in ("study", "recovered"):
        return report_of(hostile_results() if kind == "study" else hostile_recovery())
    if kind == "drop":
        attack["list"] = [HOSTILE, {HOSTILE: HOSTILE}]
        found = make_found(model=model, **dict.fromkeys((*texts, "work"), attack))
        return report_of(replace(found, settings=attack | {"part": HOSTILE}))
    if kind == "window":
        attack["share"] = {HOSTILE: HOSTILE}
        return report_of(make_windows(model=model, **dict.fromkeys((*texts, "work", "settings"), attack)))
    plain = make_plan()
    first = saying(plain.trials[1], HOSTILE, HOSTILE)
    endless = saying(plain.trials[2], HOSTILE, perplexity=float("inf"))
    planned = replace(
        plain,
        model=model,
        trials=(plain.base, first, endless, *plain.trials[3:]),
        settings=plain.settings | attack | {"corpus": HOSTILE},
        **dict.fromkeys(texts, attack),
    )
    return report_of(planned)
