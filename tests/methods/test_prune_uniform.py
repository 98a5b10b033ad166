"""Every block keeps as many neurons and heads, so that the dense checkpoint is as small as the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILY_NAMES, corpus, logits, prose, refused, tiny, token_ids, tokenizer
from transformers import AutoModelForCausalLM

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Prune
from layerfold.methods.prune import units
from layerfold.model.families import FAMILIES
from layerfold.pipeline import apply
from layerfold.text.windows import cut_windows

FIXED = {"bloom", "mpt"}
"""Whose configuration does not say how many neurons there are."""
SAYS_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "glm4", "granite", "cohere", "nemotron"]
"""Whose configuration says how many heads there are, of what size."""
DIVIDES = ["gpt2", "gptj", "opt", "gpt_neox"]
"""Whose configuration divides the width by the number of heads."""


def thinned(name: str, **settings: Any) -> Model:
    model = tiny(name)
    method = Prune(
        **{"structure": "neurons+heads", "criterion": "taylor", "uniform": True, "multiple_of": 4} | settings
    )
    text = cut_windows(corpus(*(prose(60, seed) for seed in range(4))), tokenizer(), context=32)
    calibration = Calibration(model.decoder, text) if method.needs_calibration else None
    return apply(model, method, calibration, 0, None)[0]


def plain(model: Model, folder: Path) -> Any:
    """What transformers makes of a dense checkpoint by itself."""
    model.save(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_dense_checkpoint_is_as_small_as_the_model(name: str, tmp_path: Path) -> None:
    found = thinned(name, structure="neurons", criterion="magnitude", sparsity=0.4)
    widths = set(found.decoder.d_ffn)
    assert len(widths) == 1
    assert not widths.pop() % 4
    dense = plain(found, tmp_path / "dense")
    same = dense.num_parameters() == found.decoder.size().parameters
    assert same == (name not in FIXED)
    assert torch.allclose(logits(found.decoder), dense(input_ids=token_ids()).logits, atol=1e-4)


@pytest.mark.parametrize("name", SAYS_HEADS + DIVIDES)
def test_heads_go_alike_where_the_configuration_can_say_so(name: str, tmp_path: Path) -> None:
    before = tiny(name).decoder
    found = thinned(name, sparsity=0.6 if name in SAYS_HEADS else 0.3)
    heads, widths = set(found.decoder.heads), set(found.decoder.d_ffn)
    assert len(heads) == len(widths) == 1
    assert before.says_heads(1) == (name in SAYS_HEADS)
    assert found.decoder.size().parameters < before.size().parameters
    dense = plain(found, tmp_path / "dense")
    assert dense.num_parameters() == found.decoder.size().parameters
    assert torch.allclose(logits(found.decoder), dense(input_ids=token_ids()).logits, atol=1e-4)
    assert [found.decoder.configured_heads] == [*heads]


def test_heads_that_the_loss_does_not_feel_go_first() -> None:
    model = tiny("llama")
    for block in model.decoder.blocks:
        block.attention.output.weight[:, : block.attention.channels] = 0  # the first group of each
    text = cut_windows(corpus(*(prose(60, seed) for seed in range(4))), tokenizer(), context=32)
    before = logits(model.decoder)
    method = Prune(structure="neurons+heads", criterion="taylor", sparsity=0.1, uniform=True, multiple_of=1)
    found, _ = apply(model, method, Calibration(model.decoder, text), 0, None)
    assert set(found.decoder.heads) == {1}
    assert set(found.decoder.d_ffn) == {48}
    assert torch.allclose(logits(found.decoder), before, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_budget_is_met_by_a_multiple(name: str) -> None:
    model = tiny(name)
    parameters = model.decoder.size().parameters
    for share in (0.9, 0.8):
        found = thinned(name, nonzero=f"{100 * share:.0f}%", multiple_of=8)
        assert found.decoder.size().parameters <= share * parameters
        assert not found.decoder.d_ffn[0] % 8
    method = Prune(structure="neurons", sparsity=0.3, uniform=True, multiple_of=8)
    resolved = method.resolved(model.decoder)
    assert resolved["uniform"] is True
    assert resolved["multiple_of"] == 8
    assert (resolved["neurons"] - resolved["removed"]) % (8 * model.decoder.n_blocks) == 0


def test_what_was_uniform_in_vain_is_refused() -> None:
    for settings, said in (
        ({"sparsity": 0.3, "uniform": True}, "uniform with structure unstructured; accepted: neurons, neurons+heads"),
        (
            {"sparsity": 0.3, "structure": "neurons", "scope": "global", "uniform": True},
            "uniform with scope global, which leaves some FFNs more neurons; accepted: matrix",
        ),
        (
            {"sparsity": 0.3, "structure": "neurons", "multiple_of": 8},
            "multiple_of 8; accepted: 1 or more, with uniform",
        ),
        (
            {"sparsity": 0.3, "structure": "neurons", "uniform": True, "multiple_of": 0},
            "multiple_of 0; accepted: 1 or more, with uniform",
        ),
    ):
        with refused(InputError, says=said):
            Prune(**settings)  # type: ignore[arg-type]
    method = Prune(structure="neurons", sparsity=0.3, uniform=True)
    with refused(InputError, says="which leaves no 64 in each FFN; accepted: at most 256, or a smaller multiple_of"):
        Prune(structure="neurons", sparsity=0.9, uniform=True).resolved(tiny("gpt2").decoder)
    uneven = tiny("gpt2").decoder
    uneven.keep_neurons_({1: torch.arange(70)})
    with refused(InputError, says="uniform, of blocks with 70, 128 neurons or heads; accepted: as many in each"):
        method.resolved(uneven)
    assert units.equal((0, 3, 3)) == 3


def test_the_command_takes_it(layerfold: Any, tmp_path: Path) -> None:
    tiny("llama").save(tmp_path / "model")
    words = ("compress", "prune", "--model", tmp_path / "model", "--structure", "neurons", "--sparsity", "0.5")
    done = layerfold(*words, "--uniform", "--multiple-of", "8", "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24
