"""Architectures without a row: what is read off a model, proved on it, admitted, and refused."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import close, continued, logits, text
from tiny import CONTEXT, VOCABULARY, refused, tiny_model, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedModel, T5Config

from layerfold.calibration import Calibration
from layerfold.checkpoint.load import check_architecture, load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError, ModelError, OutputError
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.model.decoder import Decoder
from layerfold.model.families import FAMILIES, Family, family_of
from layerfold.model.inferring import inferred, view
from layerfold.pipeline import apply
from layerfold.repair.repair import Repair

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
_MOE = _SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DENSE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("apertus", "arcee", "cohere2", "ernie4_5", "glm", "helium", "hunyuan_v1_dense", "seed_oss"), _SIZES
    ),
    "biogpt": _SIZES | {"num_key_value_heads": 4},
    "codegen": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4},
    "lfm2": _SIZES | {"full_attn_idxs": [0, 2]},
    "persimmon": _SIZES,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4, "max_position_embeddings": CONTEXT},
}
"""Decoders whose neurons are found, and, but for these, groups of heads."""
TOGETHER = {"codegen", "xglm"}
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "bitnet": _SIZES,  # a norm inside the FFN
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8},
    "jamba": _MOE | {"mamba_d_state": 8, "use_mamba_kernels": False},
}
"""Decoders whose FFNs are no row of matrices, or that have none."""


@functools.cache
def _made(name: str) -> PreTrainedModel:
    settings = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **settings | (DENSE | OTHERS)[name])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def model(name: str) -> Model:
    return Model(view(_made(name)), tokenizer(), Provenance("tiny")).copy()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_inferred_of_a_known_family_is_its_row(name: str) -> None:
    """But for other names of the same, and heads that are not found to be apart."""
    made = tiny_model(name)
    found, row = inferred(made), family_of(made)
    same = {"depth", "groups", "counts", "adapt", "slopes", "logit_cap", "readout", "mixers"}
    for each in dataclasses.fields(Family):
        if each.name not in same | {"layout", "one_group"}:
            assert getattr(found, each.name) == getattr(row, each.name), each.name
    assert found.readout == tuple(path for path in row.readout if path != "model.decoder.project_out")
    together = Decoder(made, found).configured_heads == 1
    assert together or not Decoder(made).joined_heads
    assert not together or name in {"gpt2", "phi3", "gpt_bigcode", *(n for n in FAMILIES if Decoder(made).joined_heads)}


METHODS: list[tuple[Method, str]] = [
    (Merge(n=2), "none"),
    (Collapse(n=2), "rescale"),
    (Drop(blocks="1"), "refit+attention"),
    (Drop(part="attention", blocks="2"), "none"),
    (Prune(sparsity=0.4, structure="neurons+heads", criterion="taylor"), "refit"),
    (Share(window="1:2", rank=2), "none"),
]


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_decoder_without_a_row_goes_through_every_method(name: str, tmp_path: Path) -> None:
    assert name not in FAMILIES
    assert (model(name).decoder.configured_heads == 1) == (name in TOGETHER)
    turn = list(DENSE).index(name)
    for number, (method, level) in enumerate(METHODS):
        if (number + turn) % 3:
            continue
        base = model(name)
        calibration = Calibration(base.decoder, text()) if method.needs_calibration else None
        repair = None if level == "none" else Repair(level, text())  # type: ignore[arg-type]
        found, _ = apply(base, method, calibration, 0, None, repair=repair)
        expected = logits(found.decoder)
        assert expected.isfinite().all()
        if (number + turn) % 2 == 0:
            folder = tmp_path / str(number)
            found.save(folder, format="compact" if number % 2 else "dense")
            back = load(folder).decoder
            assert close(logits(back), expected)
            assert continued(back) == continued(found.decoder, use_cache=False)


@pytest.mark.parametrize("name", OTHERS)
def test_of_others_blocks_go_and_single_weights_and_the_rest_is_refused_by_name(name: str, tmp_path: Path) -> None:
    pruned, _ = apply(model(name), Prune(sparsity=0.3), None, 0, None)
    assert pruned.decoder.size().nonzero < model(name).decoder.size().nonzero
    dropped, _ = apply(model(name), Drop(blocks="1"), None, 0, None)
    if name == "jamba":  # whose configuration says by its number what a block is
        with refused(OutputError, begins="by its configuration the model reads back with"):
            dropped.save(tmp_path / "dropped")
    else:
        dropped.save(tmp_path / "dropped")
        assert close(logits(load(tmp_path / "dropped").decoder), logits(dropped.decoder))
    for method in (Merge(n=2, align="none"), Share(window="1:2", rank=2, init="svd", align="none")):
        with refused(InputError, says="not a row of matrices; accepted: drop, and prune of single weights"):
            apply(model(name), method, None, 0, None)
    with refused(InputError, says="the model has no FFN to remove neurons from"):
        apply(model(name), Prune(sparsity=0.3, structure="neurons"), None, 0, None)


def test_a_part_that_a_block_does_not_have_is_refused() -> None:
    with refused(InputError, "^blocks of a mamba have no attention of their own; accepted: block$"):
        model("mamba").decoder.remove_("attention", [0])


def test_what_was_inferred_is_remembered_on_copies() -> None:
    decoder = model("helium").decoder
    assert decoder.copy().family == decoder.family
    assert Decoder(decoder.model).family == decoder.family
    with refused(ModelError, begins="unsupported architecture 'helium'"):
        Decoder(AutoModelForCausalLM.from_config(decoder.model.config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BertConfig(), "this is no causal language model"),
        (T5Config(), "this is an encoder-decoder"),
        (AutoConfig.for_model("gemma3"), "this is a model of images and text"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_before_its_weights_are_read(config: Any, said: str) -> None:
    with refused(ModelError, says=said, begins=f"unsupported architecture {config.model_type!r}; "):
        check_architecture(config)


class _Encoder(BertForMaskedLM):
    """Named as a causal model, and none."""


_Encoder.__name__ = "EncoderForCausalLM"


def test_an_encoder_is_found_out() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
    with refused(ModelError, begins="unsupported architecture 'bert'"):
        inferred(_Encoder(BertConfig(vocab_size=20, **sizes)))


def test_what_cannot_be_proved_is_said() -> None:
    made = tiny_model("llama")
    made.config.model_type = "other"
    block, own = made.model.layers[0], made.model.layers[0].forward
    block.forward = lambda hidden, *args, **kwargs: own(hidden, *args, **kwargs) * 1.5
    with refused(ModelError, says="what a block adds to the residual stream is not the sum of its attention's and its"):
        inferred(made)
