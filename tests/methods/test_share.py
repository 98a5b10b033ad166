"""Sharing FFNs: what it reproduces, what it leaves alone, how large it is, and which settings it has."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from tiny import BLOCKS, FAMILY_NAMES, assert_equal, base, continued, logits, refused, tiny, unchanged, windows

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.methods.base import Notes
from layerfold.methods.share.lowrank import BASES, INITS
from layerfold.model.decoder import Decoder
from layerfold.model.deltas import factored, multiplied_out, ranks
from layerfold.model.matrix import Matrix

CUT = windows()
GATED = [family for family in FAMILY_NAMES if family != "gpt2"]
FULL = 32  # d_model, which is less than d_ffn in all families


@functools.cache
def untouched(family: str) -> torch.Tensor:
    """Its logits."""
    return logits(base(family))


@functools.cache
def text(family: str) -> Calibration:
    return Calibration(base(family), CUT)


def shared(family: str, **settings: Any) -> tuple[Decoder, Notes]:
    """A decoder of the test's own that shares the FFNs of a window, and the notes."""
    decoder = base(family).copy()
    method = Share(**{"window": "1:3", "rank": 4} | settings)
    return decoder, method.apply(decoder, text(family) if method.needs_calibration else None)


def others(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in decoder.model.state_dict().items() if ".mlp." not in name}


# What it must reproduce
ALSO = [("fitted", family) for family in ("mistral", "qwen2", "qwen3")]


@pytest.mark.parametrize("align", ["hungarian", "none"])
@pytest.mark.parametrize("allot", ["uniform", "allotted"])
@pytest.mark.parametrize("init", ["data-svd", "svd"])
@pytest.mark.parametrize(
    ("chosen", "family"), [(chosen, family) for chosen in BASES for family in ("gpt2", "llama")] + ALSO
)
def test_of_full_rank_it_reproduces_the_model(chosen: Any, init: Any, allot: Any, align: Any, family: str) -> None:
    decoder, _ = shared(family, rank=FULL, base=chosen, init=init, ranks=allot, align=align, anchor="middle")
    assert (logits(decoder) - untouched(family)).abs().max() < 1e-4
    assert len({id(module.weight) for module in factored(decoder).values()}) == len(factored(decoder)) // 3


@pytest.mark.parametrize(
    ("family", "anchor"), [*((each, "middle") for each in FAMILY_NAMES), ("llama", "first"), ("gpt2", "last")]
)
@pytest.mark.parametrize("align", ["hungarian", "none"])
@pytest.mark.parametrize("init", ["svd", "zero"])
def test_of_rank_zero_a_shared_mean_is_a_tied_merge_with_its_own_biases(
    init: Any, align: Any, anchor: Any, family: str
) -> None:
    decoder, _ = shared(family, rank=0, base="mean", init=init, align=align, anchor=anchor)
    merged = base(family).copy()
    Merge(groups="1-3", align=align, anchor=anchor, tie=True).apply(merged, text(family))
    for path, module in factored(decoder).items():
        twin: Any = merged.model.get_submodule(path)
        weight = twin.weight.T if type(twin).__name__ == "Conv1D" else twin.weight
        assert (module.weight - weight).abs().max() < 1e-6, path
        if module.bias is not None:
            module.bias.data.copy_(twin.bias)
    assert (logits(decoder) - logits(merged)).abs().max() < 1e-4
    biases = 2 * sum(each.numel() for each in base(family).blocks[0].ffn.tensors() if each.ndim == 1)
    assert decoder.size().parameters == merged.size().parameters + biases


@pytest.mark.parametrize("chosen", BASES)
def test_deltas_that_begin_as_zero_leave_the_base_alone(chosen: Any, family: str) -> None:
    decoder, _ = shared(family, rank=4, base=chosen, init="zero")
    for module in factored(decoder).values():
        assert not module.a.any()
        assert module.b.all()
        assert not module.square()
        assert 0.5 < module.b.square().sum(1).mean().item() < 2
    assert len({tuple(module.b[0].tolist()) for module in factored(decoder).values()}) == len(factored(decoder))
    plain = base(family).copy()
    for path, module in factored(decoder).items():
        matrix = Matrix(plain.model.get_submodule(path))
        matrix.weight.copy_(module.weight.detach())
        if matrix.bias is not None:
            matrix.bias.copy_(module.bias.detach())
    assert (logits(decoder) - logits(plain)).abs().max() < 1e-4


@pytest.mark.parametrize("init", INITS)
def test_sharing_identical_ffns_is_the_identity(init: Any, family: str) -> None:
    decoder = base(family).copy()
    for block in decoder.blocks[1:]:
        block.ffn.copy_(decoder.blocks[0].ffn.tensors())
    before = logits(decoder)
    Share(window="0:4", rank=2, init=init, align="none").apply(decoder, Calibration(decoder, CUT))
    assert (logits(decoder) - before).abs().max() < 1e-4


def test_alignment_brings_permuted_copies_together() -> None:
    decoder = base("gpt2").copy()
    anchor = decoder.blocks[0].ffn
    for block in decoder.blocks[1:]:
        order = torch.randperm(anchor.d_ffn, generator=torch.Generator().manual_seed(block.index))
        block.ffn.copy_(anchor.tensors(order))
    for block in decoder.blocks:
        for name, parameter in block.module.named_parameters():
            if "ln_" in name:
                parameter.data.copy_(decoder.blocks[0].module.get_parameter(name))
            elif "c_proj" in name:
                parameter.data.mul_(0.01)  # so that all FFNs see nearly the same inputs
    before = logits(decoder)
    Share(window="0:4", rank=0, base="mean", init="svd").apply(decoder, Calibration(decoder, CUT))
    assert (logits(decoder) - before).abs().max() < 1e-4


# What it leaves alone


@pytest.mark.parametrize("init", INITS)
def test_the_same_settings_give_the_same_model(init: Any, family: str) -> None:
    one, notes = shared(family, init=init, ranks="allotted")
    decoder = tiny(family).decoder
    state = torch.random.get_rng_state()
    again = Share(window="1:3", rank=4, init=init, ranks="allotted").apply(decoder, Calibration(decoder, CUT))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again == notes
    assert_equal(one.model.state_dict(), decoder.model.state_dict())


@pytest.mark.parametrize("align", ["hungarian", "none"])
@pytest.mark.parametrize("init", INITS)
def test_no_tensor_that_the_model_had_is_written_into_or_used_for_another(init: Any, align: Any, family: str) -> None:
    decoder = tiny(family).decoder
    before, twin = logits(decoder), decoder.copy(share=True)
    with unchanged(decoder):
        Share(window="1:3", init=init, align=align).apply(twin, Calibration(decoder, CUT))
        assert not ranks(decoder)
        with torch.no_grad():
            for parameter in (each for module in factored(twin).values() for each in module.parameters()):
                parameter.add_(1)
    assert torch.equal(logits(decoder), before)


def test_nothing_but_the_windows_ffns_is_touched(family: str) -> None:
    decoder, _ = shared(family)
    assert continued(decoder) == continued(decoder, use_cache=False)
    assert_equal(others(decoder), others(base(family)))
    for one, two in zip(decoder.blocks[0].ffn.tensors(), base(family).blocks[0].ffn.tensors(), strict=True):
        assert torch.equal(one, two)
    assert decoder.n_blocks == BLOCKS
    assert decoder.d_ffn == base(family).d_ffn


# How large it is


@pytest.mark.parametrize("allot", ["uniform", "allotted"])
@pytest.mark.parametrize("rank", [0, 1, 6])
@pytest.mark.parametrize(
    ("window", "family"), [*((each, "gpt2") for each in ("0:2", "1:3", "0:4")), *(("1:3", each) for each in GATED)]
)
def test_the_parameters_are_as_many_as_the_formula_says(window: str, rank: int, allot: Any, family: str) -> None:
    decoder, notes = shared(family, window=window, rank=rank, ranks=allot, align="none")
    ffn, k = base(family).blocks[0].ffn, int(window[-1])
    shapes = [matrix.weight.shape for matrix in ffn.matrices]
    held = sum(rank * (FULL + ffn.d_ffn) for rank in notes["ranks"].values())
    expected = base(family).size().parameters - (k - 1) * sum(map(torch.Size.numel, shapes)) + held
    assert decoder.size().parameters == expected
    assert notes["ranks"] == ranks(decoder)
    assert len(notes["ranks"]) == k * len(shapes)
    assert sum(notes["ranks"].values()) == k * len(shapes) * rank


# With other methods


@pytest.mark.parametrize(
    "method",
    [
        Merge(n=2, align="none"),
        Merge(groups="0-1", align="none", tie=True),
        Collapse(groups="2-3", align="none"),
        Prune(sparsity=0.5),
        Prune(sparsity=0.5, parts="ffn"),
        Prune(sparsity=0.5, structure="neurons"),
        Prune(sparsity=0.5, criterion="wanda"),
        Prune(sparsity=0.5, structure="neurons", criterion="taylor"),
        Prune(sparsity=0.5, structure="neurons+heads", criterion="taylor"),
        Share(window="0:2", align="none", init="svd"),
        Share(window="2:2", rank=1),
        Share(window="1:3", rank=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_edits_an_ffn_refuses_one_with_a_delta(method: Method, family: str) -> None:
    decoder, _ = shared(family)
    said = r"block [123] has a low-rank delta on an FFN that it shares; accepted"
    with unchanged(decoder), refused(InputError, said):
        method.apply(decoder, Calibration(decoder, CUT))


@pytest.mark.parametrize(
    "method",
    [
        Prune(sparsity=0.5, parts="attention"),
        Prune(sparsity=0.5, parts="attention", criterion="wanda"),
        Drop(blocks="1"),
        Drop(blocks="1-3", part="attention"),
        Drop(blocks="0-1", part="ffn"),
        Merge(groups="2-3"),
        Merge(groups="2-3", align="none", tie=True),
        Share(window="2:2", rank=2, ranks="allotted"),
    ],
    ids=str,
)
def test_what_leaves_the_shared_ffns_alone_works(method: Method, family: str) -> None:
    decoder, _ = shared(family, window="0:2")
    method.apply(decoder, Calibration(decoder, CUT))
    assert logits(decoder).isfinite().all()
    if isinstance(method, Drop):
        assert continued(decoder) == continued(decoder, use_cache=False)
    plain = multiplied_out(decoder)
    assert (logits(plain) - logits(decoder)).abs().max() < 1e-4
    deltas = factored(decoder)
    assert len({id(module.weight) for module in deltas.values()}) < len(deltas) or isinstance(method, Drop)


def test_ffns_that_a_merge_tied_are_shared_each_with_a_bias_of_its_own(family: str) -> None:
    decoder = base(family).copy()
    Merge(groups="0-2", align="none", tie=True).apply(decoder, None)
    before = logits(decoder)
    Share(window="1:3", rank=FULL, base="mean", init="svd", align="none").apply(decoder, None)
    assert (logits(decoder) - before).abs().max() < 1e-4
    parameters = list(decoder.model.parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


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
    with refused(InputError, begins=said):
        Share(**settings)


ENDS = "window '{}' ends at block {} of a model of blocks 0 ... 3; accepted with {} blocks: a START of 0 ."


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ("2:3", ENDS.format("2:3", 4, 3) + ".. 1"),
        ("99:2", ENDS.format("99:2", 100, 2)),
        ("0:5", "window '0:5' for a model of 4 blocks; accepted: 2 ... 4"),
    ],
)
def test_a_window_that_the_model_has_not(window: str, said: str) -> None:
    decoder = base("gpt2").copy()
    for act in (plain(window).resolved, lambda decoder: plain(window).apply(decoder, None)):
        with unchanged(decoder), refused(InputError, begins=said):
            act(decoder)


def test_a_window_that_is_still_to_be_searched_is_not_applied() -> None:
    decoder = base("gpt2").copy()
    with pytest.raises(InputError, match=r"^window auto, and nothing has searched for it; accepted: START:K$"):
        plain("auto").apply(decoder, None)
    for k in (5, 99):
        with pytest.raises(InputError, match=f"^k {k} for a model of 4 blocks; accepted: 2 ... 4$"):
            plain("auto", k=k).resolved(decoder)
    for window in ("auto", "0:2"):
        with pytest.raises(InputError, match=r"for a model of 1 block, which has none to share with$"):
            plain(window).resolved(base("gpt2", n_layer=1))


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
    said = r"need calibration text; give a corpus, or align none and init svd$"
    with unchanged(decoder), pytest.raises(InputError, match=said):
        method.apply(decoder, None)


@pytest.mark.parametrize("window", ["0:3", "1:2", "1:3"])
def test_ffns_that_cannot_be_one(window: str) -> None:
    dropped, uneven = base("llama").copy(), base("llama").copy()
    dropped.remove_("ffn", [2])
    uneven.keep_neurons_({2: torch.arange(9)})
    for decoder, said in ((dropped, "^block 2 has no FFN: it was dropped$"), (uneven, "blocks [01] and 2 have 48 and")):
        for act in (plain(window).resolved, lambda decoder: plain(window).apply(decoder, None)):
            with pytest.raises(InputError, match=said):
                act(decoder)
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
