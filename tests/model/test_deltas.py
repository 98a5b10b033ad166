from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import chosen, logits, refused, sparsify, tiny, unchanged
from torch import nn

from layerfold.checkpoint.save import DELTAS, hash_weights, read_training_, write_training
from layerfold.errors import InputError, ModelError
from layerfold.methods import Share
from layerfold.model import deltas
from layerfold.model.decoder import Decoder
from layerfold.model.factored import Factored
from layerfold.model.masks import hold_


@functools.cache
def _made(family: str) -> Decoder:
    return tiny(family).decoder


def shared(family: str, *windows: str, rank: int = 3, decoder: Decoder | None = None) -> Decoder:
    """A decoder that shares the FFNs of some windows, with deltas of a rank."""
    decoder = _made(family).copy() if decoder is None else decoder
    for window in windows or ("1:3",):
        Share(window=window, rank=rank, base="mean", init="svd", align="none").apply(decoder, None)
    return decoder


def paths(decoder: Decoder, *indices: int) -> list[str]:
    """Of the FFNs' matrices of some blocks."""
    ffns = [(index, decoder.family.ffn) for index in indices]
    names = [name for name in (decoder.family.up, decoder.family.gate, decoder.family.down) if name]
    found = [f"{decoder.family.blocks}.{index}.{ffn}.{name}" for index, ffn in ffns for name in names]
    return sorted(found)


def test_a_model_without_deltas_has_none(family: str) -> None:
    decoder = _made(family)
    assert deltas.factored(decoder) == deltas.ranks(decoder) == deltas.tensors(decoder) == {}
    assert deltas.multiplied_out(decoder) is decoder


def test_deltas_are_found_by_the_path_of_their_matrix(family: str) -> None:
    decoder = shared(family)
    assert sorted(deltas.factored(decoder)) == paths(decoder, 1, 2, 3)
    assert deltas.ranks(decoder) == dict.fromkeys(deltas.factored(decoder), 3)
    blocks = [int(path.split(".")[2]) for path in deltas.factored(decoder)]
    assert blocks == sorted(blocks)


def test_the_shared_weight_is_among_the_tensors_once(family: str) -> None:
    decoder = shared(family)
    found = deltas.tensors(decoder)
    ffn = _made(family).blocks[0].ffn
    weights = [name for name in found if name.endswith(".weight")]
    assert sorted(weights) == [f"{path}.weight" for path in paths(decoder, 1)]
    assert len([name for name in found if name.endswith((".a", ".b"))]) == 2 * 3 * len(ffn.matrices)
    assert len([name for name in found if name.endswith(".bias")]) == 3 * sum(m.bias is not None for m in ffn.matrices)
    state = decoder.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_multiplied_out_a_model_is_plain_and_computes_the_same(family: str) -> None:
    decoder = shared(family, "0:2", "2:2")
    before = logits(decoder)
    with unchanged(decoder):
        plain = deltas.multiplied_out(decoder)
        assert deltas.ranks(plain) == {}
        assert (logits(plain) - before).abs().max() < 1e-5
        assert plain.size() == _made(family).size()
        shapes = [{name: t.shape for name, t in each.model.state_dict().items()} for each in (plain, _made(family))]
        assert shapes[0] == shapes[1]
        with torch.no_grad():
            for tensor in (tensor for block in plain.blocks for tensor in block.ffn.tensors()):
                tensor.add_(1)
    assert torch.equal(logits(decoder), before)


def test_matrices_are_given_deltas_that_are_zero(family: str) -> None:
    decoder = _made(family).copy()
    ranks = {path: rank for rank, path in enumerate(paths(decoder, 0, 3))}
    deltas.factor_(decoder, ranks)
    assert deltas.ranks(decoder) == ranks
    for module in deltas.factored(decoder).values():
        assert isinstance(module, Factored)
        assert module.stock is (nn.Linear if family != "gpt2" else type(_made("gpt2").blocks[0].ffn.up.module))
        assert not module.a.any()
        assert not module.b.any()
    assert (logits(decoder) - logits(_made(family))).abs().max() < 1e-5
    assert sorted(deltas.ranks(decoder.copy())) == sorted(ranks)


@pytest.mark.parametrize(
    ("path", "rank", "said"),
    [
        ("model.layers.9.mlp.up_proj", 3, "a delta for 'model.layers.9.mlp.up_proj', and the model has no such matrix"),
        ("model.layers.1.mlp", 3, "a delta for 'model.layers.1.mlp', and the model has no such matrix"),
        ("lm_head", 3, "a delta for 'lm_head', and the model has no such matrix"),
        ("", 3, "a delta for '', and the model has no such matrix"),
        *(
            ("model.layers.1.mlp.up_proj", rank, f"a delta of rank {rank!r} for 'model.layers.1.mlp.up_proj'; accepted")
            for rank in (33, -1, 3.0, True, "3", None)
        ),
    ],
)
def test_a_delta_that_no_matrix_admits(path: str, rank: Any, said: str) -> None:
    with refused(InputError, begins=said):
        deltas.factor_(_made("llama").copy(), {path: rank})


def test_a_matrix_with_a_delta_admits_no_other() -> None:
    with pytest.raises(InputError, match="the model has no such matrix"):
        deltas.factor_(shared("llama"), {"model.layers.1.mlp.up_proj": 2})


@pytest.mark.parametrize("kept", [[0, 2, 3], [1, 2], [3], [0]])
def test_blocks_of_a_shared_window_can_be_dropped_afterwards(kept: list[int], family: str) -> None:
    decoder = shared(family)
    decoder.keep_(kept)
    members = [place for place, index in enumerate(kept) if index]
    assert sorted(deltas.ranks(decoder)) == paths(decoder, *members)
    found = list(deltas.factored(decoder).values())
    assert len({id(module.weight) for module in found}) == bool(members) * len(_made(family).blocks[0].ffn.matrices)
    assert (logits(deltas.multiplied_out(decoder)) - logits(decoder)).abs().max() < 1e-5


# What training writes and reads


def changed_(decoder: Decoder) -> Decoder:
    """The same decoder with other values wherever it has any that are not held at zero."""
    with torch.no_grad():
        for parameter in decoder.model.parameters():
            parameter.mul_(-3)
    return decoder


def lacking(family: str) -> Decoder:
    decoder = shared(family, "2:2")
    decoder.remove_("attention", [0, 3])
    decoder.remove_("ffn", [1])
    return decoder


def narrow(family: str) -> Decoder:
    decoder = _made(family).copy()
    decoder.keep_neurons_({index: chosen(decoder, index, 9) for index in (1, 2, 3)})
    return shared(family, decoder=decoder)


def masked(family: str) -> Decoder:
    decoder = shared(family)
    name, weight = next((n, p) for n, p in decoder.model.named_parameters() if "attn" in n and n.endswith("weight"))
    hold_(decoder, {name: sparsify(weight)})
    return decoder


def rankless(family: str) -> Decoder:
    return shared(family, rank=0)


def fitted(family: str) -> Decoder:
    decoder = _made(family).copy()
    Share(window="0:4", rank=2, base="fitted", init="svd", ranks="allotted", align="none").apply(decoder, None)
    return decoder


@pytest.mark.parametrize("build", [shared, lacking, narrow, masked, rankless, fitted])
def test_what_training_writes_is_read_bit_for_bit(build: Any, family: str, tmp_path: Path) -> None:
    decoder = build(family)
    other = changed_(decoder.copy())
    assert hash_weights(other.model) != hash_weights(decoder.model)
    write_training(decoder.model, tmp_path)
    read_training_(other.model, tmp_path)
    assert hash_weights(other.model) == hash_weights(decoder.model)
    assert torch.equal(logits(other), logits(decoder))
    assert other.size() == decoder.size()


def test_a_model_without_deltas_writes_no_file_of_them(tmp_path: Path) -> None:
    write_training(_made("llama").model, tmp_path)
    assert not (tmp_path / DELTAS).exists()


def edited(change: Any) -> Any:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / DELTAS)), folder / DELTAS)

    return damage


def without(name: str) -> Any:
    return edited(lambda found: {each: tensor for each, tensor in found.items() if each != f"model.layers.1.{name}"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / DELTAS).unlink(), "cannot be read: "),
        (lambda folder: (folder / DELTAS).write_bytes(b"{"), "cannot be read: "),
        (without("mlp.up_proj.a"), r"another model: missing \['model.layers.1.mlp.up_proj.a'\]"),
        (without("mlp.up_proj.weight"), r"another model: missing \['model.layers.1.mlp.up_proj.weight'\]"),
        (edited(lambda found: found | {"model.more.a": torch.ones(1)}), r"unexpected \['model.more.a'\]"),
        (edited(lambda found: {name: each[:2] for name, each in found.items()}), "cannot be read: "),
    ],
)
def test_deltas_that_are_damaged_are_one_line(damage: Any, said: str, tmp_path: Path) -> None:
    decoder = shared("llama")
    write_training(decoder.model, tmp_path)
    damage(tmp_path)
    with refused(ModelError, said):
        read_training_(decoder.model, tmp_path)


def test_deltas_of_other_ranks_are_refused(tmp_path: Path) -> None:
    write_training(shared("llama", rank=2).model, tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_training_(shared("llama", rank=3).model, tmp_path)
