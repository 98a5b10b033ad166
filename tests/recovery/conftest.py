"""A teacher that knows the text, so that learning from it helps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import runs
import torch
from tiny import prose, tokenizer

from layerfold.checkpoint.model import Model, Provenance
from layerfold.model.decoder import Decoder


@pytest.fixture(scope="session", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Keep what is imported out of the garbage collection that each training begins with: most of its time, here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
