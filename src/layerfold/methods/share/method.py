"""Share: one FFN base for a window of blocks, and a low-rank delta for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from layerfold.calibration import Calibration, FFNInputs, Pair, check_widths
from layerfold.errors import InputError, one_of
from layerfold.methods.base import (
    AUTO,
    Method,
    Notes,
    Searched,
    anchor_of,
    described,
    said_depth,
    told_of_pairs,
    told_of_search,
)
from layerfold.methods.share import lowrank
from layerfold.methods.share.lowrank import BASES, INITS, RANKS, Base, Init, Kind, Ranks, Truncation
from layerfold.model.decoder import Decoder

_K = 4


@dataclass(frozen=True, kw_only=True)
class Share(Method):
    """Let consecutive blocks share one FFN, with a low-rank delta for each.

    Each FFN matrix becomes W_l = W_c + A_l B_l; biases and norms stay each block's own. Where `base` or `init` read
    text, biases make up for what is missed on the mean. With ranks ``allotted``, `rank` is the mean rank, weighted by
    what one more takes.

    Neurons are first reordered to match the anchor's by the correlation of their activations, and flipped where gated:
    see `GroupAverage`.

    Attributes:
        window: consecutive blocks that share: ``START:K``, the K blocks from START on; or ``auto``, the best that a
            search finds.
        k: number of blocks, with `window` auto (default: 4).
        rank: rank of the deltas; 0 shares without any.
        base: FFN that is shared: the anchor's, the mean, or one fitted with the deltas.
        init: deltas that fit the outputs on calibration text, that fit the weights, or zero.
        ranks: the same rank for all deltas, or ranks allotted by singular values within the same budget.
        align: reorder neurons to match the anchor's, or share them in the order they have.
        anchor: block of the window that the others are aligned to.

    Source: the decomposition is LoRA's (Hu et al., 2021, equation 3) over a shared base; the alignment that of Verma
    and Elbayad, "Merging Feed-Forward Sublayers for Compressed Transformers", 2025, section 3.
    """

    window: str = AUTO
    k: int | None = None
    rank: int = 8
    base: Base = "fitted"
    init: Init = "data-svd"
    ranks: Ranks = "uniform"
    align: Literal["hungarian", "none"] = "hungarian"
    anchor: Literal["first", "middle", "last"] = "first"
    name: ClassVar[str] = "share"
    version: ClassVar[int] = 2
    writes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, accepted in (
            ("base", BASES),
            ("init", INITS),
            ("ranks", RANKS),
            ("align", ("hungarian", "none")),
            ("anchor", ("first", "middle", "last")),
        ):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} {one_of(str(getattr(self, name)), accepted)}")
        if self.window != AUTO:
            if self.k is not None:
                raise InputError(f"k {self.k} beside window {self.window!r}; accepted: k with window auto")
            self._parsed()
        elif self.size < 2:
            raise InputError(f"k {self.k}; accepted: 2 or more blocks, as one has none to share with")
        if self.rank < 0:
            raise InputError(f"rank {self.rank}; accepted: 0 or more")

    @property
    def size(self) -> int:
        """How many blocks share."""
        if self.window == AUTO:
            return _K if self.k is None else self.k
        return len(self._parsed())

    def _parsed(self) -> range:
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", self.window)
        if not match or int(match[2]) < 2:
            raise InputError(
                f"window {self.window!r}; accepted: auto, or START:K, the K blocks from START on, K 2 or more, as 3:4"
            )
        return range(int(match[1]), int(match[1]) + int(match[2]))

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are read."""
        return self.align == "hungarian" or self._reads_inputs

    @property
    def searched(self) -> Searched:
        """The window, where it is ``auto``."""
        return "window" if self.window == AUTO else ""

    @property
    def said(self) -> str:
        """The method in a phrase."""
        return f"share {self.window}"

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say how well neurons were matched, what a search scored, and the ranks."""
        yield from told_of_pairs(notes)
        yield from told_of_search("window", notes)
        low, high = (extreme(notes["ranks"].values()) for extreme in (min, max))
        ranks = f"{low}" if low == high else f"{low} to {high}"
        yield f"blocks {resolved['window']} (START:K) share one FFN, with deltas of rank {ranks}"

    @classmethod
    def ladder(cls, depth: int) -> list[Share]:
        """Return a window of every size."""
        # The first block stays by itself where it can: sharing it costs most, as a rule.
        return [cls(window=f"{min(1, depth - k)}:{k}") for k in range(2, depth + 1)]

    def outline(self) -> Share:
        """Return the same with matrices of the same shapes, whatever is in them."""
        return replace(self, align="none", base="anchor", init="zero")

    @property
    def _reads_inputs(self) -> bool:
        return self.init == "data-svd" or (self.base == "fitted" and self.init == "zero")

    def blocks(self, decoder: Decoder) -> range:
        """Return the window.

        Raises:
            InputError: it is to be searched, or is none of the decoder's, or its FFNs admit no such sharing.
        """
        if self.window == AUTO:
            raise InputError("window auto, and nothing has searched for it; accepted: START:K")
        window, depth = self._parsed(), decoder.n_blocks
        if window.stop > depth:
            if len(window) > depth:
                raise InputError(f"window {self.window!r} for a model of {said_depth(depth, 'share with')}")
            raise InputError(
                f"window {self.window!r} ends at block {window[-1]} of a model of blocks 0 ... {depth - 1}; accepted "
                f"with {len(window)} blocks: a START of 0 ... {depth - len(window)}"
            )
        self._check_ffns(decoder, window)
        return window

    def windows(self, decoder: Decoder) -> list[range]:
        """Return every window of this size whose FFNs can be shared.

        Raises:
            InputError: there is none.
        """
        if self.size > decoder.n_blocks:
            raise InputError(f"k {self.size} for a model of {said_depth(decoder.n_blocks, 'share with')}")
        found, refusals = [], []
        for start in range(decoder.n_blocks - self.size + 1):
            try:
                found.append(self.at(start).blocks(decoder))
            except InputError as error:
                refusals.append(str(error))
        if not found:
            raise InputError(f"no window of {self.size} blocks can be shared: {refusals[0]}")
        return found

    def at(self, start: int) -> Share:
        """Return the same for as many blocks from a given one on."""
        return replace(self, window=f"{start}:{self.size}", k=None)

    def _check_ffns(self, decoder: Decoder, window: range) -> None:
        check_widths(decoder, [(window[0], other) for other in window[1:]])
        most = min(decoder.d_model, decoder.blocks[window[0]].ffn.d_ffn)
        if self.rank > most:
            raise InputError(f"rank {self.rank}; accepted: 0 ... {most}, the lesser of d_model and d_ffn")

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the full configuration; a window that is to be searched stays ``auto``, with its size beside it."""
        settings: dict[str, Any] = {"name": self.name, "window": self.window}
        if self.window != AUTO:
            settings["window"] = f"{self.blocks(decoder)[0]}:{self.size}"
        else:
            settings["k"] = len(self.windows(decoder)[0])
        settings |= {"rank": self.rank, "base": self.base, "init": self.init, "ranks": self.ranks}
        return settings | {"align": self.align, "anchor": self.anchor}

    def anchor_of(self, window: range) -> int:
        """Return the index of a window's anchor."""
        return anchor_of(window, self.anchor)

    def calibrate(self, calibration: Calibration, windows: Iterable[range]) -> None:
        """Collect what sharing any of these windows takes, in one pass over the text of each kind."""
        chosen = list(windows)
        if self.align == "hungarian":
            calibration.matches(pair for window in chosen for pair in self._pairs(window))
        if self._reads_inputs:
            calibration.ffn_inputs(sorted({index for window in chosen for index in window}))

    def _pairs(self, window: range) -> list[Pair]:
        anchor = self.anchor_of(window)
        return [(anchor, other) for other in window if other != anchor]

    @torch.no_grad()
    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place; no tensor that it had is written into."""
        window = self.blocks(decoder)
        if self.needs_calibration and calibration is None:
            raise InputError("alignment and data-svd need calibration text; give a corpus, or align none and init svd")
        matches, inputs = {}, dict[int, FFNInputs]()
        if calibration is not None and self.align == "hungarian":
            matches = calibration.matches(self._pairs(window))
        if calibration is not None and self._reads_inputs:
            inputs = calibration.ffn_inputs(window)
        before = decoder.size().parameters
        with decoder.resident(window, edited=True):
            kinds = lowrank.kinds(decoder, window, {other: match for (_, other), match in matches.items()}, inputs)
            anchor = window.index(self.anchor_of(window))
            truncation = lowrank.fitted(kinds, self.base, self.ranks, self.rank, anchor, alone=self.init == "zero")
            lowrank.share_(decoder, kinds, truncation, self.init)
        notes: Notes = {
            "pairs": described(matches),
            "ranks": {
                member.path: rank
                for kind, ranks in zip(kinds, truncation.ranks, strict=True)
                for member, rank in zip(kind.members, ranks, strict=True)
            },
        }
        warnings = [*_regularised(inputs), *self._larger(kinds, truncation, before - decoder.size().parameters)]
        return notes | ({"warning": "; ".join(warnings)} if warnings else {})

    def _larger(self, kinds: Sequence[Kind], truncation: Truncation, removed: int) -> Iterator[str]:
        if removed <= 0:
            one = [sum(kind.base.shape) for kind in kinds]
            held = sum(each * sum(ranks) for each, ranks in zip(one, truncation.ranks, strict=True))
            most = (removed + held - 1) // (sum(one) * self.size)
            least = f"ranks up to {most} make" if most >= 0 else "FFNs that are one already are smaller: no rank makes"
            yield f"rank {self.rank} makes the model no smaller; {least} it smaller"


def _regularised(inputs: Mapping[int, FFNInputs]) -> Iterator[str]:
    for moments in inputs.values():
        tokens, width = moments.down.count, max(len(moments.up.mean), len(moments.down.mean))
        if tokens < width:
            yield f"{tokens:,} calibration tokens for matrices of {width:,} inputs, whose moments are regularised"
            return
