from __future__ import annotations

import contextlib

import pytest
import torch
from tiny import CONTEXT, logits, tiny, windows
from torch.nn import functional

from layerfold.errors import InputError
from layerfold.inference.scoring import expected_slope, log_partition, token_nats, window_nats
from layerfold.inference.stepping import fused_activations
from layerfold.model.decoder import Decoder


def test_window_nats_are_each_windows_own(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows(stride=20)
    found = window_nats(decoder, cut)
    for row, ids in enumerate(cut.input_ids):
        first, length = int(cut.first_scored[row]), int(cut.lengths[row])
        scores = logits(decoder, ids[None, :length])[0]
        expected = functional.cross_entropy(scores[first - 1 : -1], ids[first:length], reduction="sum")
        assert found[row] == pytest.approx(expected.item(), rel=1e-5)


def test_padding_is_never_scored() -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    before = window_nats(decoder, cut)
    cut.input_ids[-1, cut.lengths[-1] :] = 99
    assert window_nats(decoder, cut) == pytest.approx(before, rel=1e-6)


def test_large_logits_do_not_overflow_and_a_bias_counts() -> None:
    decoder = tiny("llama").decoder
    head = torch.nn.Linear(32, 50)
    head.weight.data.mul_(1e4)
    head.bias.data.mul_(1e4)
    decoder.model.set_output_embeddings(head)
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(9, 32, generator=generator), torch.randint(50, (9,), generator=generator)
    expected = functional.cross_entropy(head(hidden).double(), targets, reduction="none").float().detach()
    # A logit near 2e4 is known to 2e-3 in float32, and one of these tokens costs next to nothing.
    resolution = torch.finfo(torch.float32).eps * float(head(hidden).detach().abs().max())
    assert torch.allclose(token_nats(decoder, hidden, targets), expected, rtol=1e-4, atol=2 * resolution)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_of_a_model_in_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    decoder = tiny("llama").decoder
    head = torch.nn.Linear(32, 300).to(dtype)
    head.weight.data.mul_(30)  # logits up to about 40, which bfloat16 knows to 1/8
    decoder.model.set_output_embeddings(head)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 32, generator=generator).to(dtype)
    targets = torch.randint(300, (60,), generator=generator)
    exact = functional.linear(hidden.double(), head.weight.double(), head.bias.double())
    expected = functional.cross_entropy(exact, targets, reduction="none")
    assert torch.allclose(token_nats(decoder, hidden, targets).double(), expected, atol=1e-4)
    partition = log_partition(decoder, hidden)
    embedding = exact.softmax(1) @ head.weight.double()
    assert torch.allclose(expected_slope(decoder, hidden, partition).double(), embedding, atol=2e-4)


def test_the_perplexity_of_a_model_in_bfloat16_is_that_of_its_states() -> None:
    model = tiny("llama").decoder.model.to(torch.bfloat16)
    cut = windows()
    with torch.no_grad():
        states = model.base_model(input_ids=cut.input_ids, use_cache=False).last_hidden_state[0].double()
    scores = states @ model.get_output_embeddings().weight.double().T
    expected = functional.cross_entropy(scores[:-1], cut.input_ids[0, 1:], reduction="sum")
    assert window_nats(Decoder(model), cut)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    decoder = tiny("gpt2", vocab_size=100, bos_token_id=99, eos_token_id=99).decoder
    with pytest.raises(InputError, match=r"token id 262 for a vocabulary of 100: the wrong tokenizer\?"):
        window_nats(decoder, windows())


def test_windows_longer_than_the_models_context_are_refused() -> None:
    with pytest.raises(InputError, match=r"context 33; accepted: 2 \.\.\. 32"):
        window_nats(tiny("llama").decoder, windows(context=CONTEXT + 1))


def test_the_fused_activation_computes_the_same_and_is_taken_back() -> None:
    model = tiny("gpt2").decoder.model
    acts = [block.mlp.act for block in model.transformer.h]
    x = torch.linspace(-6, 6, 101)
    with contextlib.suppress(RuntimeError), fused_activations(model):
        fused = [block.mlp.act for block in model.transformer.h]
        raise RuntimeError  # taken back even so
    assert not any(one is two for one, two in zip(acts, fused, strict=True))
    assert torch.allclose(fused[0](x), acts[0](x), atol=1e-6)
    assert all(block.mlp.act is act for block, act in zip(model.transformer.h, acts, strict=True))


def test_scoring_leaves_the_model_as_it_was(family: str) -> None:
    decoder = tiny(family).decoder
    before, names = logits(decoder), [type(module).__name__ for module in decoder.model.modules()]
    window_nats(decoder, windows())
    assert torch.equal(logits(decoder), before)
    assert [type(module).__name__ for module in decoder.model.modules()] == names
