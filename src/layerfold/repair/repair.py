"""Repair: closed-form adjustment of an edited decoder, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from layerfold.calibration import Calibration
from layerfold.errors import InputError, one_of
from layerfold.methods import Method
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.repair.refit import Repaired, refit_
from layerfold.repair.rescale import Sources, rescale_
from layerfold.text.windows import TokenWindows

Level = Literal["none", "rescale", "refit", "refit+attention"]
LEVELS: tuple[Level, ...] = get_args(Level)

PROTOCOL = "repair@3"


def check_level(level: str, method: object) -> None:
    """Raise InputError for an unknown level, or one that a method's result does not admit."""
    if level not in LEVELS:
        raise InputError(f"unknown repair {one_of(str(level), LEVELS)}")
    if level == "none":
        return
    if not isinstance(method, Method):
        raise InputError(f"repair {level!r} of a row that no method makes; accepted: none")
    method.check_repair(level)


@dataclass(frozen=True)
class Repair:
    """A repair of what a method breaks.

    Attributes:
        level: ``rescale`` restores the mean and deviation of each FFN neuron's input; ``refit`` solves for the last
            matrix of each FFN and its bias, so that the block's output imitates the original's hidden state;
            ``refit+attention`` solves for the last matrix of its attention too.
        windows: calibration text.
    """

    level: Level
    windows: TokenWindows
    name: ClassVar[str] = "repair"

    def resolved(self) -> dict[str, Any]:
        """Return the settings that determine a repair, as JSON."""
        return {"name": self.name, "level": self.level, "protocol": PROTOCOL}

    def sources(self, method: Method, decoder: Decoder, calibration: Calibration | None) -> Sources:
        """Return, before a method edits a decoder, which neurons each block's neurons will replace."""
        return method.members(decoder, calibration) if self.level == "rescale" else {}

    def apply(
        self,
        decoder: Decoder,
        original: Decoder,
        kept: Sequence[int],
        sources: Sources,
        progress: Progress = SILENT,
    ) -> Notes:
        """Repair a decoder in place.

        Args:
            original: the decoder that it was made from.
            kept: for each of its blocks, the index of that block in the original.
            sources: what `sources` returned.
        """
        if self.level == "rescale":
            here = {new: sources[old] for new, old in enumerate(kept) if old in sources and decoder.d_ffn[new]}
            return {"rescaled": [asdict(each) for each in rescale_(decoder, original, here, self.windows, progress)]}
        cuts = [*kept[1:], original.n_blocks]
        with_attention = self.level == "refit+attention"
        found = refit_(decoder, original, cuts, self.windows, attention=with_attention, progress=progress)
        warnings = [*_warnings(found)]
        return {"repaired": [_noted(each) for each in found]} | ({"warning": "; ".join(warnings)} if warnings else {})


def told(notes: Mapping[str, Any]) -> Iterator[str]:
    """Say, a line a block, what a repair did."""
    for each in notes.get("rescaled", []):
        yield f"block {each['block']:>2}: neurons' deviations were {100 * each['shrunk']:.0f}% of what they are now"
    for each in notes.get("repaired", []):
        before, after = (f"{100 * each[name]:.2f}%" for name in ("error", "repaired"))
        yield f"block {each['block']:>2}: misses {before} of its target -> {after}"


def _noted(repaired: Repaired) -> dict[str, Any]:
    """Return a block's errors, in shares of its target's mean square on held-out text."""
    return {
        "block": repaired.block,
        "error": repaired.before.held_out,
        "repaired": repaired.after.held_out,
        "ridges": dict(repaired.ridges),
    }


def _warnings(found: Sequence[Repaired]) -> Iterator[str]:
    if singular := [str(each.block) for each in found if each.singular]:
        yield f"singular statistics, which were regularised, in blocks {', '.join(singular)}: more text would help"
    if idle := {str(each.block): each.idle for each in found if each.idle}:
        yield "inputs that are always zero: " + ", ".join(
            f"{number:,} in block {block}" for block, number in idle.items()
        )
