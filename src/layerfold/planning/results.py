"""What a plan finds: a JSON document, and the recipe of its winner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from layerfold.checkpoint.card import Figure
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.push import unplaced
from layerfold.environment import environment
from layerfold.errors import OutputError
from layerfold.evaluators import Latency, Perplexity
from layerfold.planning.budget import Budget
from layerfold.planning.trials import Evaluation
from layerfold.search.results import Document, HeldOutScore, Timing

RESULT = "plan.json"
LABEL = "planned"


@dataclass(frozen=True)
class Winner:
    """The model that was built.

    Attributes:
        trial: its configuration and figures on the selection text.
        test: its score on the test text.
        latency: beside the model's; None where nothing was timed.
    """

    trial: Evaluation
    test: HeldOutScore
    latency: Timing | None


@dataclass(frozen=True, kw_only=True)
class Planned(Document[Evaluation]):
    """What a plan found.

    Attributes:
        budget: what had to be met.
        base_test, base_latency: the model itself on the test text, and timed.
        trials: all that was tried, the model itself included.
        winner: what was built.
    """

    kind: ClassVar[str] = "plan"
    budget: Budget
    base_test: HeldOutScore
    base_latency: Timing | None = None
    trials: Sequence[Evaluation]
    winner: Winner

    def test(self, row: Evaluation) -> HeldOutScore | None:
        """Return a trial's score on the test text, which the base and the winner alone have."""
        return {self.winner.trial: self.winner.test, self.base: self.base_test}.get(row)

    def timing(self, row: Evaluation) -> Timing | None:
        """Return a trial's latency, which the base and the winner alone may have."""
        return {self.winner.trial: self.winner.latency, self.base: self.base_latency}.get(row)

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
    def front(self) -> list[Evaluation]:
        """The trials on the Pareto front of parameters and perplexity, the smallest first; whole repairs left out."""
        front: list[Evaluation] = []
        alike = bool(self.settings.get("uniform"))
        tried = [trial for trial in self.trials if not trial.whole and (trial.weighed.as_small or not alike)]
        for trial in sorted(tried, key=lambda trial: (trial.parameters, trial.perplexity)):
            if trial.perplexity < (front[-1].perplexity if front else float("inf")):
                front.append(trial)
        return front

    def figures(self) -> list[Figure]:
        """Return what was measured of the winner, for its model card."""
        test, latency = self.winner.test, self.winner.latency
        read = f"{unplaced(self.settings['corpus'])}, split test, at most {self.settings['test_tokens']:,} tokens"
        protocol = Perplexity().protocol_id
        found = [
            Figure("perplexity", test.perplexity, protocol, read),
            Figure("perplexity, times the base's", test.versus_base, protocol, read),
        ]
        if latency is not None:
            where = f"generating, on {self.environment.get('processor', 'a processor')}"
            found.append(Figure("speed, times the base's", latency.speedup, Latency().protocol_id, where))
        return found

    def recipe(self, base: str, revision: str | None = None) -> dict[str, Any]:
        """Return the recipe of a study that builds the winner again, as its row, and measures it.

        Args:
            base: the name that the model was loaded by.
        """
        settings = self.settings
        return {
            "base": base,
            **({} if revision is None else {"revision": revision}),
            **{name: value for name, value in self.environment.items() if name == "dtype"},
            "variants": [{"label": LABEL, **self.winner.trial.configuration.row}],
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
            **super().to_json(),
            "budget": asdict(self.budget) | {"met": self.met},
            "base": _row(self.base, self.base_test, self.base_latency),
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.configuration.row for trial in self.front],
            "winner": _row(winner.trial, winner.test, winner.latency),
        }


def check_model(folder: Path, model: Model) -> None:
    """Raise OutputError for a folder with a plan of another model, which this one's would replace."""
    try:
        document = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        other, name, ran = document["model_sha256"], document["model"], document["environment"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    computed = environment() | model.decoder.computed
    if other != model.now_sha256 or any(ran.get(key) != computed.get(key) for key in ("device", "dtype")):
        raise OutputError(
            f"the output folder {str(folder)!r} holds a plan of another model ({name}, weights {str(other)[:12]}...); "
            "--overwrite replaces it"
        )


def _row(trial: Evaluation, test: HeldOutScore, latency: Timing | None) -> dict[str, Any]:
    return {**trial.to_json(), "test": test.to_json(), **({} if latency is None else latency.to_json())}
