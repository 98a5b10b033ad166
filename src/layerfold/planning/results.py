"""What a plan leaves behind: one JSON document, and the recipe of its winner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import hash_weights
from layerfold.errors import OutputError
from layerfold.planning.budget import Budget
from layerfold.planning.candidates import Candidate
from layerfold.planning.trials import Trial, as_json
from layerfold.search.results import FORMAT_VERSION, HeldOutScore, Timing, bounds

RESULT = "plan.json"
LABEL = "planned"


@dataclass(frozen=True)
class Winner:
    """What was built.

    Attributes:
        candidate: what was done.
        trial: what it comes to on the selection text.
        test: what it comes to on the test text.
        latency: beside the model; None where nothing was timed.
    """

    candidate: Candidate
    trial: Trial
    test: HeldOutScore
    latency: Timing | None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan found.

    Attributes:
        model, model_sha256: the model's name, and the hash of its weights.
        budget: what was to be met.
        settings: all that determines the plan besides the model and the text.
        text, test_text: corpus, split, tokens and hashes of the selection text and of the test text.
        base, base_test, base_latency: the model as it is: on the two, and timed.
        trials: all that was tried, the model as it is among it.
        winner: what was built.
        environment: versions, threads, processor.
    """

    model: str
    model_sha256: str
    budget: Budget
    settings: dict[str, Any]
    text: dict[str, Any]
    test_text: dict[str, Any]
    base: Trial
    base_test: HeldOutScore
    base_latency: Timing | None = None
    trials: Sequence[Trial]
    winner: Winner
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the winner is within the budget: a perplexity as estimated on the test text, a speed as timed."""
        figures = {
            "parameters": self.winner.trial.parameters,
            "perplexity": self.winner.test.versus_base.value,
            "speedup": 0.0 if self.winner.latency is None else self.winner.latency.speedup.value,
        }
        return self.budget.meets(figures[self.budget.kind])

    @property
    def front(self) -> list[Trial]:
        """The trials, finalists' whole repairs apart, than which none with as few parameters has a lower perplexity."""
        best, found = float("inf"), []
        tried = [trial for trial in self.trials if not trial.whole]
        for trial in sorted(tried, key=lambda each: (each.parameters, each.perplexity)):
            if trial.perplexity < best:
                best = trial.perplexity
                found.append(trial)
        return found

    def recipe(self, base: str, revision: str | None = None) -> dict[str, Any]:
        """Return the recipe of a study that makes the winner again, as its row, and measures it.

        Args:
            base: the name that the model was loaded by.
        """
        settings = self.settings
        return {
            "base": base,
            **({} if revision is None else {"revision": revision}),
            "variants": [self.winner.candidate.row(LABEL)],
            "evaluate": [
                "size",
                {"perplexity": {"corpus": settings["corpus"], "limit_tokens": settings["test_tokens"]}},
                *(["latency"] if settings["rounds"] else []),
            ],
            "calibration": {
                "corpus": settings["corpus"],
                "tokens": settings["calibration_tokens"],
                "repair_tokens": settings["repair_tokens"],
            },
            "seed": settings["seed"],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the document that is written."""
        winner = self.winner
        return {
            "format_version": FORMAT_VERSION,
            "search": "plan",
            "model": self.model,
            "model_sha256": self.model_sha256,
            "budget": asdict(self.budget) | {"met": self.met},
            "settings": self.settings,
            "text": self.text,
            "test_text": self.test_text,
            "base": {**as_json(self.base), "test": _held_out(self.base_test), **_timed(self.base_latency)},
            "trials": [as_json(trial) for trial in self.trials],
            "front": [trial.row for trial in self.front],
            "winner": {
                **as_json(winner.trial),
                "test": _held_out(winner.test),
                **_timed(winner.latency),
            },
            "environment": self.environment,
        }


def check_model(folder: Path, model: Model) -> None:
    """Raise OutputError for a folder with a plan of another model, which this one's would replace."""
    try:
        document = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        other, name = document["model_sha256"], document["model"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if other != hash_weights(model.decoder.model):
        raise OutputError(
            f"the output folder {str(folder)!r} holds a plan of another model ({name}, weights {str(other)[:12]}...); "
            "--overwrite replaces it"
        )


def _held_out(test: HeldOutScore) -> dict[str, Any]:
    return {"perplexity": bounds(test.perplexity), "versus_base": bounds(test.versus_base)}


def _timed(timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {}
    return {"milliseconds": bounds(timing.milliseconds), "speedup": bounds(timing.speedup)}
