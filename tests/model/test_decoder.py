from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import BLOCKS, FAMILY_NAMES, continued, final, logits, step_through, tiny, tiny_model, token_ids
from torch.nn import functional
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2Model

from layerfold.errors import InputError, ModelError
from layerfold.model.decoder import Decoder

SCALED = {"scale_attn_by_inverse_layer_idx": True}
MIXED = {
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "use_sliding_window": True,
    "sliding_window": 6,
}
# What a family has that depends on the index of a block.
INDEXED = [(family, {}) for family in FAMILY_NAMES] + [
    ("gpt2", SCALED),
    ("qwen2", MIXED),
]


def test_a_matrix_is_out_by_in_and_live(family: str) -> None:
    decoder = tiny(family).decoder
    for block in decoder.blocks:
        d_ffn = block.ffn.d_ffn
        for matrix in block.ffn.matrices:
            out, into = (decoder.d_model, d_ffn) if matrix is block.ffn.down else (d_ffn, decoder.d_model)
            assert matrix.weight.shape == (out, into)
            x = torch.randn(3, into, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                assert torch.allclose(matrix.module(x), functional.linear(x, matrix.weight, matrix.bias), atol=1e-5)
            before = matrix.module(x).detach()
            matrix.weight[5, 7] += 1.0
            change = matrix.module(x).detach() - before
            assert torch.allclose(change[:, 5], x[:, 7], atol=1e-5)
            assert not change[:, :5].any()


@pytest.mark.parametrize("flipped", [False, True])
def test_permuting_neurons_and_flipping_those_of_a_gated_ffn_changes_no_logit(family: str, flipped: bool) -> None:
    decoder = tiny(family).decoder
    before = logits(decoder)
    for block in decoder.blocks:
        seeded, up = torch.Generator().manual_seed(block.index), block.ffn.up.weight.clone()
        order = torch.randperm(block.ffn.d_ffn, generator=seeded)
        signs = torch.where(torch.rand(block.ffn.d_ffn, generator=seeded) < 0.5, -1.0, 1.0)
        signs = signs if flipped and family != "gpt2" else torch.ones_like(signs)
        block.ffn.permute_(order, *([signs] if flipped and family != "gpt2" else []))
        assert torch.equal(block.ffn.up.weight, signs[:, None] * up[order])
    assert (logits(decoder) - before).abs().max() < 1e-4


def test_tied_ffns_share_storage_count_once_and_stay_tied_in_a_copy(family: str) -> None:
    decoder = tiny(family).decoder
    size, ffn = decoder.size(), sum(t.numel() for t in decoder.blocks[0].ffn.tensors())
    decoder.blocks[1].ffn.tie_(decoder.blocks[0].ffn)
    assert size.parameters - decoder.size().parameters == ffn
    copied = decoder.copy()
    assert copied.size() == decoder.size()
    for tied in (decoder, copied):
        one, two = (tied.blocks[i].ffn.tensors() for i in (0, 1))
        assert [t.data_ptr() for t in one] == [t.data_ptr() for t in two]
    copied.blocks[0].ffn.up.weight.zero_()
    assert not copied.blocks[1].ffn.up.weight.any()
    assert decoder.blocks[0].ffn.up.weight.all()


def test_the_norm_is_the_one_before_the_head(family: str) -> None:
    decoder, seen = tiny(family).decoder, []
    handle = decoder.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    expected = logits(decoder)
    handle.remove()
    assert torch.equal(decoder.model.get_output_embeddings()(seen[0]), expected)


@pytest.mark.parametrize(("family", "overrides"), INDEXED)
def test_a_sharing_copy_has_the_parameters_and_a_structure_of_its_own(
    family: str, overrides: dict[str, object]
) -> None:
    decoder = tiny(family, **overrides).decoder
    decoder.blocks[2].ffn.tie_(decoder.blocks[1].ffn)
    before, size = logits(decoder), decoder.size()
    shared = decoder.copy(share=True)
    names = dict(decoder.model.named_parameters(remove_duplicate=False))
    assert dict(shared.model.named_parameters(remove_duplicate=False)).keys() == names.keys()
    for name, parameter in shared.model.named_parameters(remove_duplicate=False):
        assert parameter is names[name], name
    assert shared.size() == size
    assert torch.equal(logits(shared), before)
    by_hand = step_through(decoder, [0, 3], token_ids())
    shared.keep_([0, 3])
    kept = final(shared)
    assert torch.allclose(kept, by_hand, atol=1e-4)
    for part in ("attention", "ffn"):
        shared.remove_(part, [0])
    # None of which the other notices.
    assert torch.equal(logits(decoder), before)
    assert decoder.size() == size
    assert continued(decoder) == continued(decoder, use_cache=False)
    assert decoder.model.config.num_hidden_layers == decoder.n_blocks == BLOCKS


def test_size_counts_zeros_apart() -> None:
    decoder = tiny("gpt2").decoder
    before = decoder.size()
    assert before.nonzero == before.parameters
    decoder.blocks[2].ffn.up.weight[:2] = 0
    assert decoder.size().parameters == before.parameters
    assert decoder.size().nonzero == before.parameters - 2 * decoder.d_model


def test_keep_renumbers_whatever_counts_blocks(family: str) -> None:
    decoder = tiny(family).decoder
    kept = [decoder.blocks[i].module for i in (0, 2, 3)]
    decoder.keep_([0, 2, 3])
    assert [block.module for block in decoder.blocks] == kept
    assert decoder.n_blocks == decoder.model.config.num_hidden_layers == 3
    numbered = [m.layer_idx for block in decoder.blocks for m in block.module.modules() if hasattr(m, "layer_idx")]
    assert numbered == [0, 1, 2]
    types = getattr(decoder.model.config, "layer_types", None)
    assert types is None or len(types) == 3


@pytest.mark.parametrize(("family", "overrides"), INDEXED)
def test_kept_blocks_compute_what_they_did_generate_and_reload_in_plain_transformers(
    family: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    decoder, ids = tiny(family, **overrides).decoder, token_ids()
    by_hand = step_through(decoder, [1, 3], ids)
    decoder.keep_([1, 3])
    kept = final(decoder, ids)
    assert torch.allclose(kept, by_hand, atol=1e-4)
    assert continued(decoder, use_cache=True) == continued(decoder, use_cache=False)
    decoder.model.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model(input_ids=ids).logits, logits(decoder))


@pytest.mark.parametrize("indices", [[], [1, 1], [2, 1], [-1, 0], [0, BLOCKS]])
def test_keep_refuses_what_are_not_blocks_in_order(indices: list[int]) -> None:
    decoder = tiny("gpt2").decoder
    with pytest.raises(InputError, match=r"blocks to keep: .*accepted: distinct indices in 0 \.\.\. 3"):
        decoder.keep_(indices)
    assert decoder.n_blocks == BLOCKS


def test_the_view_of_a_block_without_ffn_says_so_and_all_else_goes_on(family: str) -> None:
    decoder = tiny(family).decoder
    ids = token_ids()
    decoder.remove_("ffn", [1])
    assert [block.index for block in decoder.blocks] == list(range(BLOCKS))
    assert decoder.blocks[2].ffn.d_ffn > 0
    with pytest.raises(InputError, match=r"^block 1 has no FFN: it was dropped$"):
        _ = decoder.blocks[1].ffn
    hidden = final(decoder, ids)
    assert torch.equal(step_through(decoder, list(range(BLOCKS)), ids), hidden)
    decoder.check_finite()


def test_what_is_removed_is_named_by_what_is_not_in_the_state(family: str) -> None:
    decoder = tiny(family).decoder
    assert decoder.removed_prefixes == ()
    before = set(decoder.model.state_dict())
    decoder.remove_("attention", [0, 2])
    decoder.remove_("ffn", [2])
    after = set(decoder.model.state_dict())
    gone = {name for name in before if name.startswith(decoder.removed_prefixes)}
    assert gone == before - after
    assert len(gone) > 10
    assert all(any(name.startswith(prefix) for name in gone) for prefix in decoder.removed_prefixes)
    assert decoder.removed_parts == decoder.copy().removed_parts == {"attention": (0, 2), "ffn": (2,)}


@pytest.mark.parametrize("indices", [[1, 1], [-1], [BLOCKS], [0, BLOCKS], ["1"]])
@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_removing_what_is_not_there_is_refused(part: str, indices: list[int]) -> None:
    decoder = tiny("gpt2").decoder
    for name, blocks, said in (
        (part, indices, rf"blocks to remove the {part} of: .*accepted: distinct indices in 0 \.\.\. 3"),
        ("atention", [1], r"unknown part 'atention'; did you mean 'attention'\? accepted: attention, ffn"),
    ):
        with pytest.raises(InputError, match=said):
            decoder.remove_(name, blocks)
    decoder.remove_(part, [])
    assert decoder.removed_parts == {"attention": (), "ffn": ()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(value: float) -> None:
    decoder = tiny("gpt2").decoder
    decoder.blocks[0].ffn.down.weight.fill_(3e38)
    decoder.check_finite()  # finite values whose sum overflows
    assert decoder.blocks[0].ffn.down.weight.sum().isinf()
    decoder.blocks[2].ffn.down.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"'transformer\.h\.2\.mlp\.c_proj\.weight' holds 1 value"):
        decoder.check_finite()


def test_what_is_no_causal_language_model_is_refused_by_name() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for model, said in (
        (
            BertForMaskedLM(BertConfig(vocab_size=20, **sizes)),
            r"unsupported architecture 'bert'; accepted: .*gpt2, .*llama",
        ),
        (GPT2Model(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=20)), "not a causal language model: GPT2Model"),
    ):
        with pytest.raises(ModelError, match=said):
            Decoder(model)


def test_a_decoder_views_the_model_and_does_not_copy_it() -> None:
    model = tiny_model("llama")
    assert Decoder(model).blocks[1].ffn.up.weight.data_ptr() == model.model.layers[1].mlp.up_proj.weight.data_ptr()
