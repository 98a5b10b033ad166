"""What one run of a study leaves behind: one JSON file a variant and evaluator, and the study's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from layerfold.errors import InputError
from layerfold.files import Json, hash_json, write_text

BASE_LABEL = "base"
RECOVERY = "recovery"
"""Stands for an evaluator in the record of how a variant was trained."""

RESULTS_FILE = "results.json"
_STUDY_FILE = "study.json"
_FORMAT = "layerfold results 1"


@dataclass(frozen=True)
class Record:
    """One measurement of one variant.

    Attributes:
        key: hash of all that determines the measurement.
        label: the variant's name in the recipe; `BASE_LABEL` for the model that all are compared with.
        evaluator: its name, as ``perplexity``, or `RECOVERY`.
        protocol: name and version of the protocol, as ``perplexity-2``.
        score: ``value``, ``low``, ``high``, ``unit``, ``lower_is_better`` and what else the evaluator reports.
        subject: what was hashed into the key: base weights, method, calibration, settings, seed.
        notes: what the method found (as the mean correlation of each matched pair).
        environment: versions, threads, processor.
        seconds: how long the measurement took.
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
        labels: the rows: the variants' names, `BASE_LABEL` first, then the `baselines`.
        evaluators: names, in the recipe's order.
        records: by (label, evaluator).
    """

    base: str
    recipe: dict[str, Json]
    labels: tuple[str, ...]
    evaluators: tuple[str, ...]
    records: Mapping[tuple[str, str], Record]

    @property
    def baselines(self) -> tuple[str, ...]:
        """The rows that are no models: what an evaluator's figures are to be compared with."""
        rows = {label for (label, _), record in self.records.items() if "baseline" in record.subject}
        return tuple(label for label in self.labels if label in rows)

    def score(self, label: str, evaluator: str) -> dict[str, Json] | None:
        """Return a score, or None where it has not been measured."""
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
    """Write results into a run's folder, records included, so that a report can be made again without any model.

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
    content = json.loads(json.dumps(content))  # the hash is of what will be read: no tuples, no keys but text
    document = {"format": _FORMAT, "sha256": hash_json(content), "results": content}
    write_text(folder / RESULTS_FILE, json.dumps(document, indent=1))


def read_results(folder: Path) -> Results:
    """Read what `write_results` wrote; the hash in it makes sure that nothing was changed since.

    Raises:
        InputError: the folder is no run's, or its results are missing, damaged or something else.
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
    """Records in a folder, one file each, named by evaluator and key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, evaluator: str, key: str, label: str) -> Record | None:
        """Return the finished record with this key under the label it has now; None if missing or damaged."""
        try:
            document = json.loads(self._path(evaluator, key).read_text(encoding="utf-8"))
            return Record(**{**document, "label": label}) if document["key"] == key else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, record: Record) -> None:
        """Write a record atomically."""
        text = json.dumps(asdict(record), indent=1)
        write_text(self._path(record.evaluator, record.key), text)

    def _path(self, evaluator: str, key: str) -> Path:
        return self.directory / f"{evaluator}-{key[:24]}.json"
