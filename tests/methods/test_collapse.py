from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, continued, logits, tiny, token_ids, windows
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model, Provenance
from layerfold.methods import Collapse, Merge
from layerfold.model.decoder import Decoder

# Distinct parameters of the GPT-2 shape (12 x 768, vocabulary 50,257) after each n.
GPT2_COUNTS = {2: 81_912_576, 4: 60_648_960, 6: 53_561_088, 8: 53_561_088, 10: 53_561_088}


def gpt2_shape(device: str) -> Decoder:
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(GPT2LMHeadModel(GPT2Config()).eval())


def distinct(decoder: Decoder) -> int:
    """Elements of distinct parameters, counted by identity."""
    return sum({id(p): p.numel() for _, p in decoder.model.named_parameters(remove_duplicate=False)}.values())


@pytest.mark.parametrize(("n", "count"), GPT2_COUNTS.items())
def test_the_gpt2_shape_is_left_with_exactly_as_many_parameters(n: int, count: int) -> None:
    decoder = gpt2_shape("meta")  # shapes alone: nothing is computed
    assert distinct(decoder) == 124_439_808
    Collapse(n=n, align="none").apply(decoder, None)
    assert decoder.n_blocks == math.ceil(12 / n)
    assert distinct(decoder) == count


@pytest.fixture(scope="module")
def collapsed_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    decoder = gpt2_shape("cpu")
    Collapse(n=10, align="none").apply(decoder, None)
    folder = tmp_path_factory.mktemp("gpt2") / "collapsed"
    Model(decoder, None, Provenance("gpt2-shape")).save(folder)
    return decoder, folder


def test_the_collapsed_gpt2_shape_reloads_in_plain_transformers_and_generates(
    collapsed_folder: tuple[Decoder, Path],
) -> None:
    decoder, folder = collapsed_folder
    assert decoder.size().parameters == GPT2_COUNTS[10]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == GPT2_COUNTS[10]
    reloaded = Decoder(model)
    assert torch.equal(logits(reloaded), logits(decoder))
    assert continued(reloaded) == continued(decoder, use_cache=False)


@pytest.mark.parametrize("anchor", ["first", "middle", "last"])
def test_a_group_becomes_its_anchor_with_the_averaged_ffn(family: str, anchor: Any) -> None:
    decoder = tiny(family).decoder
    calibration = Calibration(decoder, windows())
    method = Collapse(n=3, anchor=anchor)
    index = method.anchor_of(range(3))
    kept = [decoder.blocks[i].module.state_dict() for i in (index, 3)]
    kept = [{name: tensor.clone() for name, tensor in state.items()} for state in kept]
    merged = decoder.copy()
    calibration.matches([(index, i) for i in range(3) if i != index])  # before either edit
    Merge(n=3, anchor=anchor).apply(merged, calibration)
    method.apply(decoder, calibration)
    assert decoder.n_blocks == 2
    for block, before in zip(decoder.blocks, kept, strict=True):
        for name, tensor in block.module.state_dict().items():
            if "mlp" not in name or block.index == 1:  # attention and norms, and all of the block left alone
                assert torch.equal(tensor, before[name]), name
    # test_merge.py holds merge's average against numpy.
    for one, two in zip(decoder.blocks[0].ffn.tensors(), merged.blocks[index].ffn.tensors(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("n", "depth"), [(2, 2), (3, 2), (4, 1)])
def test_the_depth_is_divided_and_rounded_up(n: int, depth: int) -> None:
    decoder = tiny("llama").decoder
    Collapse(n=n, align="none").apply(decoder, None)
    assert decoder.n_blocks == decoder.model.config.num_hidden_layers == depth


def test_named_groups_collapse_and_other_blocks_stay() -> None:
    decoder = tiny("gpt2", n_layer=6).decoder
    modules = [block.module for block in decoder.blocks]
    Collapse(groups="1-2,3-4", align="none", anchor="last").apply(decoder, None)
    assert [modules.index(block.module) for block in decoder.blocks] == [0, 2, 4, 5]


def test_a_collapsed_model_generates_alike_with_and_without_the_cache(family: str) -> None:
    decoder = tiny(family).decoder
    Collapse(n=2).apply(decoder, Calibration(decoder, windows()))
    assert continued(decoder) == continued(decoder, use_cache=False)


def test_a_group_of_copies_collapses_to_one_of_them(family: str) -> None:
    decoder = tiny(family).decoder
    single = decoder.copy()
    single.keep_([0])
    for block in decoder.blocks[1:]:
        block.module.load_state_dict(decoder.blocks[0].module.state_dict())
    Collapse(n=BLOCKS, align="none").apply(decoder, None)
    assert (logits(decoder, token_ids()) - logits(single, token_ids())).abs().max() < 1e-5
