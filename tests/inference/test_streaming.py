"""What is held in memory while a text passes through a decoder that is repaired."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from tiny import CONTEXT, corpus, prose, tiny, tokenizer
from torch import Tensor

from layerfold.inference.spool import Spool
from layerfold.maths.ridge import RegressionMoments
from layerfold.methods import Drop
from layerfold.repair.refit import refit_
from layerfold.text.windows import TokenWindows, cut_windows


def text(count: int) -> TokenWindows:
    """So many windows."""
    documents = corpus(*(prose(60, seed) for seed in range(10)))
    return cut_windows(documents, tokenizer(), context=CONTEXT, limit_tokens=count * CONTEXT)


def test_memory_grows_with_neither_depth_nor_text(monkeypatch: pytest.MonkeyPatch) -> None:
    most = {(depth, count): held(monkeypatch, depth, text(count)) for depth in (3, 7) for count in (8, 70)}
    assert len(set(most.values())) == 1, most
    assert all(each <= 6 for each in most[3, 8])


def held(monkeypatch: pytest.MonkeyPatch, depth: int, cut: TokenWindows) -> tuple[int, int, int]:
    """How many moments and files there are at a time, at most, and how many rows were read or written at once."""
    alive: dict[type, weakref.WeakSet[Any]] = {RegressionMoments: weakref.WeakSet(), Spool: weakref.WeakSet()}
    most, rows = {RegressionMoments: 0, Spool: 0}, [0]
    with monkeypatch.context() as patched:
        for kind in most:

            def made(self: Any, *args: Any, kind: Any = kind, init: Any = kind.__init__) -> None:
                init(self, *args)
                alive[kind].add(self)
                most[kind] = max(most[kind], len(alive[kind]))

            patched.setattr(kind, "__init__", made)
        write = Spool.__setitem__

        def wrote(self: Spool, batch: slice, values: Tensor) -> None:
            rows[0] = max(rows[0], values[..., 0].numel())
            write(self, batch, values)

        patched.setattr(Spool, "__setitem__", wrote)
        original = tiny("gpt2", n_layer=depth).decoder
        decoder = original.copy()
        Drop(blocks="0").apply(decoder, None)
        refit_(decoder, original, range(2, depth + 1), cut, attention=True)
    assert not any(map(len, alive.values()))
    return most[RegressionMoments], most[Spool], rows[0] // 1025
