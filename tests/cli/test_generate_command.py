"""`layerfold generate`: what all variants write after the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from layerfold.evaluators.generation import published_prompts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with room for a sentence of letters."""
    tiny("gpt2", n_positions=64).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recipe(model: Path, study_corpus: str, write: Any) -> Path:
    found: Path = write(
        "recipe.yaml",
        f"base: {model}\nvariants: [{{label: shorter, drop: {{blocks: '1'}}}}]\n"
        f"evaluate: [size]\ncalibration: {{corpus: {study_corpus}}}\n",
    )
    return found


def test_every_variant_continues_every_prompt(layerfold: Any, recipe: Path, tmp_path: Path) -> None:
    words = ("generate", recipe, "--output-dir", tmp_path / "r", "--new-tokens", 2)
    chosen = (*words, "--prompt", "a b", "--prompt", "c")
    outcome = layerfold(*chosen, "--json")
    assert outcome.code == 0, outcome.err
    samples = json.loads(outcome.out)
    assert list(samples) == ["base", "shorter"]
    for label in samples:
        assert [sample["prompt"] for sample in samples[label]] == ["a b", "c"]
    shown = layerfold(*chosen).out
    assert shown.index("a b") < shown.index("base") < shown.index("shorter") < shown.index("report: ")
    assert "a b" in (tmp_path / "r" / "generate" / "report.html").read_text()
    published = json.loads(layerfold(*words, "--json").out)["base"]
    assert tuple(sample["prompt"] for sample in published) == published_prompts(), "by default"
    assert len(published) == 2


def test_a_study_in_the_folder_keeps_its_results(layerfold: Any, recipe: Path, tmp_path: Path) -> None:
    assert layerfold("study", recipe, "--output-dir", tmp_path / "r").code == 0
    files = [tmp_path / "r" / name for name in ("results.json", "results.csv", "report.html")]
    before = [file.read_bytes() for file in files]
    assert layerfold("generate", recipe, "--prompt", "a", "--new-tokens", 2, "--output-dir", tmp_path / "r").code == 0
    assert [file.read_bytes() for file in files] == before
    assert layerfold("report", tmp_path / "r").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", " "), "generation prompts [' ']; accepted: one or more, none empty"),
        (("--new-tokens", "0"), "generation new_tokens 0; accepted: 1 or more"),
        (("--preset", "full"), "accepted: one of the two"),
        (("--prompt", "a", "--new-tokens", "9999"), "accepted: "),
    ],
)
def test_bad_input_is_one_line(layerfold: Any, recipe: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    outcome = layerfold("generate", recipe, "--output-dir", tmp_path / "r", *words)
    assert outcome.code == 2
    assert said in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
