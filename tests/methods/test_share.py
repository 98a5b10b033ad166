from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny import BLOCKS, continued, logits, tiny, windows

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.methods.base import Notes
from layerfold.methods.share.lowrank import BASES, INITS
from layerfold.model.decoder import Decoder
from layerfold.model.deltas import factored, multiplied_out, ranks
from layerfold.model.matrix import Matrix

CUT = windows()
FULL = 32  # d_model, which is less than d_ffn in all families


@functools.cache
def base(family: str) -> Decoder:
    """A tiny decoder, to be looked at only."""
    return tiny(family).decoder


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


@pytest.mark.parametrize("align", ["hungarian", "none"])
@pytest.mark.parametrize("allot", ["uniform", "allotted"])
@pytest.mark.parametrize("init", ["data-svd", "svd"])
@pytest.mark.parametrize("chosen", BASES)
def test_of_full_rank_it_reproduces_the_model(chosen: Any, init: Any, allot: Any, align: Any, family: str) -> None:
    decoder, _ = shared(family, rank=FULL, base=chosen, init=init, ranks=allot, align=align, anchor="middle")
    assert (logits(decoder) - untouched(family)).abs().max() < 1e-4
    assert len({id(module.weight) for module in factored(decoder).values()}) == len(factored(decoder)) // 3


def test_with_a_cache_it_generates_the_same(family: str) -> None:
    decoder, _ = shared(family)
    assert continued(decoder) == continued(decoder, use_cache=False)


@pytest.mark.parametrize("anchor", ["first", "middle", "last"])
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
    states = one.model.state_dict(), decoder.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("align", ["hungarian", "none"])
@pytest.mark.parametrize("init", INITS)
def test_no_tensor_that_the_model_had_is_written_into_or_used_for_another(init: Any, align: Any, family: str) -> None:
    decoder = tiny(family).decoder
    before, state = logits(decoder), {name: each.clone() for name, each in decoder.model.state_dict().items()}
    twin = decoder.copy(share=True)
    Share(window="1:3", init=init, align=align).apply(twin, Calibration(decoder, CUT))
    assert not ranks(decoder)
    assert torch.equal(logits(decoder), before)
    with torch.no_grad():
        for module in factored(twin).values():
            for parameter in module.parameters():
                parameter.add_(1)
    assert torch.equal(logits(decoder), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.model.state_dict().items())


def test_nothing_but_the_windows_ffns_is_touched(family: str) -> None:
    decoder, _ = shared(family)
    before, after = others(base(family)), others(decoder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for one, two in zip(decoder.blocks[0].ffn.tensors(), base(family).blocks[0].ffn.tensors(), strict=True):
        assert torch.equal(one, two)
    assert decoder.n_blocks == BLOCKS
    assert decoder.d_ffn == base(family).d_ffn


# How large it is


@pytest.mark.parametrize("allot", ["uniform", "allotted"])
@pytest.mark.parametrize("rank", [0, 1, 6])
@pytest.mark.parametrize("window", ["0:2", "1:3", "0:4"])
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
        Share(window="0:2", align="none", init="svd"),
        Share(window="2:2", rank=1),
        Share(window="1:3", rank=1),
    ],
    ids=str,
)
def test_what_edits_an_ffn_refuses_one_with_a_delta(method: Method, family: str) -> None:
    decoder, _ = shared(family)
    before = logits(decoder)
    with pytest.raises(InputError, match=r"block [123] has a low-rank delta on an FFN that it shares; accepted") as no:
        method.apply(decoder, Calibration(decoder, CUT))
    assert "\n" not in str(no.value)
    assert torch.equal(logits(decoder), before)


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


@pytest.mark.parametrize("init", INITS)
def test_half_precision_stays_half_precision(init: Any, family: str) -> None:
    decoder = base(family).copy()
    decoder.model.to(torch.bfloat16)
    Share(window="1:3", rank=FULL, init=init).apply(decoder, text(family))
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {torch.bfloat16}
    assert logits(decoder).isfinite().all()
