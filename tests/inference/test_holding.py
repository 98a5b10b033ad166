"""Which windows of a text are held out, and its beginning."""

from __future__ import annotations

import torch
from tiny import CONTEXT, windows

from layerfold.inference.holding import beginning, held_out_windows


def test_the_beginning_holds_as_many_tokens_as_asked_for_in_whole_windows() -> None:
    cut = windows()
    for tokens, count in ((1, 1), (CONTEXT, 1), (CONTEXT + 1, 2), (3 * CONTEXT, 3), (10**9, len(cut))):
        first = beginning(cut, tokens)
        assert len(first) == count
        assert torch.equal(first.input_ids, cut.input_ids[:count])
        assert torch.equal(first.lengths, cut.lengths[:count])
        assert torch.equal(first.first_scored, cut.first_scored[:count])


def test_every_eighth_window_is_held_out_or_the_last_of_fewer() -> None:
    cut = windows()
    assert held_out_windows(cut).nonzero()[:, 0].tolist() == list(range(7, len(cut), 8))
    few = beginning(cut, 3 * CONTEXT)
    assert held_out_windows(few).tolist() == [False, False, True]
