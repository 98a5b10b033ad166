"""Every experiment whose figures README or docs show, declared once.

An experiment is a command, as a user types it. Its result is a small file in `results/`, committed. The file is up to
date as long as nothing that determines its figures has changed: the command, the resolved recipe, the model, and the
versions of methods, repairs, recoveries, searches and measurements.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from figures import reading
from layerfold.checkpoint.load import _POCKET_FOLDER
from layerfold.checkpoint.model import POCKET_VERSION
from layerfold.evaluators import Latency, Perplexity
from layerfold.files import hash_file, hash_json
from layerfold.methods import METHODS, Drop
from layerfold.planning.trials import PROTOCOL as PLAN
from layerfold.recovery import RECOVERIES
from layerfold.repair.repair import PROTOCOL as REPAIR
from layerfold.search.drop import PROTOCOL as DROP
from layerfold.search.selection import RACE
from layerfold.search.share import PROTOCOL as WINDOW
from layerfold.study.recipe import PRESETS, Recipe, read_recipe
from layerfold.study.rows import Budgeted, Built, Row, Student, Trained

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RUNS = ROOT / "runs" / "figures"
COSTS = RESULTS / "costs.json"
"""What each experiment took; no result, since it differs from run to run."""

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

VERSIONS = {
    "perplexity": Perplexity().protocol_id,
    "latency": Latency().protocol_id,
    "repair": REPAIR,
    "plan": PLAN,
    "drop": DROP,
    "window": WINDOW,
    "race": RACE,
    **{name: f"{name}-{kind.version}" for name, kind in RECOVERIES.items()},
    **{f"method {name}": f"{name}@{kind.version}" for name, kind in METHODS.items()},
}
"""Code versions that an experiment may name in `uses`."""
PLANNED = ("plan", "repair", "race", "perplexity", *(f"method {name}" for name in METHODS))
"""Those behind a plan."""


@dataclass(frozen=True)
class Experiment:
    """A command, and what becomes of it.

    Attributes:
        name: of its file in `results/`.
        command: as typed from the root of the repository. The runner adds where the output goes.
        minutes: estimated time on one thread of a processor, or on the device that it needs.
        read: returns the small result from the folder, or the file, that the command wrote.
        uses: keys of `VERSIONS` that the command's figures depend on, beside those that its recipe names.
        version: a new one where the code of a benchmark has changed its figures.
        timed: whether it measures time or memory, so that it needs an idle machine; its file differs from run to run.
        device: where it computes: ``any`` where the runner says, ``cpu`` or ``cuda``.
    """

    name: str
    command: str
    minutes: float
    read: Callable[[Path], dict[str, Any]]
    uses: tuple[str, ...] = ()
    version: int = 1
    timed: bool = False
    device: str = "any"

    @property
    def result(self) -> Path:
        """Where the result is written."""
        return RESULTS / f"{self.name}.json"

    @property
    def needs(self) -> str:
        """The file that has to be named before it can run; empty where none."""
        return SMOLLM2 if SMOLLM2 in self.command else ""

    def key(self, device: str = "cpu") -> str:
        """Hash of all that determines the figures, where models compute on a device; in float32 on all of them."""
        found = self.determined()
        return hash_json(found if device == "cpu" else found | {"device": device})[:16]

    def determined(self) -> dict[str, Any]:
        """Return all that determines the figures, as JSON."""
        recipe = self.recipe()
        versions = {name: VERSIONS[name] for name in self.uses}
        found = {
            "command": self.command,
            "version": self.version,
            "reading": reading.VERSION,
            "model": self._model(),
            "versions": versions,
        }
        return found if recipe is None else found | {"recipe": recipe.to_json(), "versions": _versions(recipe)}

    def recipe(self) -> Recipe | None:
        """Return the recipe of a study."""
        words = shlex.split(self.command)
        if words[:2] != ["layerfold", "study"]:
            return None
        if "--preset" in words:
            return read_recipe({"extends": words[words.index("--preset") + 1]})
        return read_recipe(ROOT / words[2]) if len(words) > 2 else read_recipe({"extends": next(iter(PRESETS))})

    def _model(self) -> str:
        return f"{SMOLLM2} {SMOLLM2_SHA256}" if self.needs else f"{POCKET_VERSION} {_pocket()}"

    def stored(self) -> dict[str, Any] | None:
        """Return the result, or None where there is none."""
        if not self.result.is_file():
            return None
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found

    def up_to_date(self) -> bool:
        """Whether there is a result that nothing has changed since."""
        found = self.stored()
        return found is not None and found["key"] == self.key(found["device"])


@cache
def _pocket() -> str:
    """Hash of pocket's files."""
    files = sorted(path for path in _POCKET_FOLDER.iterdir() if path.is_file())
    return hashlib.sha256(b"".join(bytes.fromhex(hash_file(path)) for path in files)).hexdigest()


def _versions(recipe: Recipe) -> dict[str, Any]:
    """Return the code versions behind a recipe's figures."""
    found: dict[str, Any] = {each.name: each.protocol_id for each in recipe.evaluate}
    recoveries = [recipe.recovery] if recipe.recovery is not None else []
    for row in (each for variant in recipe.variants for each in _parts(variant.row)):
        match row:
            case Trained():
                recoveries.append(row.recovery)
            case Built():
                found |= {method.name: method.version for method in row.by.steps}
                found |= {"searches": [WINDOW, RACE]} if row.selects else {}
            case Budgeted():
                found |= {name: VERSIONS[name] for name in PLANNED}
            case Student():
                recoveries.append(row.distillation(None))
                found["drop"] = Drop.version
        if row.repaired:
            found["repair"] = REPAIR
    return found | {each.name: f"{each.name}-{each.version}" for each in recoveries}


def _parts(row: Row) -> Iterator[Row]:
    yield row
    if isinstance(row, Trained):
        yield from _parts(row.row)


def _study(name: str, minutes: float, command: str = "", timed: bool = False) -> Experiment:
    read = reading.timed_study if timed else reading.study
    return Experiment(name, command or f"layerfold study recipes/{name}.yaml", minutes, read, timed=timed)


def _benchmark(
    script: str, minutes: float, *words: str, name: str = "", device: str = "cpu", timed: bool = True, **more: Any
) -> Experiment:
    command = " ".join([f"python benchmarks/{script}.py", *words])
    return Experiment(name or script, command, minutes, reading.benchmark, timed=timed, device=device, **more)


_SEARCH = "layerfold search drop --model pocket --rounds 0"

EXPERIMENTS = {
    each.name: each
    for each in (
        # README's
        _study("demo", 5, "layerfold study", timed=True),
        _benchmark(
            "quality", 75, "--calibration-tokens 16384 --recover 32768 --recover-kept 6",
            timed=False, device="any", uses=(*PLANNED, "drop", "distill"),
        ),
        # Methods
        _study("merge", 14),
        _study("merge_fitted", 10),
        Experiment(
            "drop-best", f"{_SEARCH} --all --strategy beam --race", 8, reading.drop_search,
            ("drop", "race", "perplexity"),
        ),
        Experiment("drop-sets", f"{_SEARCH} --remove 1..3", 8, reading.drop_search, ("drop", "perplexity")),
        Experiment(
            "drop-repaired", f"{_SEARCH} --remove 6 --strategy beam --race --objective repaired", 10,
            reading.drop_search, ("drop", "race", "perplexity", "repair"),
        ),
        _study("drop", 3),
        _study("prune", 10),
        _study("taylor", 7),
        _study("pruned_104M", 10),
        Experiment(
            "windows", "layerfold search window --model pocket --k 2..8 --rank 8 --race", 6, reading.window_search,
            ("window", "race", "perplexity", "method share"),
        ),
        _study("share", 14),
        _study("share_forms", 8),
        _study("share_lowrank", 10),
        _study("repair", 16),
        _study("recovery", 26),
        Experiment(
            "plan", "layerfold plan --model pocket --parameters 66% --rounds 0", 10, reading.plan,
            PLANNED,
        ),
        _benchmark(
            "quality", 140,
            f"--model {SMOLLM2} --corpus imdb --kept 27 24 21 18 --calibration-tokens 4096 --test-tokens 8192 "
            "--context 512",
            name="quality-smollm2", timed=False, device="any", uses=(*PLANNED, "drop"),
        ),
        # Tasks
        _study("imdb_rows", 14),
        _study("tasks_seeds", 12),
        _study("full", 70, "layerfold study --preset full", timed=True),
        # How the measurements themselves do
        _benchmark("coverage", 5, timed=False),
        _benchmark("race", 5, timed=False, uses=("race",)),
        _benchmark("regret", 8, timed=False, uses=("race", "drop")),
        # Speed and memory
        _study("speed", 3, timed=True),
        Experiment(
            "plan-speed", "layerfold plan --model pocket --speedup 1.5", 10, reading.plan,
            (*PLANNED, "latency"), timed=True,
        ),
        _benchmark("perplexity", 5),
        _benchmark("alignment", 6),
        _benchmark("memory", 8),
        _benchmark("offload", 6),
        _benchmark("training", 4),
        _benchmark("drop", 9, name="drop-speed"),
        _benchmark("prune", 8, name="prune-speed"),
        _benchmark("repair", 8, name="repair-speed"),
        _benchmark("startup", 1),
        _benchmark("gpu", 10, device="cuda"),
    )
}  # fmt: skip
"""By name, in the order in which they run: README's first."""


def costs() -> dict[str, Any]:
    """Return what each experiment took, by name.

    ``minutes`` by the clock and ``processor_minutes`` of its last run; ``runs``: in how many it was made.
    """
    found: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}
    return found
