"""Drop: blocks, or the attention or the FFN of blocks, are removed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from layerfold.calibration import Calibration
from layerfold.errors import InputError, one_of
from layerfold.methods.base import Method, Notes, parse_ranges
from layerfold.model.decoder import Decoder

Part = Literal["block", "attention", "ffn"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Drop(Method):
    """Remove blocks, or the attention or the FFN of blocks.

    What is left stays as it is. Attention and FFN go with the norm before them. A fraction is rounded to a whole number
    of blocks (a half to the even one), and is one block at least. `blocks` may also be one index, or several, as
    numbers.

    Attributes:
        blocks: indices of the blocks to remove, from 0, as ``1,3`` or ``0,2-4``.
        random: instead of `blocks`, the number of blocks to draw at random.
        fraction: instead of `blocks`, the share of the depth to draw at random, above 0 and below 1.
        every: instead of `blocks`, remove all but blocks 0, EVERY, 2 * EVERY ...
        part: remove the blocks themselves, or only their attention or FFN.
        seed: seed of the random draw.

    Source: He et al., "What Matters in Transformers? Not All Attention is Needed", 2024, removes each of the three.
    """

    blocks: str | int | tuple[int, ...] | None = None
    random: int | None = None
    fraction: float | None = None
    every: int | None = None
    part: Part = "block"
    seed: int = 0
    name: ClassVar[str] = "drop"
    rescales: ClassVar[bool] = True
    writes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if [self.blocks, self.random, self.fraction, self.every].count(None) != 3:
            raise InputError(
                f"blocks {self.blocks!r}, random {self.random}, fraction {self.fraction} and every {self.every}; "
                "accepted: one of the four"
            )
        if self.every is not None and self.every < 2:
            raise InputError(f"every {self.every}; accepted: 2 or more")
        if self.random is not None and self.random < 1:
            raise InputError(f"random {self.random}; accepted: how many to drop, 1 or more")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise InputError(f"fraction {self.fraction}; accepted: above 0 and below 1")
        if self.part not in PARTS:
            raise InputError(f"part {one_of(self.part, PARTS)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}; accepted: 0 ... {2**32 - 1}")
        if self.blocks is not None:
            _parse(self.blocks)

    @classmethod
    def ladder(cls, depth: int) -> list[Drop]:
        """Return every n-th block left."""
        return [cls(every=every) for every in range(2, depth + 1)]

    @property
    def removes_blocks(self) -> bool:
        """Whether whole blocks go."""
        return self.part == "block"

    @property
    def said(self) -> str:
        """The method in a phrase, with the blocks alone where they are listed."""
        return f"drop {spelled(self.blocks)}" if isinstance(self.blocks, tuple) else super().said

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say what was dropped."""
        kind = "blocks" if resolved["part"] == "block" else f"the {resolved['part']} of blocks"
        yield f"dropped {kind} {resolved['blocks']}"

    def indices(self, n_blocks: int) -> list[int]:
        """Return the blocks that are dropped, or whose attention or FFN is, in order.

        Raises:
            InputError: a block that a model of this depth does not have, or too many of them.
        """
        if self.blocks is not None:
            ranges = _parse(self.blocks)
            if ranges[-1].stop > n_blocks:
                raise InputError(f"blocks {self.blocks!r} for a model of blocks 0 ... {n_blocks - 1}")
            named = [index for indices in ranges for index in indices]
            self._check_count(f"blocks {self.blocks!r}", len(named), n_blocks)
            return named
        if self.every is not None:
            dropped = [index for index in range(n_blocks) if index % self.every]
            if not dropped:
                raise InputError(f"every {self.every} of a model of 1 block; accepted: 2 blocks or more")
            return dropped
        if self.random is not None:
            asked, count = f"random {self.random}", self.random
        else:
            assert self.fraction is not None
            asked, count = f"fraction {self.fraction}", max(1, round(self.fraction * n_blocks))
        self._check_count(asked, count, n_blocks)
        return sorted(random.Random(self.seed).sample(range(n_blocks), count))

    def _check_count(self, asked: str, count: int, n_blocks: int) -> None:
        most = n_blocks - 1 if self.part == "block" else n_blocks
        if count > most:
            raise InputError(f"{asked} is {count} of the model's {n_blocks} blocks; accepted: at most {most}")

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the configuration with the indices spelled out: whatever drops the same has the same."""
        return {"name": self.name, "part": self.part, "blocks": spelled(self.indices(decoder.n_blocks))}

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        dropped = self.indices(decoder.n_blocks)
        if self.part == "block":
            decoder.keep_([index for index in range(decoder.n_blocks) if index not in dropped])
        else:
            decoder.remove_(self.part, dropped)
        return {}


def spelled(indices: Iterable[int]) -> str:
    """Return indices as `Drop` takes them, in order: ``"0,2,3"``."""
    return ",".join(str(index) for index in sorted(indices))


def _parse(blocks: str | int | tuple[int, ...]) -> list[range]:
    if isinstance(blocks, int):
        blocks = str(blocks)
    elif not isinstance(blocks, str):
        blocks = ",".join(map(str, blocks))
    return parse_ranges(blocks, "block", "an index or first-last, as in '0,2-4'", shortest=1)
