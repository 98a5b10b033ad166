"""`layerfold compress share`, and what is done with what it writes, as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, shared, tiny, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.model import deltas

pytestmark = pytest.mark.usefixtures("offline")

PARAMETERS = 60_320
MATRIX, SIDES = 32 * 128, 32 + 128
"""Of each of a block's two FFN matrices."""


def step(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "layerfold.json").read_text())["provenance"]["steps"][-1]
    return found


def test_a_named_window_is_shared_and_said_to_be(compress: Any, tmp_path: Path) -> None:
    done = compress("share --window 1:2 --rank 3")
    parameters = PARAMETERS - 2 * MATRIX + 4 * 3 * SIDES
    read, pair, *rest = done.unweighed
    assert read.startswith("calibration: ")
    assert re.fullmatch(r"block  2 to  1: mean matched correlation \d\.\d{3} \(unaligned -?\d\.\d{3}\)", pair)
    assert rest == [
        "blocks 1:2 (START:K) share one FFN, with deltas of rank 3",
        f"60,320 distinct parameters in 4 blocks -> {parameters:,} in 4",
        f"wrote {tmp_path / 'out'} (compact, float32)",
    ]
    decoder = load(tmp_path / "out").decoder
    assert decoder.size().parameters == parameters
    assert set(deltas.ranks(decoder).values()) == {3}
    assert {path.split(".")[2] for path in deltas.ranks(decoder)} == {"1", "2"}


def test_auto_says_what_each_window_scored_and_takes_the_least(compress: Any, tmp_path: Path) -> None:
    done = compress("share --k 2 --rank 2")
    found = re.findall(r"window +(\d:2): selection perplexity ([\d.e+,]+)", done.out)
    assert [window for window, _ in found] == ["0:2", "1:2", "2:2"]
    scored = {window: float(perplexity.replace(",", "")) for window, perplexity in found}
    kept = step(tmp_path / "out")
    exact = kept["notes"]["search"]["perplexity"]
    best = min(exact, key=exact.get)
    assert {window: pytest.approx(value, rel=1e-3) for window, value in exact.items()} == scored
    assert kept["method"]["window"] == best
    assert f"blocks {best} (START:K) share one FFN" in done.out
    assert kept["notes"]["search"]["text"]["split"] == "validation"
    assert kept["calibration"]["split"] == "calibration+train", "the first is short of 16,384 tokens"
    compress(f"share --window {best} --rank 2", out="again")
    assert load(tmp_path / "again").sha256 == load(tmp_path / "out").sha256, "the search leaves no mark"


def test_auto_is_what_is_done_with_nothing_named_and_of_four_blocks(compress: Any, tmp_path: Path) -> None:
    assert "window   0:4: selection perplexity" in compress("share --rank 2").out
    assert step(tmp_path / "out")["method"]["window"] == "0:4"


def test_what_calibrates_is_what_is_asked_for(compress: Any, tmp_path: Path) -> None:
    compress("share --window 0:2 --tokens 300 --seed 3 --format dense")
    kept = step(tmp_path / "out")
    assert 200 < kept["calibration"]["tokens"] <= 300
    assert kept["seed"] == 3
    assert json.loads((tmp_path / "out" / "layerfold.json").read_text())["format"] == "dense"
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert plain.num_parameters() == PARAMETERS
    compress("share --window 0:2 --align none --init svd", out="blind", of=tmp_path / "out")
    assert step(tmp_path / "blind")["calibration"] is None, "nothing is read where nothing needs it"


def test_ranks_that_differ_are_said_as_a_range(compress: Any, tmp_path: Path) -> None:
    done = compress("share --window 0:3 --ranks allotted --rank 2")
    found = re.search(r"deltas of rank (\d+) to (\d+)\n", done.out)
    assert found, done.out
    ranks = deltas.ranks(load(tmp_path / "out").decoder).values()
    assert (int(found[1]), int(found[2])) == (min(ranks), max(ranks))
    assert sum(ranks) <= 6 * 2


def test_a_rank_beyond_break_even_and_few_tokens_warn(compress: Any) -> None:
    """Two blocks of 32 x 128: a matrix of 4,096 less, and 2 x 160 more a rank."""
    assert compress("share --window 1:2 --rank 12 --tokens 4096").err == ""
    larger = compress("share --window 1:2 --rank 13 --tokens 4096", out="larger")
    assert re.fullmatch(r"warning: rank 13 makes the model .*; ranks up to 12 make it smaller\n", larger.err)
    assert "warning" not in larger.out
    assert "60,320 distinct parameters in 4 blocks -> 60,448 in 4" in larger.out
    few = compress("share --window 1:2 --rank 13 --tokens 100", out="few")
    assert re.fullmatch(
        r"warning: 100 calibration tokens for \S+ of 128 .* regularised; rank 13 makes .* up to 12 make it smaller\n",
        few.err,
    )


def test_other_blocks_of_a_model_that_shares_can_share_too(compress: Any, tmp_path: Path) -> None:
    compress("share --window 0:2 --rank 2", out="once")
    compress("share --window 2:2 --rank 4", out="twice", of=tmp_path / "once")
    twice = load(tmp_path / "twice")
    assert [each["method"]["window"] for each in twice.provenance.steps] == ["0:2", "2:2"]
    assert sorted(deltas.ranks(twice.decoder).values()) == [2] * 4 + [4] * 4
    assert twice.decoder.size().parameters == PARAMETERS - 4 * MATRIX + 4 * (2 + 4) * SIDES


# What is done with it


def test_shared_trained_measured_and_written_for_plain_tools(
    layerfold: Any, compress: Any, recover: Any, export: Any, study_corpus: str, tmp_path: Path
) -> None:
    compress("share --window 1:2 --rank 2", out="shared")
    words = "--method lowrank --learning-rate 1e-3 --set penalty_weight=0"
    done = recover(words, of=tmp_path / "shared", out="trained")
    assert done.out.endswith(f"wrote {tmp_path / 'trained'} (compact, float32)\n")
    trained = load(tmp_path / "trained")
    assert [each["method"]["name"] for each in trained.provenance.steps] == ["share", "lowrank"]
    assert trained.provenance.steps[-1]["method"]["penalty_weight"] == 0
    assert trained.provenance.steps[-1]["notes"]["parameters_trained"] == 4 * 2 * SIDES
    assert deltas.ranks(trained.decoder) == deltas.ranks(load(tmp_path / "shared").decoder)
    metrics = ("--corpus", study_corpus, "--split", "test", "--metrics", "size,perplexity", "--json")
    figures = json.loads(layerfold("eval", tmp_path / "trained", *metrics).out)
    assert figures["size"]["value"] == PARAMETERS - 2 * MATRIX + 4 * 2 * SIDES
    dense = export(tmp_path / "trained", "dense", "dense")
    plain = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.allclose(plain(token_ids()).logits, logits(trained.decoder), atol=1e-5)
    again = json.loads(layerfold("eval", dense, *metrics).out)
    assert again["perplexity"]["value"] == pytest.approx(figures["perplexity"]["value"], rel=1e-5)
    assert again["size"]["value"] == PARAMETERS
    refused = recover(words, of=dense, out="none", code=2)
    assert (refused.out, refused.err.count("\n")) == ("", 1)
    assert "in the compact form (the dense form has them multiplied out)" in refused.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("none")]


@pytest.mark.parametrize(("method", "form"), [("finetune", "compact"), ("lowrank", "dense")])
def test_recover_keeps_deltas_unless_told(recover: Any, tmp_path: Path, method: str, form: str) -> None:
    shared(tiny("gpt2"), window="1:2").save(tmp_path / "shared", format="compact")
    told = "--format dense" if form == "dense" else ""
    done = recover(f"--method {method} --learning-rate 1e-3 {told}", of=tmp_path / "shared")
    assert done.out.endswith(f"wrote {tmp_path / 'out'} ({form}, float32)\n")
    assert bool(deltas.ranks(load(tmp_path / "out").decoder)) == (form == "compact")
    if form == "dense":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# What is done with it
