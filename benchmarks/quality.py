"""Perplexity against parameters: layerfold's own plan beside other methods, at the same sizes, from the same text.

Each cell is kept as soon as it is measured, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Texts, budget
from plan import OWN

from layerfold import api
from layerfold.calibration import calibration_windows
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET, Model, default_corpus
from layerfold.environment import environment
from layerfold.evaluators import Perplexity
from layerfold.files import hash_json, write_text
from layerfold.maths.intervals import Interval, exponential, ratio_interval
from layerfold.recovery import Distill
from layerfold.recovery.workspace import clear

METHODS = {"layerfold": OWN, **PEERS}
CONTEXT = 1024
"""Longest window of selection and test text; a model's own maximum where that is less."""


@dataclass(frozen=True)
class TextBudget:
    """How much text is read, in tokens.

    Attributes:
        calibration: what methods are fitted to; as much validation text selects where a method says so.
        test: what all are judged by.
        context: the longest window.
        recovery: of training text, for the rows that are recovered; 0 recovers none.
    """

    calibration: int
    test: int
    context: int
    recovery: int


@dataclass(frozen=True)
class Measured:
    """A perplexity on the test text.

    Attributes:
        value, low, high: with its 95 % interval.
        nats: of each window.
        seconds: of processor time that making the model took, and with a recovery training it; what an earlier size of
            the method has worked out already is not in it.
    """

    value: float
    low: float
    high: float
    nats: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Row:
    """A method at a size.

    Attributes:
        method: its name; ``base`` for the model as it is.
        kept: as many blocks' size was asked for.
        parameters, nonzero: counts over distinct tensors; None where the method cannot be so small.
        perplexity: as the method leaves it.
        recovered: after the recovery that all rows get; None where there was to be none.
    """

    method: str
    kept: int
    parameters: int | None = None
    nonzero: int | None = None
    perplexity: Measured | None = None
    recovered: Measured | None = None


class Comparison:
    """Makes and measures rows, each once.

    Args:
        base: stays as it is.
        corpus: see `corpora`; its splits are disjoint.
        folder: keeps what was measured.
    """

    def __init__(self, base: Model, corpus: str, tokens: TextBudget, folder: Path) -> None:
        self.base, self._folder = base, folder
        context = min(base.decoder.context, tokens.context)
        self._test = Perplexity(corpus=corpus, context=context, limit_tokens=tokens.test)
        selection = Perplexity(corpus=corpus, split="validation", context=context, limit_tokens=tokens.calibration)
        self._texts = Texts(calibration_windows(base, corpus, tokens.calibration, 0), selection)
        self._recovery = Distill(corpus=corpus, tokens=tokens.recovery, batch_size=1) if tokens.recovery else None
        windows = self._test.windows(base)
        self.tokens = windows.units.tokens
        self._known = {
            "base": base.sha256,
            "protocol": self._test.protocol_id,
            "texts": [each.sha256 for each in (self._texts.calibration, selection.windows(base), windows)],
        }

    def row(self, method: str, kept: int, recovered: bool) -> Row:
        """Return a row, measured now or before."""
        depth = self.base.decoder.n_blocks
        if kept == depth:
            return self._row("base", depth, lambda: self.base, False)
        peer = METHODS[method]
        make = _Once(partial(peer.smaller, self.base, kept, self._texts))
        return self._row(method, kept, make, recovered, version=peer.version)

    def _row(self, method: str, kept: int, make: Callable[[], Model | None], recovered: bool, version: int = 1) -> Row:
        key = {**self._known, "method": method, "kept": kept, "version": version}
        found = self._kept(key, lambda: self._before(method, kept, make))
        if not recovered or self._recovery is None or found["parameters"] is None:
            return _read(method, kept, found)
        key |= {"recovery": self._recovery.resolved()}
        after = self._kept(key, lambda: self._after(hash_json(key), make))
        return _read(method, kept, found | {"recovered": after})

    def _kept(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = self._folder / f"{hash_json(key)[:24]}.json"
        if not file.is_file():
            write_text(file, json.dumps(measure()))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def _before(self, method: str, kept: int, make: Callable[[], Model | None]) -> dict[str, Any]:
        started = time.process_time()
        model = make()
        if model is None:
            return {"parameters": None}
        seconds = time.process_time() - started
        size = model.decoder.size()
        held = size.nonzero if method in METHODS and METHODS[method].zeros else size.parameters
        if held > budget(self.base.decoder, kept):
            raise AssertionError(f"{method} for {kept} blocks holds {held:,} parameters, above its budget")
        return {**asdict(size), "perplexity": self._measured(model, seconds)}

    def _after(self, name: str, make: Callable[[], Model | None]) -> dict[str, Any]:
        model, folder, started = make(), self._folder / "training" / name[:24], time.process_time()
        assert model is not None
        assert self._recovery is not None
        recovered = api.recover(model, self._recovery, teacher=self.base, training_dir=folder)
        found = self._measured(recovered, time.process_time() - started)
        clear(folder)
        return found

    def _measured(self, model: Model, seconds: float) -> dict[str, Any]:
        score = self._test(model)
        return asdict(Measured(score.value, score.low, score.high, tuple(score.details["unit_nats"]), seconds))


class _Once:
    """Makes a model when it is first asked for."""

    def __init__(self, make: Callable[[], Model | None]) -> None:
        self._make, self._made = make, False

    def __call__(self) -> Model | None:
        if not self._made:
            self._model, self._made = self._make(), True
        return self._model


def _read(method: str, kept: int, found: dict[str, Any]) -> Row:
    measured = {name: Measured(**found[name]) for name in ("perplexity", "recovered") if name in found}
    return Row(method, kept, found["parameters"], found.get("nonzero"), **measured)


def sizes(words: Sequence[str]) -> list[int]:
    """Read numbers of blocks, as ``12..2`` or ``9``, largest first."""
    found: set[int] = set()
    for word in words:
        first, _, last = word.partition("..")
        low, high = sorted((int(first), int(last or first)))
        found |= set(range(low, high + 1))
    return sorted(found, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=POCKET)
    parser.add_argument("--corpus", help="whose splits are read; by default the one that fits the model")
    parser.add_argument("--kept", nargs="+", default=["12..2"], metavar="BLOCKS", help="sizes, as 12..2 or 9 6")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--test-tokens", type=int, default=65_536)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--recover", type=int, default=0, metavar="TOKENS", help="distil rows on so many tokens")
    parser.add_argument("--recover-kept", nargs="+", default=["9", "6"], metavar="BLOCKS", help="the sizes recovered")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark-quality"), help="goes on from what is there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment here")
    options = parser.parse_args()
    tokens = TextBudget(options.calibration_tokens, options.test_tokens, options.context, options.recover)
    base = load(options.model)
    corpus = options.corpus or default_corpus(base)
    comparison = Comparison(base, corpus, tokens, options.folder)
    depth = base.decoder.n_blocks
    rows = [comparison.row("base", depth, False)]
    asked, recovered = [kept for kept in sizes(options.kept) if kept < depth], set(sizes(options.recover_kept))
    for kept in reversed(asked):  # what a method finds out for the smallest size serves the others
        for method in options.methods:
            rows.append(comparison.row(method, kept, kept in recovered))
            print(method, kept, cell_text(rows[-1].perplexity), cell_text(rows[-1].recovered), flush=True)
    if options.json is not None:
        rows.sort(key=lambda row: -row.kept)
        document = {
            "benchmark": "quality",
            "model": Path(options.model).name,
            "corpus": Path(corpus).name if Path(corpus).exists() else corpus,
            "tokens": asdict(tokens),
            "methods": {name: {"title": peer.title, "zeros": peer.zeros} for name, peer in METHODS.items()},
            "sizes": {str(kept): budget(base.decoder, kept) for kept in asked},
            "rows": [_figures(row, rows, comparison.tokens) for row in rows],
            "environment": environment(),
        }
        write_text(options.json, json.dumps(document, indent=1) + "\n")


def _figures(row: Row, rows: Sequence[Row], tokens: np.ndarray) -> dict[str, Any]:
    """A row as JSON: not the nats of every document, but the quotients that they are there for; nor the seconds.

    ``over base`` is the quotient over the base. ``over plan`` is that over layerfold's plan of the same size.
    """
    found = {name: value for name, value in asdict(row).items() if value is not None}
    plan = next((each for each in rows if (each.method, each.kept) == ("layerfold", row.kept)), None)
    for name in ("perplexity", "recovered"):
        measured = getattr(row, name)
        if measured is None:
            continue
        del found[name]["nats"], found[name]["seconds"]
        for other, over in ((rows[0], "over base"), (plan, "over plan")):
            if other is not None and other is not row and (theirs := getattr(other, name) or other.perplexity):
                quotient = paired(measured, theirs, tokens)
                found[name][over] = [quotient.value, quotient.low, quotient.high]
    return found


def paired(one: Measured, two: Measured, tokens: np.ndarray) -> Interval:
    """One perplexity over another with its 95 % interval, from the same documents."""
    difference = np.array(one.nats) - np.array(two.nats)
    return ratio_interval(difference, tokens).map(exponential)


def cell_text(measured: Measured | None) -> str:
    """A perplexity to three or more digits; nothing where there is none."""
    if measured is None:
        return ""
    return f"{measured.value:,.1f}" if measured.value < 1000 else f"{measured.value:,.0f}"


if __name__ == "__main__":
    main()
