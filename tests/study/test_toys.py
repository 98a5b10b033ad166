"""A method and an evaluator written outside the package, from its public names alone, in a study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import Write

import layerfold as lf
from layerfold.evaluators import EVALUATORS
from layerfold.methods import METHODS


@dataclass(frozen=True)
class Shrink(lf.Method):
    """Multiply what each FFN adds to the residual stream by a factor."""

    factor: float = 0.5
    name: ClassVar[str] = "shrink"

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise ValueError(f"factor {self.factor}; accepted: from 0 to 1")

    @torch.no_grad()
    def apply(self, decoder: lf.Decoder, calibration: lf.Calibration | None) -> lf.Notes:
        for block in decoder.blocks:
            block.ffn.down.weight.mul_(self.factor)
        return {"shrunk": decoder.n_blocks}


@dataclass(frozen=True)
class Loudness(lf.Evaluator):
    """Root mean square of the FFNs' last matrices."""

    scale: int = 1
    name: ClassVar[str] = "loudness"

    def __call__(self, model: lf.Model, progress: Any = None) -> lf.Score:
        weights = torch.cat([block.ffn.down.weight.flatten() for block in model.decoder.blocks])
        value = self.scale * float(weights.square().mean().sqrt())
        return lf.Score(value, value, value, "RMS", lower_is_better=True)


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """Register both, for one test."""
    before = dict(METHODS), dict(EVALUATORS)
    lf.register(Shrink)
    lf.register(Loudness)
    yield
    for registry, kept in zip((METHODS, EVALUATORS), before, strict=True):
        registry.clear()
        registry.update(kept)


RECIPE = """
base: {model}
variants:
  - {{label: half, shrink: {{factor: 0.5}}}}
  - {{label: repaired, shrink: {{factor: 0.25}}, repair: refit}}
  - {{label: both, steps: [{{shrink: {{}}}}, {{drop: {{blocks: 3}}}}]}}
evaluate: [loudness, size]
calibration: {{corpus: {corpus}, tokens: 256, repair_tokens: 256}}
"""


@pytest.fixture
def study(layerfold: Any, model: Path, study_corpus: str, write: Write, tmp_path: Path) -> Any:
    """Run the recipe, with a part of it replaced."""

    def study(old: str = "", new: str = "") -> Any:
        recipe = write("toys.yaml", RECIPE.format(model=model, corpus=study_corpus).replace(old, new))
        return layerfold("study", recipe, "--output-dir", tmp_path / "run", "--json")

    return study


def test_a_toy_method_and_a_toy_evaluator_stand_in_a_study(study: Any, tmp_path: Path) -> None:
    done = study()
    assert done.code == 0, done.err
    rows = {row["label"]: row for row in json.loads(done.out)["variants"]}
    figures = {label: row["scores"]["loudness"]["value"] for label, row in rows.items()}
    assert figures["half"] == pytest.approx(0.5 * figures["base"], rel=1e-6)
    assert figures["repaired"] > 0.3 * figures["base"], "the repair makes the outputs large again"
    assert rows["half"]["notes"] == {"shrunk": 4}
    assert rows["both"]["scores"]["size"]["blocks"] == 3
    records = {path.name for path in (tmp_path / "run" / "records").iterdir()}
    assert study().code == 0
    assert {path.name for path in (tmp_path / "run" / "records").iterdir()} == records, "nothing is measured again"
    for medium in ("report.html", "results.csv"):
        assert "loudness" in (tmp_path / "run" / medium).read_text(), medium


def test_a_new_version_of_either_is_measured_again(study: Any, tmp_path: Path, monkeypatch: Any) -> None:
    study()
    before = {path.name for path in (tmp_path / "run" / "records").iterdir()}
    monkeypatch.setattr(Shrink, "version", 2)
    study()
    after = {path.name for path in (tmp_path / "run" / "records").iterdir()}
    assert len(after - before) == 3 * 2, "each row that it makes, by both evaluators"
    monkeypatch.setattr(Loudness, "version", 2)
    study()
    assert len({path.name for path in (tmp_path / "run" / "records").iterdir()} - after) == 4


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("factor: 0.5", "factor: 2.0", "factor 2.0; accepted: from 0 to 1"),
        ("factor: 0.5", "factr: 0.5", "shrink: unknown key 'factr'; did you mean 'factor'? accepted: factor"),
        ("factor: 0.5", "factor: much", "shrink.factor: "),
        ("shrink: {factor: 0.5}", "shrnk: {factor: 0.5}", "did you mean 'shrink'? accepted: collapse, drop, "),
        ("repair: refit", "repair: rescale", "repair 'rescale' with shrink, which averages no neurons; accepted: none"),
        ("loudness", "{loudness: {scale: loud}}", "loudness.scale: "),
        ("loudness", "{loudness: {scal: 2}}", "loudness: unknown key 'scal'; did you mean 'scale'? accepted: scale"),
        ("loudness", "loudnes", "unknown evaluator 'loudnes'; did you mean 'loudness'?"),
    ],
)
def test_refused_settings_of_a_toy_are_one_line(study: Any, old: str, new: str, said: str) -> None:
    done = study(old, new)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_toy_method_compresses_and_a_toy_evaluator_measures_by_name(layerfold: Any, model: Path) -> None:
    smaller = lf.compress(model, Shrink(factor=0.0))
    assert smaller.provenance.steps[-1]["method"] == {"name": "shrink", "factor": 0.0}
    assert lf.evaluate(smaller, ["loudness"])["loudness"].value == 0
    assert layerfold("eval", model, "--metrics", "loudness").out.startswith("loudness")


def test_what_cannot_be_registered_is_refused() -> None:
    class Nothing:
        name = "nothing"

    class Twice(Shrink):
        name = "drop"

    class Nameless(lf.Evaluator):
        def __call__(self, model: lf.Model, progress: Any = None) -> lf.Score:
            raise NotImplementedError

    assert lf.register(Shrink) is Shrink
    for kind, said in ((Nothing, "extends Method or Evaluator"), (Twice, "'drop'"), (Nameless, "with a name")):
        with pytest.raises(lf.LayerfoldError, match=said):
            lf.register(kind)
