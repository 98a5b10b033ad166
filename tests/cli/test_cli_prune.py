"""`layerfold compress prune`, as typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_masks_equal, logits, tiny, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.model.masks import held

pytestmark = pytest.mark.usefixtures("offline")

PARAMETERS, PRUNABLE = 60_320, 49_152
UNITS = ["--structure", "neurons+heads", "--criterion", "taylor"]


def split_off(out: str) -> tuple[str, list[str]]:
    """How the line on the text that was read begins, if there is one, and the other lines."""
    first, *rest = out.splitlines()
    if not first.startswith("calibration: "):
        return "", [first, *rest]
    found = re.match(r".*, split [a-z+]+, ", first)
    assert found is not None
    return found[0], rest


@pytest.mark.parametrize(
    ("words", "nonzero", "form"),
    [
        (["--sparsity", 0.3], PARAMETERS - round(0.3 * PRUNABLE), "dense"),
        (["--nonzero", "50.69k"], 50_690, "compact"),
        (["--nonzero", "84.13%", "--scope", "row", "--parts", "ffn"], round(0.8413 * PARAMETERS), "dense"),
        (["--structure", "2:4"], PARAMETERS - PRUNABLE // 2, "compact"),
        (["--sparsity", 0.5, "--criterion", "wanda"], PARAMETERS - PRUNABLE // 2, "dense"),
        (["--nonzero", "0.04069M", "--criterion", "sparsegpt"], 40_690, "compact"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_prune_says_what_it_zeroed_and_writes_it(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, words: list[object], nonzero: int, form: str
) -> None:
    out = tmp_path / "out"
    text = ["--corpus", study_corpus, "--tokens", 256] if "--criterion" in words else []
    done = layerfold("compress", "prune", *words, *text, "--format", form, "--model", model, "--output-dir", out)
    assert (done.code, "warning" in done.err) == (0, False), done.err
    loaded = load(out)
    assert loaded.decoder.size().nonzero == nonzero
    read, (zeros, speed, sizes, left, wrote) = split_off(done.out)
    assert read == (f"calibration: {study_corpus!r}, split calibration, " if text else "")
    assert zeros.startswith(
        f"{PARAMETERS - nonzero:,} of {PRUNABLE if '--parts' not in words else 32_768:,} weights are zero: "
    )
    assert "profit" in speed or "zeros make nothing faster on dense kernels" in speed
    assert sizes == "60,320 distinct parameters in 4 blocks -> 60,320 in 4"
    assert left == f"60,320 of them not zero -> {nonzero:,}"
    assert wrote == f"wrote {out} ({form}, float32)"
    masks = held(loaded.decoder)
    assert sum(int((~mask).sum()) for mask in masks.values()) == PARAMETERS - nonzero
    (step,) = loaded.provenance.steps
    assert step["method"]["name"] == "prune"
    assert step["notes"]["zeros"] == PARAMETERS - nonzero
    assert (step["calibration"] is not None) == bool(text)
    if text:
        assert step["calibration"]["split"] == "calibration"
        assert 0 < step["calibration"]["tokens"] <= 256
    other = tmp_path / "other"
    to = "compact" if form == "dense" else "dense"
    assert layerfold("export", out, "--to", to, "--output-dir", other).code == 0
    again = load(other).decoder
    assert torch.equal(logits(again), logits(loaded.decoder))
    assert_masks_equal(held(again), masks)


def test_a_pruned_model_is_smaller_in_compact_form_and_loads_in_plain_transformers(
    layerfold: Any, model: Path, tmp_path: Path
) -> None:
    words = ("compress", "prune", "--sparsity", 0.8, "--model", model, "--output-dir")
    assert layerfold(*words, tmp_path / "dense").code == 0
    assert layerfold(*words, tmp_path / "compact", "--format", "compact").code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(8)[None]
    assert torch.equal(plain(ids).logits, load(tmp_path / "compact").decoder.model(ids).logits)
    sizes = [(tmp_path / name).stat().st_size for name in ("compact/layerfold.safetensors", "dense/model.safetensors")]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize(("criterion", "form"), [("magnitude", "dense"), ("wanda", "compact"), ("sparsegpt", "dense")])
def test_neurons_go(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, criterion: str, form: str) -> None:
    out = tmp_path / "out"
    words = ("--structure", "neurons", "--nonzero", "80%", "--criterion", criterion, "--corpus", study_corpus)
    done = layerfold("compress", "prune", *words, "--model", model, "--format", form, "--output-dir", out)
    assert done.code == 0, done.err
    loaded = load(out).decoder
    size = loaded.size()
    assert size.parameters == PARAMETERS - 186 * 65
    assert sum(loaded.d_ffn) == 512 - 186
    read, said = split_off(done.out)
    assert (read == "") == (criterion == "magnitude")
    assert said == [
        "removed 186 of 512 neurons",
        "smaller matrices, which every kernel profits from",
        f"60,320 distinct parameters in 4 blocks -> {size.parameters:,} in 4",
        f"wrote {out} ({form}, float32)",
    ]


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_removing_neurons_and_heads_makes_the_model_smaller(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, form: str
) -> None:
    out = tmp_path / "out"
    words = ("--structure", "neurons+heads", "--criterion", "taylor", "--sparsity", 0.3, "--corpus", study_corpus)
    done = layerfold("compress", "prune", *words, "--model", model, "--format", form, "--output-dir", out)
    assert done.code == 0, done.err
    decoder = load(out).decoder
    size, of = decoder.size(), 4 * (128 * 65 + 4 * 1048)  # each neuron's weights, each head's
    assert 0 <= PARAMETERS - size.parameters - round(0.3 * of) < 65
    assert split_off(done.out)[1] == [
        f"removed {round(0.3 * of):,} of {of:,} parameters of neurons and heads",
        f"{sum(decoder.d_ffn):,} neurons and {sum(decoder.heads):,} groups of heads are left",
        "smaller matrices, which every kernel profits from",
        f"60,320 distinct parameters in 4 blocks -> {size.parameters:,} in 4",
        f"wrote {out} ({form}, float32)",
    ]
    (step,) = load(out).provenance.steps
    assert step["notes"]["heads_left"] == list(decoder.heads)
    assert step["calibration"]["split"] == "calibration+train", "the calibration split alone is short of 16,384 tokens"
    plain = tmp_path / "plain"
    assert layerfold("export", out, "--to", "dense", "--output-dir", plain).code == 0
    expected = AutoModelForCausalLM.from_pretrained(plain)(token_ids()).logits
    assert torch.allclose(logits(decoder), expected, rtol=1e-5, atol=1e-5)


def test_neurons_go_by_taylor(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    words = ("--structure", "neurons", "--criterion", "taylor", "--sparsity", 0.25, "--corpus", study_corpus)
    done = layerfold("compress", "prune", *words, "--model", model, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert split_off(done.out)[1][:2] == [
        "removed 128 of 512 neurons",
        "smaller matrices, which every kernel profits from",
    ]
    assert load(tmp_path / "out").decoder.d_ffn == (96,) * 4


def test_the_published_criterion_warns(layerfold: Any, model: Path, tmp_path: Path) -> None:
    words = ("--criterion", "published", "--sparsity", 0.5, "--model", model, "--output-dir", tmp_path / "out")
    done = layerfold("compress", "prune", *words)
    assert done.code == 0
    assert done.err == (
        "warning: the token embedding and the LM head are one matrix: what is zeroed in it is lost to both\n"
    )
    assert "50.0% of linear" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nonzero None and sparsity None; accepted: one of the two"),
        (["--sparsity", 1], "sparsity 1.0; accepted: from 0 to below 1"),
        (["--sparsity", "nan"], "sparsity nan; accepted: from 0 to below 1"),
        (["--nonzero", "12X"], "nonzero '12X'; accepted: a count"),
        (["--nonzero", "1%"], "nonzero '1%' is 603 parameters; accepted: 11,168 ... 60,320"),
        (["--nonzero", "104.69M"], "is 104,690,000 parameters; accepted: 11,168 ... 60,320"),
        (["--sparsity", 0.5, "--nonzero", "50%"], "accepted: one of the two"),
        (["--sparsity", 0.5, "--structure", "2:4", "--scope", "row"], "scope 'row' with structure 2:4"),
        (["--sparsity", 0.5, "--parts", "atention"], "did you mean 'attention'?"),
        (["--sparsity", 0.5, "--criterion", "wanda", "--parts", "head"], "accepted: attention, ffn"),
        (["--sparsity", 0.999, "--structure", "neurons"], "leaves an FFN without neurons; accepted: 0 ... 0.992188"),
        (["--sparsity", 0.5, "--criterion", "wanda", "--corpus", "./none.txt"], "no file or folder"),
        (["--sparsity", "half"], "--sparsity"),
        (["--sparsity", 0.5, "--criterion", "wnda"], "wanda"),
        (["--sparsity", 0.5, "--structure", "4:8"], "2:4"),
        (["--sparsity", 0.5, "--scope", "block"], "global"),
        (["--sparsity", 0.5, "--structure", "neurons+heads"], "accepted: taylor with neurons or neurons+heads"),
        (["--sparsity", 0.5, "--criterion", "taylor"], "accepted: taylor with neurons or neurons+heads"),
        (
            [*UNITS, "--sparsity", 0.5, "--scope", "matrix"],
            "scope 'matrix' for taylor of neurons+heads; accepted: glob",
        ),
        ([*UNITS, "--sparsity", 0.5, "--parts", "ffn"], "with structure neurons+heads; accepted: attention,ffn"),
        ([*UNITS, "--sparsity", 0.5, "--repair", "rescale"], "repair 'rescale' with prune"),
        ([*UNITS, "--sparsity", 0.5, "--corpus", "./none.txt"], "no file or folder"),
        ([*UNITS, "--sparsity", 0.999], "leaves an FFN without neurons; accepted: 0 ... 0.99"),
        ([*UNITS, "--nonzero", "1%"], "nonzero '1%' is 603 parameters; accepted: 10,"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_refused_prune_writes_nothing(
    layerfold: Any, model: Path, tmp_path: Path, words: list[object], said: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = layerfold("compress", "prune", *words, "--model", model, "--output-dir", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1 or done.err.startswith("Usage: ")
    assert "Traceback" not in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_six_inputs_are_not_fours(layerfold: Any, tmp_path: Path) -> None:
    tiny("llama", intermediate_size=6).save(tmp_path / "six")
    words = ("--structure", "2:4", "--model", tmp_path / "six", "--output-dir", tmp_path / "out")
    done = layerfold("compress", "prune", *words)
    assert (done.code, done.out) == (2, "")
    assert "'model.layers.0.mlp.down_proj.weight' has 6 inputs; accepted: a multiple of 4" in done.err
    assert not (tmp_path / "out").exists()


def test_pruning_twice_is_two_steps(layerfold: Any, model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert layerfold("compress", "prune", "--sparsity", 0.3, "--model", model, "--output-dir", one).code == 0
    done = layerfold("compress", "prune", "--sparsity", 0.5, "--model", one, "--format", "compact", "--output-dir", two)
    assert done.code == 0, done.err
    steps = json.loads((two / "layerfold.json").read_text())["provenance"]["steps"]
    assert [step["method"]["zeros"] for step in steps] == [round(0.3 * PRUNABLE), PRUNABLE // 2]
    assert load(two).decoder.size().nonzero == PARAMETERS - PRUNABLE // 2
