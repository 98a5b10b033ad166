"""Live views of matrices: those that write into the residual stream, and what a forward pass gives them."""

from __future__ import annotations

import pytest
import torch
from tiny import halve_, logits, shared, tiny, token_ids

from layerfold.errors import InputError
from layerfold.model.block import PARTS
from layerfold.model.matrix import MASK, Matrix, watching
from layerfold.model.outputs import refittable


def outputs(model: object, index: int) -> list[Matrix]:
    found = [model.blocks[index].output(part) for part in PARTS]  # type: ignore[attr-defined]
    assert None not in found
    return found


def test_an_output_matrix_and_what_it_reads_are_what_a_part_adds(family: str) -> None:
    decoder = tiny(family).decoder
    paths = ("attn" if family == "gpt2" else "self_attn", "mlp")
    for matrix, path in zip(outputs(decoder, 1), paths, strict=True):
        out: list[torch.Tensor] = []
        handle = (
            decoder.blocks[1]
            .module.get_submodule(path)
            .register_forward_hook(
                lambda _, inputs, output, out=out: out.append(output[0] if isinstance(output, tuple) else output)
            )
        )
        with watching([matrix]) as read, watching([matrix], outputs=True) as put_out:
            logits(decoder)
        handle.remove()
        expected = read[matrix] @ matrix.weight.T + (0 if matrix.bias is None else matrix.bias)
        assert (expected - out[0]).abs().max() < 1e-4
        assert (put_out[matrix] - out[0]).abs().max() < 1e-4
        assert matrix.weight.shape == (decoder.d_model, matrix.inputs)


def test_writing_into_one_changes_the_model(family: str) -> None:
    decoder = tiny(family).decoder
    for matrix in outputs(decoder, 2):
        before = logits(decoder)
        for tensor in matrix.tensors:
            tensor.zero_()
        assert not torch.equal(logits(decoder), before)
        assert len(matrix.tensors) == 1 + (matrix.bias is not None)


def test_of_a_shared_matrix_it_is_the_blocks_own_factor(family: str) -> None:
    decoder = shared(tiny(family), rank=3).decoder
    one, two = (outputs(decoder, index)[1] for index in (0, 1))
    assert one.module.weight is two.module.weight
    assert one.key != two.key
    assert one.weight.shape == (decoder.d_model, 3)
    assert one.inputs == decoder.d_ffn[0]
    inputs = torch.randn(2, 5, one.inputs, generator=torch.Generator().manual_seed(0))
    before = one.module(inputs)
    assert torch.allclose(one.features(inputs), inputs @ one.module.b.T)
    change = torch.randn(decoder.d_model, 3, generator=torch.Generator().manual_seed(1))
    one.weight.add_(change)
    with torch.no_grad():
        assert (one.module(inputs) - before - one.features(inputs) @ change.T).abs().max() < 1e-4
    one.own_()
    assert one.module.weight is two.module.weight, "what blocks share stays shared"


def test_a_decoder_says_which_blocks_have_one_ffn(family: str) -> None:
    decoder = tiny(family).decoder
    decoder.blocks[2].ffn.tie_(decoder.blocks[0].ffn)
    assert decoder.blocks_by_ffn == decoder.copy().blocks_by_ffn == [(0, 2), (1,), (3,)]
    decoder.remove_("ffn", [0, 3])
    assert decoder.blocks_by_ffn == [(1,), (2,)]
    assert shared(tiny(family)).decoder.blocks_by_ffn == [(0,), (1,), (2,), (3,)], "a delta is a block's own"


def test_parts_that_were_dropped_have_none() -> None:
    decoder = tiny("gpt2").decoder
    decoder.remove_("ffn", [1])
    decoder.remove_("attention", [2])
    absent = {part: [block.index for block in decoder.blocks if block.output(part) is None] for part in PARTS}
    assert absent == {"attention": [2], "ffn": [1]}
    assert refittable(decoder, 1, "ffn") is None


def test_pruned_weights_are_no_targets_of_a_repair_and_masks_that_keep_all_are() -> None:
    decoder = tiny("gpt2").decoder
    module = decoder.blocks[0].ffn.down.module
    module.register_buffer(MASK, torch.ones_like(module.weight, dtype=torch.bool))
    assert refittable(decoder, 0, "ffn") is not None
    halve_(decoder)
    for part in PARTS:
        with pytest.raises(InputError, match="would fill zeros that are to stay; accepted: neurons"):
            refittable(decoder, 0, part)


def test_hooks_go_with_the_passes_that_they_are_for() -> None:
    decoder = tiny("gpt2").decoder
    matrices = outputs(decoder, 0)
    with pytest.raises(KeyError), watching(matrices):
        raise KeyError
    with watching(matrices) as seen:
        pass
    logits(decoder)
    assert not seen
    with watching(matrices, stop=True) as seen:
        decoder.model(input_ids=token_ids())
        pytest.fail("the pass went on")
    assert list(seen) == matrices[:1]
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())
