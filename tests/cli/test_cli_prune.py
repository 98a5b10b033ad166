"""`layerfold compress prune`, as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_masks_equal, logits, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.model.masks import held

pytestmark = pytest.mark.usefixtures("offline")

PARAMETERS, PRUNABLE = 60_320, 49_152
FASTER = "smaller matrices, which every kernel profits from"


def split_off(lines: list[str]) -> tuple[str, list[str]]:
    """How the line on the text that was read begins, if there is one, and the other lines."""
    first, *rest = lines
    if not first.startswith("calibration: "):
        return "", [first, *rest]
    found = re.match(r".*, split [a-z+]+, ", first)
    assert found is not None
    return found[0], rest


@pytest.mark.parametrize(
    ("typed", "nonzero", "form"),
    [
        ("--sparsity 0.3", PARAMETERS - round(0.3 * PRUNABLE), "dense"),
        ("--nonzero 50.69k", 50_690, "compact"),
        ("--nonzero 84.13% --scope row --parts ffn", round(0.8413 * PARAMETERS), "dense"),
        ("--structure 2:4", PARAMETERS - PRUNABLE // 2, "compact"),
        ("--sparsity 0.5 --tokens 256 --criterion wanda", PARAMETERS - PRUNABLE // 2, "dense"),
        ("--nonzero 0.04069M --tokens 256 --criterion sparsegpt", 40_690, "compact"),
    ],
)
def test_prune_says_what_it_zeroed_and_writes_it(
    compress: Any, export: Any, study_corpus: str, tmp_path: Path, typed: str, nonzero: int, form: str
) -> None:
    done, reads = compress(f"prune {typed} --format {form}"), "--criterion" in typed
    assert "warning" not in done.err
    loaded = load(tmp_path / "out")
    assert loaded.decoder.size().nonzero == nonzero
    read, (zeros, speed, sizes, left, wrote) = split_off(done.unweighed)
    assert read == (f"calibration: {study_corpus!r}, split calibration, " if reads else "")
    assert zeros.startswith(
        f"{PARAMETERS - nonzero:,} of {PRUNABLE if '--parts' not in typed else 32_768:,} weights are zero: "
    )
    assert "profit" in speed or "zeros make nothing faster on dense kernels" in speed
    assert sizes == "60,320 distinct parameters in 4 blocks -> 60,320 in 4"
    assert left == f"60,320 of them not zero -> {nonzero:,}"
    assert wrote == f"wrote {tmp_path / 'out'} ({form}, float32)"
    masks = held(loaded.decoder)
    assert sum(int((~mask).sum()) for mask in masks.values()) == PARAMETERS - nonzero
    (step,) = loaded.provenance.steps
    assert step["method"]["name"] == "prune"
    assert step["notes"]["zeros"] == PARAMETERS - nonzero
    assert (step["calibration"] is not None) == reads
    if reads:
        assert step["calibration"]["split"] == "calibration"
        assert 0 < step["calibration"]["tokens"] <= 256
    again = load(export(tmp_path / "out", "compact" if form == "dense" else "dense", "other")).decoder
    assert torch.equal(logits(again), logits(loaded.decoder))
    assert_masks_equal(held(again), masks)


def test_a_pruned_model_is_smaller_in_compact_form_and_loads_in_plain_transformers(
    compress: Any, tmp_path: Path
) -> None:
    for form in ("dense", "compact"):
        compress(f"prune --sparsity 0.8 --format {form}", out=form)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(8)[None]
    assert torch.equal(plain(ids).logits, load(tmp_path / "compact").decoder.model(ids).logits)
    sizes = [(tmp_path / name).stat().st_size for name in ("compact/layerfold.safetensors", "dense/model.safetensors")]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize(("criterion", "form"), [("magnitude", "dense"), ("wanda", "compact"), ("sparsegpt", "dense")])
def test_neurons_go(compress: Any, tmp_path: Path, criterion: str, form: str) -> None:
    done = compress(f"prune --structure neurons --nonzero 80% --criterion {criterion} --format {form}")
    loaded = load(tmp_path / "out").decoder
    size = loaded.size()
    assert size.parameters == PARAMETERS - 186 * 65
    assert sum(loaded.d_ffn) == 512 - 186
    read, said = split_off(done.unweighed)
    assert (read == "") == (criterion == "magnitude")
    assert said == [
        "removed 186 of 512 neurons",
        FASTER,
        f"60,320 distinct parameters in 4 blocks -> {size.parameters:,} in 4",
        f"wrote {tmp_path / 'out'} ({form}, float32)",
    ]


def test_neurons_go_by_taylor(compress: Any, tmp_path: Path) -> None:
    done = compress("prune --structure neurons --criterion taylor --sparsity 0.25")
    assert split_off(done.unweighed)[1][:2] == ["removed 128 of 512 neurons", FASTER]
    assert load(tmp_path / "out").decoder.d_ffn == (96,) * 4


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_removing_neurons_and_heads_makes_the_model_smaller(
    compress: Any, export: Any, tmp_path: Path, form: str
) -> None:
    done = compress(f"prune --structure neurons+heads --criterion taylor --sparsity 0.3 --format {form}")
    decoder = load(tmp_path / "out").decoder
    size, of = decoder.size(), 4 * (128 * 65 + 4 * 1048)  # each neuron's weights, each head's
    assert 0 <= PARAMETERS - size.parameters - round(0.3 * of) < 65
    assert split_off(done.unweighed)[1] == [
        f"removed {round(0.3 * of):,} of {of:,} parameters of neurons and heads",
        f"{sum(decoder.d_ffn):,} neurons and {sum(decoder.heads):,} groups of heads are left",
        FASTER,
        f"60,320 distinct parameters in 4 blocks -> {size.parameters:,} in 4",
        f"wrote {tmp_path / 'out'} ({form}, float32)",
    ]
    (step,) = load(tmp_path / "out").provenance.steps
    assert step["notes"]["heads_left"] == list(decoder.heads)
    assert step["calibration"]["split"] == "calibration+train", "the calibration split alone is short of 16,384 tokens"
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path / "out", "dense", "plain"))
    assert torch.allclose(logits(decoder), plain(token_ids()).logits, rtol=1e-5, atol=1e-5)


def test_the_published_criterion_warns(compress: Any) -> None:
    done = compress("prune --criterion published --sparsity 0.5")
    assert done.err == (
        "warning: the token embedding and the LM head are one matrix: what is zeroed in it is lost to both\n"
    )
    assert "50.0% of linear" in done.out


def test_pruning_twice_is_two_steps(compress: Any, tmp_path: Path) -> None:
    compress("prune --sparsity 0.3", out="one")
    compress("prune --sparsity 0.5 --format compact", out="two", of=tmp_path / "one")
    steps = json.loads((tmp_path / "two" / "layerfold.json").read_text())["provenance"]["steps"]
    assert [step["method"]["zeros"] for step in steps] == [round(0.3 * PRUNABLE), PRUNABLE // 2]
    assert load(tmp_path / "two").decoder.size().nonzero == PARAMETERS - PRUNABLE // 2
