"""What leaves each block of a model, and models that a repair has to do with, made once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import CONTEXT, corpus, prose, tiny, tokenizer
from torch import Tensor

from layerfold.calibration import Calibration
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows, cut_windows

SHARE: dict[str, Any] = {"window": "0:3", "align": "none", "init": "svd", "base": "mean"}
EDITS: dict[str, Sequence[Method]] = {
    "none": [],
    "drop": [Drop(blocks="1")],
    "the first dropped": [Drop(blocks="0")],
    "one block left": [Drop(blocks="0-1,3")],
    "collapse": [Collapse(n=2, align="none", anchor="last")],
    "merge": [Merge(n=2, align="none")],
    "tied": [Merge(n=3, align="none", tie=True)],
    "a tied one dropped": [Merge(n=3, align="none", tie=True), Drop(blocks="1")],
    "neurons": [Prune(structure="neurons", criterion="magnitude", sparsity=0.4)],
    "share": [Share(**SHARE, rank=2)],
    "share without deltas": [Share(**SHARE, rank=0)],
    "attention": [Drop(blocks="0-1", part="attention")],
    "ffn": [Drop(blocks="0,2", part="ffn")],
    "both parts": [Drop(blocks="1", part="attention"), Drop(blocks="1,3", part="ffn")],
}
OUTPUTS = {"ffn": ("mlp.down_proj.", "mlp.c_proj."), "attention": ("self_attn.o_proj.", "attn.c_proj.")}
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
"""One with `Conv1D`, one gated, both with biases: where what is tested does not hang on the architecture."""


@functools.cache
def text() -> TokenWindows:
    cut = cut_windows(corpus(*(prose(60, seed) for seed in range(4))), tokenizer(), context=CONTEXT)
    assert cut.lengths[-1] < CONTEXT
    return cut


def applied(decoder: Decoder, *methods: Method, calibration: Calibration | None = None) -> list[int]:
    """Apply methods; return for each block that is left which it was."""
    before = [block.module for block in decoder.blocks]
    for method in methods:
        method.apply(decoder, calibration)
    return [before.index(block.module) for block in decoder.blocks]


@functools.cache
def made(family: str, edit: str) -> tuple[Decoder, list[int]]:
    """A model that nothing may change, and for each of its blocks the block that it was."""
    decoder = tiny(family).decoder
    return decoder, applied(decoder, *EDITS[edit])


@torch.no_grad()
def left(decoder: Decoder, cut: TokenWindows) -> list[Tensor]:
    """What leaves each block, (windows, tokens, d_model), of a plain forward pass."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, out: found.append(out[0] if isinstance(out, tuple) else out))
        for module in operator.attrgetter(decoder.family.blocks)(decoder.model)
    ]
    decoder.model(input_ids=cut.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found
