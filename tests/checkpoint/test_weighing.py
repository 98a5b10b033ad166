"""What weights take on disk, computed, beside what the files are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import shared, tiny

from layerfold.checkpoint.save import bytes_on_disk
from layerfold.checkpoint.weighing import Weighed, weigh
from layerfold.methods import Merge, Prune
from layerfold.model.decoder import Decoder

HEADER = 9_000
"""More than a file's header takes, of a model so small."""


def merged(decoder: Decoder) -> None:
    Merge(n=2, tie=True, align="none").apply(decoder, None)


def pruned(decoder: Decoder) -> None:
    Prune(sparsity=0.5).apply(decoder, None)


@pytest.mark.parametrize("edit", [None, merged, pruned, lambda decoder: decoder.remove_("ffn", [1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_what_the_files_take(edit: Any, dtype: torch.dtype) -> None:
    decoder = tiny("gpt2").decoder
    if edit is not None:
        edit(decoder)
    weighed = weigh(decoder, dtype)
    assert 0 <= bytes_on_disk(decoder, "compact", dtype) - weighed.compact < HEADER
    masks = 6_144 if edit is pruned else 0  # in a file of their own
    assert 0 <= bytes_on_disk(decoder, "dense", dtype) + masks - weighed.dense < HEADER
    assert weighed.as_small == (edit is None)


def test_deltas_are_multiplied_out_in_the_dense_form() -> None:
    decoder = shared(tiny("gpt2")).decoder
    weighed = weigh(decoder, torch.float32)
    assert weighed.dense == weigh(tiny("gpt2").decoder, torch.float32).dense > weighed.compact


def test_it_is_said_once_where_both_forms_are_alike() -> None:
    before = Weighed(27_800_000, 27_800_000)
    assert Weighed(13_900_000, 13_900_000).said(before) == "27.80 MB -> 13.90 MB"
    assert before.said(before) == "27.80 MB"
    assert Weighed(27_800_000, 9_000_000).said(before) == "dense 27.80 MB, compact 27.80 MB -> 9.00 MB"
