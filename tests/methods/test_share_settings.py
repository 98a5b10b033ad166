"""Settings of `share`: how they are refused, what they resolve to, and what its notes warn of."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from tiny import BLOCKS, logits, tiny, windows

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods import Merge, Share
from layerfold.model.decoder import Decoder
from layerfold.model.deltas import factored, ranks


@functools.cache
def base(family: str, **settings: Any) -> Decoder:
    """A tiny decoder, to be looked at only."""
    return tiny(family, **settings).decoder


def plain(window: str, rank: int = 4, **settings: Any) -> Share:
    """A method that reads no text."""
    return Share(window=window, rank=rank, **{"init": "svd", "align": "none", **settings})


# Refused


WINDOW = "; accepted: auto, or START:K, the K blocks from START on, K 2 or more, as 3:4"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        *(
            ({"window": wrong}, f"window {wrong!r}" + WINDOW)
            for wrong in ("3:1", "3:0", "4", "a:b", "-1:3", "3:", ":3", "", "3-6", "3:4:5", "3:4.0", "automatic")
        ),
        ({"k": 1}, "k 1; accepted: 2 or more blocks, as one has none to share with"),
        ({"k": 0}, "k 0; accepted: 2 or more"),
        ({"k": -3}, "k -3; accepted: 2 or more"),
        ({"window": "1:3", "k": 3}, "k 3 beside window '1:3'; accepted: k with window auto"),
        ({"rank": -1}, "rank -1; accepted: 0 or more"),
        ({"base": "means"}, "base 'means'; did you mean 'mean'? accepted: anchor, fitted, mean"),
        ({"base": "x"}, "base 'x'; accepted: anchor, fitted, mean"),
        ({"init": "data_svd"}, "init 'data_svd'; did you mean 'data-svd'? accepted: data-svd, svd, zero"),
        ({"init": None}, "init 'None'; accepted: data-svd, svd, zero"),
        ({"ranks": "alloted"}, "ranks 'alloted'; did you mean 'allotted'? accepted: allotted, uniform"),
        ({"align": "hungarain"}, "align 'hungarain'; did you mean 'hungarian'? accepted: hungarian, none"),
        ({"anchor": "fist"}, "anchor 'fist'; did you mean 'first'? accepted: first, last, middle"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_setting_says_what_was_received_and_what_is_accepted(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Share(**settings)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (
            "2:3",
            "window '2:3' ends at block 4 of a model of blocks 0 ... 3; accepted with 3 blocks: a START of 0 ... 1",
        ),
        (
            "99:2",
            "window '99:2' ends at block 100 of a model of blocks 0 ... 3; accepted with 2 blocks: a START of 0 .",
        ),
        ("0:5", "window '0:5' for a model of 4 blocks; accepted: 2 ... 4"),
    ],
)
def test_a_window_that_the_model_has_not(window: str, said: str) -> None:
    decoder = base("gpt2").copy()
    before = logits(decoder)
    for refused in (plain(window).resolved, lambda decoder: plain(window).apply(decoder, None)):
        with pytest.raises(InputError) as caught:
            refused(decoder)
        assert str(caught.value).startswith(said)
    assert torch.equal(logits(decoder), before)


def test_a_window_that_is_still_to_be_searched_is_not_applied() -> None:
    decoder = base("gpt2").copy()
    with pytest.raises(InputError, match=r"^window auto, and nothing has searched for it; accepted: START:K$"):
        plain("auto").apply(decoder, None)
    for k in (5, 99):
        with pytest.raises(InputError, match=f"^k {k} for a model of 4 blocks; accepted: 2 ... 4$"):
            plain("auto", k=k).resolved(decoder)


@pytest.mark.parametrize("window", ["auto", "0:2"])
def test_a_model_of_one_block_has_none_to_share_with(window: str) -> None:
    decoder = base("gpt2", n_layer=1)
    with pytest.raises(InputError, match=r"for a model of 1 block, which has none to share with$"):
        plain(window).resolved(decoder)


def test_a_rank_above_what_the_matrices_have(family: str) -> None:
    decoder = base(family).copy()
    plain("1:2", rank=32).apply(decoder.copy(), None)
    with pytest.raises(InputError, match=r"^rank 33; accepted: 0 \.\.\. 32, the lesser of d_model and d_ffn$"):
        plain("1:2", rank=33).apply(decoder, None)
    decoder.keep_neurons_({index: torch.arange(5) for index in range(BLOCKS)})
    with pytest.raises(InputError, match=r"^rank 6; accepted: 0 \.\.\. 5, the lesser of d_model and d_ffn$"):
        plain("1:2", rank=6).resolved(decoder)
    plain("1:2", rank=5).apply(decoder, None)
    assert set(ranks(decoder).values()) == {5}


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, True),
        ({"init": "svd"}, True),
        ({"align": "none"}, True),
        ({"align": "none", "init": "zero"}, True),  # the base is fitted to what is read
        ({"align": "none", "init": "zero", "base": "mean"}, False),
        ({"align": "none", "init": "svd"}, False),
        ({"align": "none", "init": "svd", "ranks": "allotted"}, False),
    ],
    ids=str,
)
def test_text_is_asked_for_where_activations_are_read(settings: dict[str, Any], needs: bool) -> None:
    decoder = base("gpt2").copy()
    method = Share(window="1:3", **settings)
    assert method.needs_calibration == needs
    if not needs:
        method.apply(decoder, None)
        return
    before = logits(decoder)
    with pytest.raises(InputError, match=r"need calibration text; give a corpus, or align none and init svd$"):
        method.apply(decoder, None)
    assert torch.equal(logits(decoder), before)


@pytest.mark.parametrize("window", ["0:3", "1:2", "1:3"])
def test_ffns_that_cannot_be_one(window: str) -> None:
    dropped, uneven = base("llama").copy(), base("llama").copy()
    dropped.remove_("ffn", [2])
    uneven.keep_neurons_({2: torch.arange(9)})
    for decoder, said in ((dropped, "^block 2 has no FFN: it was dropped$"), (uneven, "blocks [01] and 2 have 48 and")):
        with pytest.raises(InputError, match=said):
            plain(window).resolved(decoder)
        with pytest.raises(InputError, match=said):
            plain(window).apply(decoder, None)
        plain("0:2").apply(decoder, None)


# What settings mean


def test_settings_are_resolved_in_full() -> None:
    decoder = base("gpt2")
    found = Share(window=" 1 :  3", rank=2).resolved(decoder)
    assert found == Share(window="1:3", rank=2).resolved(decoder)
    assert found == {
        **{"name": "share", "window": "1:3", "rank": 2, "base": "fitted", "init": "data-svd", "ranks": "uniform"},
        **{"align": "hungarian", "anchor": "first"},
    }
    assert Share().resolved(decoder) == found | {"window": "auto", "k": 4, "rank": 8}
    assert Share(k=2).resolved(decoder)["k"] == Share(k=2).size == 2
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("anchor", "block"), [("first", 1), ("middle", 2), ("last", 3)])
def test_the_anchor_is_a_block_of_the_window(anchor: Any, block: int) -> None:
    decoder = base("gpt2").copy()
    method = Share(window="1:3", anchor=anchor, base="anchor", init="svd")
    assert method.anchor_of(range(1, 4)) == block
    notes = method.apply(decoder, Calibration(base("gpt2"), windows()))
    assert [(pair["anchor"], pair["block"]) for pair in notes["pairs"]] == [(block, i) for i in (1, 2, 3) if i != block]
    assert all(pair["correlation"] >= pair["unaligned"] for pair in notes["pairs"])
    for module, matrix in zip(factored(decoder).values(), base("gpt2").blocks[block].ffn.matrices, strict=False):
        assert torch.equal(module.weight, matrix.weight)
    assert json.loads(json.dumps(notes)) == notes


# Warnings


@pytest.mark.parametrize("allot", ["uniform", "allotted"])
@pytest.mark.parametrize("window", ["1:2", "0:4"])
def test_a_rank_that_makes_the_model_no_smaller_names_the_first_that_does(window: str, allot: Any, family: str) -> None:
    before = base(family).size().parameters

    def removed(rank: int) -> tuple[int, str]:
        decoder = base(family).copy()
        notes = plain(window, rank, ranks=allot).apply(decoder, None)
        return before - decoder.size().parameters, notes.get("warning", "")

    blocks, (out, inputs) = int(window[-1]), base(family).blocks[0].ffn.up.weight.shape
    most = ((blocks - 1) * out * inputs - 1) // (blocks * (out + inputs))
    said = f"makes the model no smaller; ranks up to {most} make it smaller"
    assert removed(32)[1] == f"rank 32 {said}"
    assert removed(most)[0] > 0
    assert removed(most)[1] == ""
    assert removed(most + 1)[0] <= 0
    assert removed(most + 1)[1] == f"rank {most + 1} {said}"


def test_ffns_that_are_tied_already_have_no_rank_that_makes_them_smaller() -> None:
    decoder = base("llama").copy()
    Merge(n=2, align="none", tie=True).apply(decoder, None)
    across = decoder.copy()
    warning = plain("0:2", 1).apply(decoder, None)["warning"]
    assert (
        warning == "rank 1 makes the model no smaller; FFNs that are one already are smaller: no rank makes it smaller"
    )
    assert "no rank makes" in plain("1:2", 1).apply(across, None)["warning"]  # two FFNs stay, of other blocks


@pytest.mark.parametrize("chosen", ["mean", "fitted"])
@pytest.mark.parametrize("tokens", [3, 60, 140])
def test_text_shorter_than_the_ffn_is_wide_is_regularised_and_said(tokens: int, chosen: Any, family: str) -> None:
    decoder = base(family).copy()
    calibration = Calibration(base(family), windows(limit_tokens=tokens))
    notes = Share(window="1:3", rank=4, base=chosen, align="none").apply(decoder, calibration)
    width = decoder.d_ffn[0]
    found = int(calibration.windows.lengths.sum())
    assert ("warning" in notes) == (found < width)
    if found < width:
        said = f"{found} calibration tokens for matrices of {width} inputs, whose moments are regularised"
        assert notes["warning"] == said
    assert all(parameter.isfinite().all() for parameter in decoder.model.parameters())
    full = base(family).copy()
    Share(window="1:3", rank=32, base=chosen, align="none").apply(full, calibration)
    assert (logits(full) - logits(base(family))).abs().max() < 1e-4


def test_text_shorter_than_narrow_ffns_inputs_are_many_is_said_too() -> None:
    decoder = base("llama").copy()
    decoder.keep_neurons_({index: torch.arange(8) for index in range(BLOCKS)})
    notes = Share(window="1:3", rank=2).apply(decoder, Calibration(decoder, windows(limit_tokens=20)))
    assert notes["warning"].endswith("calibration tokens for matrices of 32 inputs, whose moments are regularised")
