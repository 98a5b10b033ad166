"""What all methods are: how one is applied, and what the rest of the package asks of it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal

from layerfold.calibration import Calibration, Pair
from layerfold.errors import InputError
from layerfold.maths.linalg import Match
from layerfold.model.decoder import Decoder
from layerfold.settings import settings_of

Notes = dict[str, Any]
"""What a method found while it worked, as JSON: never what it saved, which the study measures."""

AUTO = "auto"
"""Stands for what a search is to find."""

Searched = Literal["", "groups", "window"]
"""What a search is to find for a method; empty for nothing."""


class Method(ABC):
    """A way to make a decoder smaller; a frozen dataclass whose fields are its configuration.

    A method needs a `name` and `apply`. All else that the package asks of it has a default here: whether it reads text,
    what it can be repaired by, what it says of itself, what it leaves to a search, and what a plan tries of it.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same settings come to other weights, so that kept records of the old ones are made again."""
    rescales: ClassVar[bool] = False
    """Whether repair ``rescale`` may follow, which restores the statistics of the neurons in `members`."""
    writes: ClassVar[bool] = True
    """Whether `apply` writes into tensors that the decoder has; others can be tried on a copy that shares them."""

    @abstractmethod
    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place.

        Args:
            calibration: statistics of the decoder's activations; None unless `needs_calibration`.
        """

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the full configuration as JSON, defaults and groups spelled out for this decoder.

        Raises:
            InputError: a setting that it does not admit.
        """
        return {"name": self.name, **settings_of(self)}

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON, for what comes before it to decide what they mean."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def to_json(self) -> dict[str, Any]:
        """Return the method as recipes write it."""
        return {self.name: settings_of(self)}

    @property
    def steps(self) -> tuple[Method, ...]:
        """The methods that are applied, in order."""
        return (self,)

    @property
    def needs_calibration(self) -> bool:
        """Whether `apply` reads activations."""
        return False

    @property
    def searched(self) -> Searched:
        """The setting that is left to a search before `apply`."""
        return ""

    @property
    def removes_blocks(self) -> bool:
        """Whether fewer blocks are left."""
        return False

    def check_repair(self, level: str) -> None:
        """Raise InputError for a repair, other than ``none``, that the result does not admit."""
        if level == "rescale" and not self.rescales:
            raise InputError(
                f"repair 'rescale' with {self.name}, which averages no neurons; accepted: none, refit, refit+attention"
            )

    def members(self, decoder: Decoder, calibration: Calibration | None) -> dict[int, list[tuple[int, Match | None]]]:
        """Return for each block with an FFN the blocks whose FFNs become it, with how their neurons were matched."""
        return {index: [(index, None)] for index, width in enumerate(decoder.d_ffn) if width}

    @property
    def said(self) -> str:
        """The method and the settings that are not the defaults, in a phrase."""
        settings = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]  # type: ignore[arg-type]
        return f"{self.name} " + ", ".join(f"{name}={value}" for name, value, default in settings if value != default)

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say, a line each, what was done besides what the sizes say: for the terminal, from a model's provenance."""
        yield from ()

    @classmethod
    def ladder(cls, depth: int) -> Iterable[Method]:
        """Return what a plan tries of this method by itself, the least that is removed first."""
        return ()

    def outline(self) -> Method:
        """Return what leaves the same structure and reads no text."""
        return self


def described(matches: Mapping[Pair, Match]) -> list[dict[str, Any]]:
    """Return how well each pair of blocks was matched, as JSON."""
    return [
        {
            "anchor": anchor,
            "block": other,
            "correlation": match.mean_correlation,
            "unaligned": match.mean_correlation_unaligned,
        }
        for (anchor, other), match in matches.items()
    ]


def told_of_pairs(notes: Mapping[str, Any]) -> Iterator[str]:
    """Say how well each pair of blocks was matched."""
    for pair in notes.get("pairs", []):
        yield (
            f"block {pair['block']:>2} to {pair['anchor']:>2}: mean matched correlation {pair['correlation']:.3f} "
            f"(unaligned {pair['unaligned']:.3f})"
        )


def told_of_search(kind: str, notes: Mapping[str, Any]) -> Iterator[str]:
    """Say what each candidate of a search scored."""
    for name, perplexity in notes.get("search", {}).get("perplexity", {}).items():
        yield f"{kind} {name:>5}: selection perplexity {perplexity:,.4g}"


def anchor_of(blocks: Sequence[int], place: str) -> int:
    """Return the ``first``, ``middle`` or ``last`` of some blocks."""
    return blocks[{"first": 0, "middle": (len(blocks) - 1) // 2, "last": -1}[place]]


def said_depth(depth: int, doing: str) -> str:
    """Say how deep a model is, and what numbers of blocks it admits."""
    return f"1 block, which has none to {doing}" if depth == 1 else f"{depth} blocks; accepted: 2 ... {depth}"


def parse_ranges(text: str, kind: str, accepted: str, *, shortest: int) -> list[range]:
    """Parse inclusive ranges of block indices, as ``"0,2-4"``, in order and disjoint.

    Raises:
        InputError: a part that is no range of the shortest length, or an index that two of them hold.
    """
    parsed = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]) + shortest - 1:
            raise InputError(f"{kind} {part!r}; accepted: {accepted}")
        parsed.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    parsed.sort(key=lambda group: group.start)
    for one, two in pairwise(parsed):
        if two.start < one.stop:
            raise InputError(f"{kind}s {text!r} name block {two.start} twice")
    return parsed
