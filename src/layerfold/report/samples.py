"""Text that variants wrote after the same prompts."""

from __future__ import annotations

from dataclasses import dataclass

from layerfold.records import Results
from layerfold.report import numerals
from layerfold.report.tables import MISSING


@dataclass(frozen=True)
class Sample:
    """What a variant wrote after a prompt."""

    label: str
    text: str
    repeated: str


def samples_of(results: Results) -> list[tuple[str, list[Sample]]]:
    """Return each prompt with what every variant wrote after it."""
    prompts: dict[str, list[Sample]] = {}
    for label in results.labels:
        for sample in (results.score(label, "generation") or {}).get("samples", ()):
            repeated = sample.get("repeated_fraction")
            shown = MISSING if repeated is None else numerals.rough_percent(repeated)
            prompts.setdefault(sample["prompt"], []).append(Sample(label, sample["text"], shown))
    return list(prompts.items())
