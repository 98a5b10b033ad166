"""Dense checkpoints are the same model and the same tokenizer to transformers 4 as to transformers 5.

`make compat` runs this: it puts transformers 4 into a folder of its own, which READER names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILY_NAMES, halve_, tiny
from transformers import AddedToken

import layerfold
from layerfold.methods import Drop, Merge

READER = Path(os.environ["READER"]).resolve()
YARN = {"rope_type": "yarn", "rope_theta": 20_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
ROPE: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": YARN,
    "llama3": LLAMA3,
}


def models() -> dict[str, layerfold.Model]:
    """One of each family, each kind of rotary settings, and pocket."""
    found = {family: tiny(family) for family in FAMILY_NAMES}
    found |= {f"llama-{name}": tiny("llama", rope_parameters=dict(settings)) for name, settings in ROPE.items()}
    halve_(found["llama"].decoder)
    pocket = layerfold.load("pocket")
    added = AddedToken("<|mine|>", special=True)
    pocket.require_tokenizer().add_special_tokens({"extra_special_tokens": [added]})
    found["pocket"] = pocket
    return found


def read(folders: list[Path], before: Path | None = None) -> tuple[str, list[dict[str, Any]]]:
    """What a process of its own reads, with the packages in this folder before all others."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(before or "")}
    command = [sys.executable, str(Path(__file__).parent / "read.py"), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *lines = (json.loads(line) for line in done.stdout.splitlines())
    return first["version"], lines


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By model: what transformers 5 and transformers 4 read of it after a block was dropped and two were merged."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in models().items():
        smaller = layerfold.compress(model, Drop(blocks="1"))
        if name != "llama":
            smaller = layerfold.compress(smaller, Merge(groups="0-1", align="none"))
        smaller.save(folder / name)
    folders = sorted(folder.iterdir())
    (new, five), (old, four) = read(folders), read(folders, READER)
    assert (new.split(".")[0], old.split(".")[0]) == ("5", "4")
    return {each.name: pair for each, *pair in zip(folders, five, four, strict=True)}  # type: ignore[misc]


NAMES = pytest.mark.parametrize("name", [*FAMILY_NAMES, *(f"llama-{kind}" for kind in ROPE), "pocket"])


@NAMES
def test_the_logits_are_the_same(name: str, readings: Any) -> None:
    five, four = readings[name]
    assert four["missing"] == four["unexpected"] == []
    assert torch.allclose(torch.tensor(four["logits"]), torch.tensor(five["logits"]), atol=2e-5, rtol=1e-4)


@NAMES
def test_the_tokenizer_is_the_same(name: str, readings: Any) -> None:
    five, four = readings[name]
    assert len(four["tokens"]) > 5
    for key in ("tokens", "text", "end", "special", "dtype"):
        assert four[key] == five[key], key


def test_the_rotary_settings_matter(readings: Any) -> None:
    """Else the test above would pass without them."""
    plain, *others = (torch.tensor(readings[name][1]["logits"]) for name in ("llama-theta", "llama-linear"))
    assert not torch.allclose(plain, others[0], atol=1e-2)
