"""Live views of the matrices that write into the residual stream."""

from __future__ import annotations

import pytest
import torch
from tiny import halve_, logits, shared, tiny, token_ids

from layerfold.errors import InputError
from layerfold.model.ffn import MASK
from layerfold.model.readout import attention_readout, ffn_readout, reading


def test_a_readout_and_what_it_reads_are_what_a_sublayer_adds(family: str) -> None:
    decoder = tiny(family).decoder
    block = decoder.blocks[1]
    for readout, name in ((ffn_readout(block), family_part(family, "ffn")), (attention_readout(block), None)):
        assert readout is not None
        out: list[torch.Tensor] = []
        part = block.module.get_submodule(name or family_part(family, "attention"))
        handle = part.register_forward_hook(
            lambda _, inputs, output, out=out: out.append(output[0] if isinstance(output, tuple) else output)
        )
        with reading([readout]) as seen:
            logits(decoder)
        handle.remove()
        expected = seen[id(readout.module)] @ readout.weight.T
        expected = expected if readout.bias is None else expected + readout.bias
        assert (expected - out[0]).abs().max() < 1e-4
        assert readout.weight.shape[0] == decoder.d_model


def family_part(family: str, part: str) -> str:
    return {"attention": "attn" if family == "gpt2" else "self_attn", "ffn": "mlp"}[part]


def test_writing_into_one_changes_the_model(family: str) -> None:
    decoder = tiny(family).decoder
    for find in (ffn_readout, attention_readout):
        before = logits(decoder)
        readout = find(decoder.blocks[2])
        assert readout is not None
        for tensor in readout.tensors:
            tensor.zero_()
        assert not torch.equal(logits(decoder), before)
        assert len(readout.tensors) == 1 + (readout.bias is not None)


def test_of_a_shared_matrix_it_is_the_blocks_own_factor(family: str) -> None:
    decoder = shared(tiny(family), rank=3).decoder
    one, two = (ffn_readout(decoder.blocks[index]) for index in (0, 1))
    assert one is not None
    assert two is not None
    assert one.module.weight is two.module.weight
    assert one.key != two.key
    assert one.weight.shape == (decoder.d_model, 3)
    inputs = torch.randn(2, 5, decoder.d_ffn[0], generator=torch.Generator().manual_seed(0))
    before = one.module(inputs)
    assert torch.allclose(one.features(inputs), inputs @ one.module.b.T)
    change = torch.randn(decoder.d_model, 3, generator=torch.Generator().manual_seed(1))
    one.weight.add_(change)
    with torch.no_grad():
        assert (one.module(inputs) - before - one.features(inputs) @ change.T).abs().max() < 1e-4


def test_ffns_that_are_one_have_one_key() -> None:
    decoder = tiny("llama").decoder
    blocks = decoder.blocks
    blocks[1].ffn.tie_(blocks[0].ffn)
    keys = [readout.key for block in blocks if (readout := ffn_readout(block)) is not None]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_parts_that_were_dropped_have_none() -> None:
    decoder = tiny("gpt2").decoder
    decoder.remove_("ffn", [1])
    decoder.remove_("attention", [2])
    assert [ffn_readout(block) is None for block in decoder.blocks] == [False, True, False, False]
    assert [attention_readout(block) is None for block in decoder.blocks] == [False, False, True, False]


def test_pruned_weights_are_refused_and_masks_that_keep_all_are_not() -> None:
    decoder = tiny("gpt2").decoder
    module = decoder.blocks[0].ffn.down.module
    module.register_buffer(MASK, torch.ones_like(module.weight, dtype=torch.bool))
    assert ffn_readout(decoder.blocks[0]) is not None
    halve_(decoder)
    for find in (ffn_readout, attention_readout):
        with pytest.raises(InputError, match="would fill zeros that are to stay; accepted: neurons"):
            find(decoder.blocks[0])


def test_hooks_go_with_the_passes_that_they_are_for() -> None:
    decoder = tiny("gpt2").decoder
    readout = ffn_readout(decoder.blocks[0])
    assert readout is not None
    with pytest.raises(KeyError), reading([readout]):
        raise KeyError
    with reading([readout]) as seen:
        pass
    decoder.model(input_ids=token_ids())
    assert not seen
