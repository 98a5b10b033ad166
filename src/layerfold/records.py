"""The records of a study: one JSON file for each variant and evaluator, and one of the whole study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from layerfold.errors import InputError
from layerfold.files import Json, hash_json, write_text

BASE_LABEL = "base"
RECOVERY = "recovery"
"""The evaluator's name in the record of a variant's training."""
RESULTS_FILE = "results.json"
_STUDY_FILE = "study.json"
_FORMAT = "layerfold results 1"


@dataclass(frozen=True)
class Record:
    """One measurement of one variant.

    Attributes:
        key: hash of all that determines the measurement.
        label: the variant's name in the recipe; `BASE_LABEL` for the base.
        evaluator: name of the evaluator, as ``perplexity``, or `RECOVERY`.
        protocol: name and version of the protocol, as ``perplexity-2``.
        score: ``value``, ``low``, ``high``, ``unit``, ``lower_is_better`` and the evaluator's details.
        subject: document behind the key: base weights, method, calibration, settings, seed.
        notes: the method's notes, as the mean correlation of each matched pair.
        environment: versions, threads, processor.
        seconds: duration of the measurement.
    """

    key: str
    label: str
    evaluator: str
    protocol: str
    score: dict[str, Json]
    subject: dict[str, Json]
    notes: dict[str, Json]
    environment: dict[str, Json]
    seconds: float


@dataclass(frozen=True)
class Results:
    """All records of a study, in the recipe's order.

    Attributes:
        base: the base model's name.
        recipe: the resolved recipe.
        labels: names of the rows: `BASE_LABEL`, the variants, then the `baselines`.
        evaluators: names of the evaluators, in the recipe's order.
        records: records by (label, evaluator).
    """

    base: str
    recipe: dict[str, Json]
    labels: tuple[str, ...]
    evaluators: tuple[str, ...]
    records: Mapping[tuple[str, str], Record]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Labels of the evaluators' baselines, which are not models."""
        rows = {label for (label, _), record in self.records.items() if "baseline" in record.subject}
        return tuple(label for label in self.labels if label in rows)

    def score(self, label: str, evaluator: str) -> dict[str, Json] | None:
        """Return a score; None where it has not been measured."""
        record = self.records.get((label, evaluator))
        return None if record is None else record.score

    def to_json(self) -> dict[str, Json]:
        """Return one document: the recipe, and for each variant its scores, notes and environment."""
        variants = [
            {
                "label": label,
                "scores": {name: self.records[label, name].score for name in self._measured(label)},
                "notes": next((self.records[label, name].notes for name in self._measured(label)), {}),
            }
            for label in self.labels
        ]
        environments = [record.environment for record in self.records.values()]
        return {
            "base": self.base,
            "recipe": self.recipe,
            "environment": environments[-1] if environments else {},
            "variants": variants,
        }

    def _measured(self, label: str) -> list[str]:
        return [name for name in self.evaluators if (label, name) in self.records]


def write_results(results: Results, folder: Path) -> None:
    """Write results and records into a run's folder, from which a report can be made without any model.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {
        "base": results.base,
        "recipe": results.recipe,
        "labels": results.labels,
        "evaluators": results.evaluators,
        "records": [[*place, asdict(record)] for place, record in results.records.items()],
    }
    content = json.loads(json.dumps(content))  # hash the document as it will be read: lists, and keys of text
    document = {"format": _FORMAT, "sha256": hash_json(content), "results": content}
    write_text(folder / RESULTS_FILE, json.dumps(document, indent=1))


def read_results(folder: Path) -> Results:
    """Read the results of `write_results`; their hash shows that nothing has changed since.

    Raises:
        InputError: not a run's folder, or results that are missing, damaged or of another format.
    """
    path = folder / RESULTS_FILE
    again = f"run `layerfold study` with --output-dir {str(folder)!r} again, which measures only what is missing"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(_without_results(folder, again)) from error
    except OSError as error:
        raise InputError(f"cannot read {str(path)[:200]!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is damaged: {again}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise InputError(f"{str(path)!r} is not what `layerfold study` of this version writes: {again}")
    content: Json = document.get("results")
    if document.get("sha256") != hash_json(content):
        raise InputError(f"{str(path)!r} is damaged: {again}")
    return Results(
        base=content["base"],
        recipe=content["recipe"],
        labels=tuple(content["labels"]),
        evaluators=tuple(content["evaluators"]),
        records={(label, evaluator): Record(**record) for label, evaluator, record in content["records"]},
    )


def _without_results(folder: Path, again: str) -> str:
    if not folder.is_dir():
        return f"no folder at {str(folder)!r}; accepted: the folder of a run of `layerfold study`"
    if (folder / _STUDY_FILE).exists():
        return f"the run {str(folder)!r} has no {RESULTS_FILE}, unfinished or of an older version: {again}"
    return f"the folder {str(folder)!r} is no run of `layerfold study`"


class RecordStore:
    """Records in a folder: one file each, named by evaluator and key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, evaluator: str, key: str, label: str) -> Record | None:
        """Return the record with this key under the row's present label; None if it is missing or damaged."""
        try:
            document = json.loads(self._path(evaluator, key).read_text(encoding="utf-8"))
            return Record(**{**document, "label": label}) if document["key"] == key else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, record: Record) -> None:
        """Write a record atomically."""
        write_text(self._path(record.evaluator, record.key), json.dumps(asdict(record), indent=1))

    def _path(self, evaluator: str, key: str) -> Path:
        return self.directory / f"{evaluator}-{key[:24]}.json"
