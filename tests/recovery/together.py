"""What two processes do together, for `test_processes`: each part leaves a file in the folder that is named first."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import runs

import layerfold
from layerfold import cli
from layerfold.model.masks import held
from layerfold.recovery import Finetune, run

RANK = int(os.environ["RANK"])


def late(do: Callable[..., Any]) -> Callable[..., Any]:
    """Have the second process come late to a function."""

    def function(*arguments: Any) -> Any:
        time.sleep(0.5 * RANK)
        return do(*arguments)

    return function


def command(typed: list[str]) -> None:
    """Read the best weights late: the first process is not to have cleared their folder by then."""
    with patch.object(run, "read_training_", late(run.read_training_)):
        cli.app(typed, standalone_mode=False)


def without_a_folder(corpus: str) -> dict[str, Any]:
    done = layerfold.recover(runs.small(), runs.finetune(corpus, steps=2, evaluations=1))
    return {"best_step": done.provenance.steps[-1]["notes"]["best_step"], "sha256": done.sha256}


def diverging_in_one(corpus: str, folder: Path) -> list[dict[str, Any]]:
    """Have the loss of the second process's share alone grow, in the last step of the third rate's trial."""
    original, calls = Finetune.loss, [0]

    def loss(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        found = original(self, *arguments)
        grown = RANK == 1 and calls[0] == 6
        return replace(found, language_model=100 * found.language_model) if grown else found

    Finetune.loss = loss  # type: ignore[method-assign]
    recovery = runs.finetune(corpus, steps=8, learning_rate=None, search_fraction=0.25)
    done = layerfold.recover(runs.small(), recovery, training_dir=folder)
    rates: list[dict[str, Any]] = done.provenance.steps[-1]["notes"]["learning_rates"]
    return rates


def overwriting(corpus: str, folder: Path) -> dict[str, Any]:
    """Begin anew where another run lies, the second process coming late out of that and into this."""
    with patch.object(run, "read_training_", late(run.read_training_)):
        layerfold.recover(runs.small(), runs.finetune(corpus, steps=2, evaluations=1), training_dir=folder)
    recovery = runs.finetune(corpus, steps=2, evaluations=1, learning_rate=2e-3)
    with patch.object(run, "claim", late(run.claim)):
        done = layerfold.recover(runs.small(), recovery, training_dir=folder, overwrite=True)
    return {"sha256": done.sha256, "rate": done.provenance.steps[-1]["notes"]["learning_rate"]}


def masked(corpus: str, model: Path, out: Path) -> dict[str, Any]:
    """Train a model with zeros that are held, in FFNs of two widths; the first process keeps what came of it."""
    recovery = runs.finetune(corpus, steps=6, accumulation=2, weight_decay=0.1, learning_rate=3e-3)
    done = layerfold.recover(layerfold.load(model), recovery)
    if RANK == 0:
        done.save(out, format="compact")
    return {"sha256": done.sha256, "masks": len(held(done.decoder)), "widths": done.decoder.d_ffn}


def shared(corpus: str, model: Path) -> list[str]:
    """Train a model that shares FFNs, some of its deltas of rank 0, in two ways; the first process keeps both."""
    found = []
    for kind in (runs.lowrank, runs.finetune):
        done = layerfold.recover(layerfold.load(model), kind(corpus, steps=4, accumulation=2))
        if RANK == 0:
            done.save(model.with_name(f"shared-{kind.__name__}"), format="compact")
        found.append(done.sha256)
    return found


def part(folder: Path, name: str, do: Callable[..., Any], *arguments: Any) -> None:
    try:
        found = do(*arguments)
    except Exception as error:  # the other process goes on, and so must this one
        traceback.print_exc()  # what the test shows should they then wait for each other for ever
        found = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{name}-{RANK}.json").write_text(json.dumps(found))


def everything(out: str, corpus: str, typed: list[str]) -> None:
    part(Path(out), "command", command, typed)
    part(Path(out), "folder", without_a_folder, corpus)
    part(Path(out), "diverging", diverging_in_one, corpus, Path(out) / "diverging.training")
    part(Path(out), "masked", masked, corpus, Path(out) / "masked", Path(out) / "masked.out")
    part(Path(out), "shared", shared, corpus, Path(out) / "shared")
    part(Path(out), "overwriting", overwriting, corpus, Path(out) / "overwriting.training")
