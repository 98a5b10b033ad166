"""Dropping blocks, or their attention or FFN: what is left computes what it did, and is really smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, continued, deep, final, logits, refused, step_through, tiny, token_ids, unchanged, windows
from torch import nn
from transformers import AutoModelForCausalLM

from layerfold.api import compress
from layerfold.calibration import Calibration
from layerfold.checkpoint.load import load
from layerfold.errors import InputError
from layerfold.methods import Collapse, Drop, Merge
from layerfold.methods.drop import spelled
from layerfold.model.decoder import Decoder
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

PART = pytest.mark.parametrize("part", ["attention", "ffn"])
WHERE = pytest.mark.parametrize("blocks", ["0", str(BLOCKS - 1), "1-2", f"0-{BLOCKS - 1}"])


def sublayer(decoder: Decoder, index: int, part: str) -> nn.Module:
    module: Any = decoder.blocks[index].module
    return module.mlp if part == "ffn" else getattr(module, "attn", None) or module.self_attn


def norm(decoder: Decoder, index: int, part: str) -> nn.Module:
    module: Any = decoder.blocks[index].module
    if hasattr(module, "ln_1"):
        return module.ln_2 if part == "ffn" else module.ln_1
    return module.post_attention_layernorm if part == "ffn" else module.input_layernorm


@torch.no_grad()
def silenced(decoder: Decoder, indices: list[int], part: str) -> Decoder:
    """A copy in which the sublayers are still there, but write zeros."""
    copied = decoder.copy()
    for index in indices:
        module: Any = sublayer(copied, index, part)
        (output,) = (getattr(module, name) for name in ("c_proj", "o_proj", "down_proj") if hasattr(module, name))
        for parameter in output.parameters():
            parameter.zero_()
    return copied


def generated(decoder: Decoder, use_cache: bool) -> list[list[int]]:
    """Greedy tokens for two prompts, one left-padded, beyond the window of those models that have one."""
    prompts, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    settings = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0}
    tokens: list[list[int]] = decoder.model.generate(
        prompts, attention_mask=mask, use_cache=use_cache, **settings
    ).tolist()
    return tokens


# What is left


@pytest.mark.parametrize(("blocks", "left"), [("1", [0, 2, 3]), ("0,3", [1, 2]), ("1-3", [0]), ("0-1", [2, 3])])
def test_dropping_blocks_is_running_the_others_alone(family: str, blocks: str, left: list[int]) -> None:
    decoder, ids = tiny(family).decoder, token_ids()
    by_hand = step_through(decoder, left, ids)
    assert Drop(blocks=blocks).apply(decoder, None) == {}
    assert decoder.n_blocks == decoder.model.config.num_hidden_layers == len(left)
    hidden = final(decoder, ids)
    assert torch.equal(hidden, by_hand)
    assert continued(decoder) == continued(decoder, use_cache=False)


@PART
@WHERE
def test_dropping_a_sublayer_is_silencing_it(family: str, part: Any, blocks: str) -> None:
    decoder = tiny(family).decoder
    method = Drop(blocks=blocks, part=part)
    indices = method.indices(BLOCKS)
    expected = silenced(decoder, indices, part)
    assert not torch.equal(logits(expected), logits(decoder))
    gone = [p for i in indices for part_of in (sublayer, norm) for p in part_of(decoder, i, part).parameters()]
    before = decoder.size().parameters
    assert method.apply(decoder, None) == {}
    assert torch.equal(logits(decoder), logits(expected))
    assert generated(decoder, True) == generated(decoder, False) == generated(expected, True)
    assert before - decoder.size().parameters == sum(parameter.numel() for parameter in gone) > 0
    assert decoder.n_blocks == BLOCKS
    other = "attention" if part == "ffn" else "ffn"
    assert decoder.removed_parts == {part: tuple(indices), other: ()}


def test_attention_and_ffn_may_both_go_and_what_is_gone_moves_with_the_blocks(family: str) -> None:
    decoder = tiny(family).decoder
    shorter = decoder.copy()
    Drop(blocks=2).apply(shorter, None)
    for part in ("attention", "ffn"):
        Drop(blocks=2, part=part).apply(decoder, None)  # type: ignore[arg-type]
    assert decoder.size() == shorter.size()
    assert torch.equal(logits(decoder), logits(shorter)), "the block is nothing"
    Drop(blocks="1,3", part="attention").apply(decoder, None)
    Drop(blocks="0").apply(decoder, None)
    assert decoder.removed_parts == {"attention": (0, 1, 2), "ffn": (1,)}
    assert generated(decoder, True) == generated(decoder, False)


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_what_compress_made_comes_back_with_what_was_done(form: Any, tmp_path: Path) -> None:
    model = compress(tiny("qwen3"), Drop(random=2, seed=3, part="attention"))
    model = compress(model, Drop(blocks="1"))
    model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    drawn = spelled(Drop(random=2, seed=3).indices(BLOCKS))
    assert [step["method"] for step in loaded.provenance.steps] == [
        {"name": "drop", "part": "attention", "blocks": drawn},
        {"name": "drop", "part": "block", "blocks": "1"},
    ]
    assert [step["kept_blocks"] for step in loaded.provenance.steps] == [[0, 1, 2, 3], [0, 2, 3]]
    assert loaded.decoder.removed_parts == model.decoder.removed_parts
    assert torch.equal(logits(loaded.decoder), logits(model.decoder))
    assert loaded.sha256 == model.sha256


def test_a_dropped_model_in_plain_transformers_generates_as_ours(tmp_path: Path) -> None:
    model = compress(tiny("mistral"), Drop(blocks="0,2", part="attention"))
    model.save(tmp_path / "saved")
    plain = Decoder(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert plain.removed_parts == {"attention": (), "ffn": ()}
    assert torch.equal(logits(plain), logits(model.decoder))
    assert generated(plain, True) == generated(model.decoder, True)


# Depths


def test_of_48_blocks_half_may_go() -> None:
    decoder, ids = tiny("gpt2", n_layer=48, n_embd=8, n_head=1).decoder, token_ids()
    method = Drop(fraction=0.5, seed=5)
    left = [index for index in range(48) if index not in method.indices(48)]
    by_hand = step_through(decoder, left, ids)
    method.apply(decoder, None)
    assert decoder.n_blocks == len(left) == 24
    assert torch.equal(final(decoder, ids), by_hand)
    Drop(blocks="1-23").apply(decoder, None)
    assert decoder.n_blocks == 1
    assert continued(decoder) == continued(decoder, use_cache=False)


def test_of_one_block_only_parts_may_go(family: str) -> None:
    depth = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    decoder = tiny(family, **depth).decoder
    for method in (Drop(blocks="0"), Drop(random=1), Drop(fraction=0.1)):
        with pytest.raises(InputError, match="is 1 of the model's 1 blocks; accepted: at most 0"):
            method.apply(decoder, None)
    Drop(random=1, part="attention").apply(decoder, None)
    Drop(fraction=0.9, part="ffn").apply(decoder, None)
    assert decoder.removed_parts == {"attention": (0,), "ffn": (0,)}
    assert generated(decoder, True) == generated(decoder, False)


# Which blocks


@pytest.mark.parametrize(
    ("blocks", "indices"),
    [
        ("1,3", [1, 3]),
        ("2-4", [2, 3, 4]),
        ("0,2-4", [0, 2, 3, 4]),
        (" 7 , 2 - 4,0", [0, 2, 3, 4, 7]),
        ("3-3", [3]),
        ("11", [11]),
        (3, [3]),
        (0, [0]),
        ((5, 1), [1, 5]),
    ],
)
def test_blocks_are_named_by_index_and_by_range(blocks: Any, indices: list[int]) -> None:
    method = Drop(blocks=blocks)
    assert method.indices(12) == indices
    assert method.resolved(deep(12)) == {"name": "drop", "part": "block", "blocks": ",".join(map(str, indices))}
    assert Drop(blocks=spelled(reversed(indices))).resolved(deep(12)) == method.resolved(deep(12))


def test_a_draw_follows_its_seed_and_resolves_as_what_it_drew() -> None:
    draws = [Drop(random=4, seed=seed).indices(12) for seed in range(8)]
    assert draws == [Drop(random=4, seed=seed).indices(12) for seed in range(8)]
    assert len({tuple(draw) for draw in draws}) == 8
    assert all(draw == sorted(set(draw)) and len(draw) == 4 for draw in draws)
    assert {index for draw in draws for index in draw} == set(range(12))
    # The numbers that Python's generator has always drawn: a change of them is a change of what recipes mean.
    assert draws[0] == [0, 4, 6, 11]
    named = Drop(blocks=spelled(draws[0]), seed=7)
    assert Drop(random=4).resolved(deep(12)) == named.resolved(deep(12))
    assert Drop(random=4).resolved(deep(12)) != Drop(random=4, part="ffn").resolved(deep(12))
    assert not Drop(random=4).needs_calibration


@pytest.mark.parametrize(
    ("fraction", "n_blocks", "count"),
    [(0.5, 12, 6), (0.25, 12, 3), (0.2, 12, 2), (0.01, 12, 1), (0.5, 5, 2), (0.5, 7, 4), (0.95, 12, 11)],
)
def test_a_fraction_is_of_the_depth(fraction: float, n_blocks: int, count: int) -> None:
    assert len(Drop(fraction=fraction).indices(n_blocks)) == count
    assert Drop(fraction=fraction, seed=2).indices(n_blocks) == Drop(random=count, seed=2).indices(n_blocks)


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "blocks None, random None, fraction None and every None; accepted: one of the four"),
        ({"blocks": "1", "random": 1}, "blocks '1', random 1, fraction None and every None; accepted: one of the four"),
        ({"random": 1, "fraction": 0.5}, "random 1, fraction 0.5 and every None; accepted: one of the four"),
        ({"blocks": ""}, "block ''; accepted: an index or first-last, as in '0,2-4'"),
        ({"blocks": ()}, "block ''; accepted"),
        ({"blocks": "1,"}, "block ''; accepted"),
        ({"blocks": "4-2"}, "block '4-2'; accepted"),
        ({"blocks": "-1"}, "block '-1'; accepted"),
        ({"blocks": -1}, "block '-1'; accepted"),
        ({"blocks": "1 3"}, "block '1 3'; accepted"),
        ({"blocks": "one"}, "block 'one'; accepted"),
        ({"blocks": "1.5"}, "block '1.5'; accepted"),
        ({"blocks": "1,1"}, "blocks '1,1' name block 1 twice"),
        ({"blocks": "2-4,3"}, "blocks '2-4,3' name block 3 twice"),
        ({"blocks": "3-5,1-3"}, "blocks '3-5,1-3' name block 3 twice"),
        ({"blocks": (2, 2)}, "blocks '2,2' name block 2 twice"),
        ({"random": 0}, "random 0; accepted: how many to drop, 1 or more"),
        ({"random": -2}, "random -2; accepted"),
        ({"fraction": 0.0}, "fraction 0.0; accepted: above 0 and below 1"),
        ({"fraction": 1.0}, "fraction 1.0; accepted"),
        ({"fraction": -0.5}, "fraction -0.5; accepted"),
        ({"fraction": float("nan")}, "fraction nan; accepted"),
        ({"blocks": "1", "part": "atention"}, "part 'atention'; did you mean 'attention'? accepted: attention, block"),
        ({"random": 1, "seed": -1}, "seed -1; accepted: 0 ..."),
    ],
)
def test_a_wrong_setting_says_what_was_received_and_what_is_accepted(settings: dict[str, Any], said: str) -> None:
    with refused(InputError, says=said):
        Drop(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": "4"}, r"blocks '4' for a model of blocks 0 \.\.\. 3"),
        ({"blocks": "1-999999999"}, r"blocks '1-999999999' for a model of blocks 0 \.\.\. 3"),
        ({"blocks": "4", "part": "ffn"}, r"blocks '4' for a model of blocks 0 \.\.\. 3"),
        ({"blocks": "0-3"}, "blocks '0-3' is 4 of the model's 4 blocks; accepted: at most 3"),
        ({"random": 4}, "random 4 is 4 of the model's 4 blocks; accepted: at most 3"),
        ({"random": 9}, "random 9 is 9 of the model's 4 blocks; accepted: at most 3"),
        ({"random": 5, "part": "attention"}, "random 5 is 5 of the model's 4 blocks; accepted: at most 4"),
        ({"fraction": 0.9}, "fraction 0.9 is 4 of the model's 4 blocks; accepted: at most 3"),
    ],
)
def test_what_the_depth_does_not_admit_is_refused_before_anything_is_edited(
    settings: dict[str, Any], said: str
) -> None:
    decoder = tiny("gpt2").decoder
    for act in (lambda: Drop(**settings).resolved(deep(BLOCKS)), lambda: Drop(**settings).apply(decoder, None)):
        with unchanged(decoder), pytest.raises(InputError, match=said):
            act()


@pytest.mark.parametrize(("part", "called"), [("attention", "attention"), ("ffn", "FFN")])
def test_what_is_gone_cannot_be_dropped_again(part: Any, called: str) -> None:
    decoder = tiny("llama").decoder
    Drop(blocks="3", part=part).apply(decoder, None)
    with unchanged(decoder), pytest.raises(InputError, match=rf"^block 3 has no {called}: it was dropped$"):
        Drop(blocks="2-3", part=part).apply(decoder, None)


@pytest.mark.parametrize("method", [Merge, Collapse])
def test_an_ffn_that_is_gone_cannot_be_averaged(method: Any) -> None:
    decoder = tiny("gpt2").decoder
    Drop(blocks="3", part="ffn").apply(decoder, None)
    for align in ("none", "hungarian"):
        with unchanged(decoder), pytest.raises(InputError, match=r"^block 3 has no FFN: it was dropped$"):
            method(n=2, align=align).apply(decoder, Calibration(decoder, windows()))


# In recipes


def test_a_study_compares_what_is_dropped(study_corpus: str, tmp_path: Path) -> None:
    variants = {
        "drop_1": {"blocks": 1},
        "drop_random": {"random": 2, "seed": 1},
        "no_attention": {"blocks": "1-2", "part": "attention"},
    }
    rows = [{"label": label, "drop": settings} for label, settings in variants.items()]
    recipe = read_recipe({"variants": rows, "evaluate": ["size", {"perplexity": {"corpus": study_corpus}}]})
    base = tiny("gpt2")
    study = Study(recipe, tmp_path / "run", base=base)
    assert len(list(study.run())) == 2 * 4
    results = study.results()
    sizes: Any = [results.score(label, "size") for label in results.labels]
    assert [size["blocks"] for size in sizes] == [4, 3, 2, 4]
    gone = [part_of(base.decoder, 1, "attention") for part_of in (sublayer, norm)]
    attention = sum(p.numel() for module in gone for p in module.parameters())
    assert sizes[0]["parameters"] - sizes[3]["parameters"] == 2 * attention
    perplexities = {results.score(label, "perplexity")["value"] for label in results.labels}  # type: ignore[index]
    assert len(perplexities) == 4
    assert list(Study(recipe, tmp_path / "run", base=base).run()) == []

    late = read_recipe({"variants": [{"label": "late", "drop": {"blocks": "3-4"}}], "evaluate": ["size"]})
    with pytest.raises(InputError, match=r"variant 'late': blocks '3-4' for a model of blocks 0 \.\.\. 3"):
        Study(late, tmp_path / "late", base=base)
