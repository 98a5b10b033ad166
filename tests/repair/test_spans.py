"""Blocks refitted to stand for several, against plain forward passes of models that they are put into."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from passes import FAMILIES, OUTPUTS, left, made, text
from tiny import BLOCKS, CONTEXT, FAMILY_NAMES, halve_, tiny, unchanged, windows
from torch import Tensor

from layerfold.errors import InputError, ModelError
from layerfold.inference.scoring import window_nats
from layerfold.model.decoder import Decoder
from layerfold.repair.refit import refit_
from layerfold.repair.spans import spanning
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Spanned

EDITED = ["attention", "ffn", "both parts", "share", "share without deltas", "tied"]
MODELS = [*((family, "none") for family in FAMILY_NAMES), *(("gpt2", edit) for edit in EDITED)]
EACH_MODEL = pytest.mark.parametrize(("family", "edit"), [*MODELS, ("llama", "both parts")])
SPANS = [(index, length) for length in range(2, BLOCKS + 1) for index in range(BLOCKS - length + 1)]
SUBSETS = [removed for count in range(BLOCKS) for removed in combinations(range(BLOCKS), count)]


def model(family: str, edit: str) -> Decoder:
    """A model that nothing may change."""
    return made(family, edit)[0]


@functools.cache
def spanned(family: str, edit: str = "none", attention: bool = True) -> dict[int, Decoder]:
    return spanning(model(family, edit), text(), range(2, BLOCKS + 1), attention=attention)


def stack(decoder: Decoder) -> Any:
    return operator.attrgetter(decoder.family.blocks)(decoder.model)


def with_block(decoder: Decoder, index: int, other: Decoder) -> Decoder:
    """The model with one block of another, so that all blocks before it are its own."""
    found = decoder.copy(share=True)
    stack(found)[index] = stack(other.copy(share=True))[index]
    return found


def missed(found: Tensor, should: Tensor, held_out: bool) -> float:
    rows = (torch.arange(CONTEXT) < text().lengths[:, None]) & (
        (torch.arange(len(text())) % 8 == 7)[:, None] == held_out
    )
    return float((found - should)[rows].double().square().sum())


def assembled(decoder: Decoder, spans: Mapping[int, Decoder], removed: Blocks) -> Decoder:
    """The model without some blocks, those that are left being of the decoders that lead to the next one's place."""
    kept = [index for index in range(decoder.n_blocks) if index not in removed]
    found = decoder
    for index, end in pairwise([*kept, decoder.n_blocks]):
        if end - index > 1:
            found = with_block(found, index, spans[end - index])
    found = found.copy(share=True)
    found.keep_(kept)
    return found


def changed(decoder: Decoder, other: Decoder) -> list[str]:
    """Names of the tensors that the other has for its own."""
    own = dict(decoder.model.named_parameters(remove_duplicate=False))
    theirs = dict(other.model.named_parameters(remove_duplicate=False))
    assert own.keys() == theirs.keys()
    return [name for name, tensor in own.items() if tensor.data_ptr() != theirs[name].data_ptr()]


@EACH_MODEL
def test_a_block_misses_less_of_what_is_to_enter_the_one_that_follows(family: str, edit: str) -> None:
    decoder, spans = model(family, edit), spanned(family, edit)
    states = left(decoder, text())
    for index, length in SPANS:
        should, own = states[index + length - 1], states[index]
        one = with_block(decoder, index, spans[length])
        found = left(one, text())[index]
        for held_out in (True, False):
            before, after = missed(own, should, held_out), missed(found, should, held_out)
            if before and changed(decoder, one):
                assert after < before, (index, length, held_out)
            else:  # nothing to refit, or nothing that it misses
                assert after == before
    assert len({id(each) for each in spans.values()}) == BLOCKS - 1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_of_random_models_all_blocks_are_refitted_and_attentions_help(family: str) -> None:
    decoder = model(family, "none")
    states = left(decoder, text())
    for index, length in SPANS:
        should = states[index + length - 1]
        both, alone = (
            missed(
                left(with_block(decoder, index, spanned(family, "none", attention)[length]), text())[index],
                should,
                True,
            )
            for attention in (True, False)
        )
        assert both <= alone * (1 + 1e-4) < missed(states[index], should, True)


@EACH_MODEL
def test_only_output_matrices_are_a_copys_own(family: str, edit: str) -> None:
    decoder = model(family, edit)
    for attention in (True, False):
        parts = OUTPUTS if attention else ("ffn",)
        for length, other in spanned(family, edit, attention).items():
            allowed = tuple(
                f"{decoder.family.blocks}.{index}.{name}"
                for index in range(BLOCKS - length + 1)
                for part in parts
                for name in OUTPUTS[part]
            )
            found = changed(decoder, other)
            assert found or edit in ("ffn", "both parts")
            assert all(name.startswith(allowed) for name in found)
            if edit == "share":  # what blocks have in common is not copied
                assert any(name.endswith(".a") for name in found)
                shared = [f"{name.removesuffix('.a')}.weight" for name in found if name.endswith(".a")]
                assert not set(shared) & set(found)


@pytest.mark.parametrize("edit", ["none", *EDITED])
def test_the_model_stays_as_it_is(edit: str) -> None:
    decoder = model("gpt2", edit).copy()
    modules = [(name, id(module)) for name, module in decoder.model.named_modules()]
    tensors = [id(tensor) for tensor in decoder.model.parameters()]
    with unchanged(decoder):
        spanning(decoder, text(), (2, 3))
    assert [(name, id(module)) for name, module in decoder.model.named_modules()] == modules
    assert [id(tensor) for tensor in decoder.model.parameters()] == tensors
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


@FAMILIES
@pytest.mark.parametrize("removed", [(1,), (2,), (3,), (1, 2), (2, 3), (1, 2, 3)])
def test_where_all_blocks_before_are_exact_it_is_nearly_the_whole_repair(family: str, removed: Blocks) -> None:
    """They differ in the rows' weights: by what a block should put out there, by what it puts out here."""
    decoder = model(family, "none")
    kept = [index for index in range(BLOCKS) if index not in removed]
    whole = decoder.copy()
    whole.keep_(kept)
    told = refit_(whole, decoder, [*kept[1:], BLOCKS], text(), attention=True)
    index = removed[0] - 1
    assert told[index].ridges
    states = left(decoder, text())
    should, before = states[index + len(removed)], states[index]
    quick = left(with_block(decoder, index, spanned(family)[len(removed) + 1]), text())[index]
    for held_out in (True, False):
        one, two = (missed(found, should, held_out) for found in (quick, left(whole, text())[index]))
        assert one == pytest.approx(two, rel=0.1)
        assert max(one, two) < missed(before, should, held_out)


@pytest.mark.parametrize(
    ("n_blocks", "asked", "lengths"),
    [(1, [2, 5], []), (2, [2], [2]), (2, [99, 2], [2]), (4, [], []), (4, [3], [3]), (4, [99, 4, 2], [2, 4])],
)
def test_those_lengths_are_there_that_are_asked_for_and_fit(
    n_blocks: int, asked: list[int], lengths: list[int]
) -> None:
    found = spanning(tiny("gpt2", n_layer=n_blocks).decoder, text(), asked)
    assert list(found) == lengths
    assert {each.n_blocks for each in found.values()} <= {n_blocks}


def test_what_a_block_becomes_for_one_length_does_not_hang_on_the_others() -> None:
    short, long = spanning(model("llama", "none"), text(), [2])[2], spanned("llama")[2]
    for name, tensor in short.model.named_parameters():
        torch.testing.assert_close(tensor, long.model.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_blocks_of_which_nothing_is_left_are_passed_over() -> None:
    decoder = tiny("gpt2").decoder
    for part in ("attention", "ffn"):
        decoder.remove_(part, (0, 2))
    found = spanning(decoder, text(), [2])[2]
    assert {name.split(".h.")[1][0] for name in changed(decoder, found)} == {"1"}


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="calibration text of 1 window; accepted: 2 or more"):
        spanning(tiny("gpt2").decoder, windows(limit_tokens=20), [2])
    pruned = tiny("gpt2").decoder
    halve_(pruned)
    with pytest.raises(InputError, match="would fill zeros that are to stay"):
        spanning(pruned, text(), [2])
    broken = tiny("llama").decoder
    with torch.no_grad():
        broken.blocks[1].module.mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        spanning(broken, text(), [2])


def test_paths_lead_from_each_block_that_is_left_to_the_next() -> None:
    spans = {2: model("gpt2", "none"), 3: model("gpt2", "none"), 4: model("gpt2", "none")}
    path = Spanned(model("gpt2", "none"), spans).path
    assert path(()) == (0, 1, 2, 3)
    assert path((0,)) == (1, 2, 3)  # nothing stands for what is gone before it
    assert path((3,)) == (0, 1, 4 + 2)
    assert path((1, 2)) == (8 + 0, 3)
    assert path((0, 2, 3)) == (8 + 1,)
    assert path((1, 2, 3)) == (12 + 0,)
    assert path((0, 1, 2)) == (3,)
    assert len({path(removed) for removed in SUBSETS}) == len(SUBSETS) == 2**BLOCKS - 1


@EACH_MODEL
def test_scores_are_those_of_the_model_put_together(family: str, edit: str) -> None:
    decoder, spans = model(family, edit), spanned(family, edit)
    cut = windows(stride=20)
    scores = Scores(Spanned(decoder, spans), cut)
    scores.measure(SUBSETS)
    assert scores.mean((), "kl") == pytest.approx(0, abs=1e-6)
    for removed in SUBSETS:
        one = assembled(decoder, spans, removed)
        assert scores.values(removed, "perplexity") == pytest.approx(window_nats(one, cut), rel=1e-5)
        assert scores.parameters(removed) == one.size().parameters
