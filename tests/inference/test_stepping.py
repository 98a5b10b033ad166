from __future__ import annotations

import torch
from tiny import BLOCKS, final, step_through, tiny, token_ids

from layerfold.inference.stepping import Stepper


def test_stepping_all_blocks_equals_the_forward_pass(family: str) -> None:
    decoder, ids = tiny(family).decoder, token_ids()
    whole = final(decoder, ids)
    assert torch.allclose(step_through(decoder, list(range(BLOCKS)), ids), whole, atol=1e-5)


def test_shapes_may_alternate(family: str) -> None:
    decoder = tiny(family).decoder
    long, short = token_ids(), token_ids(1, 9, seed=1)
    stepper = Stepper(decoder)
    states = [stepper.embed(long), stepper.embed(short)]
    for index in range(BLOCKS):
        states = [stepper.step(index, hidden) for hidden in states]
    with torch.no_grad():
        expected = [decoder.model(input_ids=ids, output_hidden_states=True) for ids in (long, short)]
    for hidden, output in zip(states, expected, strict=True):
        norm = decoder.model.base_model.ln_f if family == "gpt2" else decoder.model.base_model.norm
        assert torch.allclose(norm(hidden), output.hidden_states[-1], atol=1e-5)


def test_embedding_leaves_the_model_as_it_was(family: str) -> None:
    decoder, ids = tiny(family).decoder, token_ids()
    before = decoder.model(input_ids=ids).logits
    Stepper(decoder).embed(ids)
    assert torch.equal(decoder.model(input_ids=ids).logits, before)


def test_one_for_a_decoder_of_the_same_shape_steps_through_what_was_embedded(family: str) -> None:
    decoder, other, ids = tiny(family).decoder, tiny(family, seed=1).decoder, token_ids()
    first = Stepper(decoder)
    alike = first.like(other)  # before anything was embedded
    hidden = expected = first.embed(ids)
    own = Stepper(other)
    own.embed(ids)
    for index in range(BLOCKS):
        hidden, expected = alike.step(index, hidden), own.step(index, expected)
    assert torch.equal(hidden, expected)
    assert alike.decoder is other
