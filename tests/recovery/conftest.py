"""A teacher that knows the text, so that learning from it helps."""

from __future__ import annotations

import pytest
import runs
import torch
from tiny import prose, tokenizer

from layerfold.decoder import Decoder
from layerfold.hub import Model, Provenance


@pytest.fixture(scope="session")
def _taught() -> Model:
    ids = tokenizer()(prose(3000, seed=77))["input_ids"]
    model = runs.small(n_layer=4)
    texts = list(torch.tensor(ids[: 50 * 8 * 32]).view(50, 8, 32))
    trained = runs.by_hand(model, texts, rate=1e-2, warmup=4)
    done = Model(Decoder(trained), model.tokenizer, Provenance("taught"))
    return Model(done.decoder, done.tokenizer, Provenance("taught", base_sha256=done.sha256))


@pytest.fixture
def taught(_taught: Model) -> Model:
    """Four blocks of 16, trained on the kind of text that `prose` makes."""
    return _taught.copy()
