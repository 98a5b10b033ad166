"""Repair: what an edit of a decoder has broken is put right in closed form, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from layerfold.calibration import Calibration
from layerfold.errors import InputError, one_of
from layerfold.methods import METHODS, Drop, Method, Prune, Steps
from layerfold.methods.base import GroupAverage, Notes
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.repair.refit import Repaired, refit_
from layerfold.repair.rescale import Sources, rescale_
from layerfold.text.windows import Windows

Level = Literal["none", "rescale", "refit", "refit+attention"]
LEVELS: tuple[Level, ...] = get_args(Level)

PROTOCOL = "repair@3"


def check_level(level: str, method: Any) -> None:
    """Raise InputError for a level that there is not, or that a method's result does not admit."""
    if level not in LEVELS:
        raise InputError(f"unknown repair {one_of(str(level), LEVELS)}")
    if level == "none":
        return
    if isinstance(method, Steps):
        if level == "rescale":
            raise InputError("repair 'rescale' with several steps; accepted: none, refit, refit+attention")
        for each in method.methods:
            check_level(level, each)
        return
    if getattr(method, "name", None) not in METHODS:
        raise InputError(f"repair {level!r} of a row that no method makes; accepted: none")
    if isinstance(method, Prune) and method.structure not in ("neurons", "neurons+heads"):
        raise InputError(
            f"repair {level!r} with structure {method.structure!r}, whose zeros it would fill; accepted: neurons, "
            "neurons+heads"
        )
    if level == "rescale" and not isinstance(method, GroupAverage | Drop):
        raise InputError(
            f"repair 'rescale' with {method.name}, which averages no neurons; accepted: none, refit, refit+attention"
        )


@dataclass(frozen=True)
class Repair:
    """How to put right what a method breaks.

    Attributes:
        level: ``rescale`` gives what each FFN neuron is given the mean and deviation that it has in the original;
            ``refit`` solves for the last matrix of each FFN and its bias, so that the block's output is the
            original's hidden state where it is read; ``refit+attention`` for that of its attention too.
        windows: calibration text.
    """

    level: Level
    windows: Windows

    def resolved(self) -> dict[str, Any]:
        """Return what determines a repair, as JSON."""
        return {"name": "repair", "level": self.level, "protocol": PROTOCOL}

    def sources(self, method: Method | Steps, decoder: Decoder, calibration: Calibration | None) -> Sources:
        """Return, before a method edits a decoder, what the neurons of each of its blocks will stand for."""
        if self.level != "rescale":
            return {}
        if isinstance(method, GroupAverage):
            return method.members(decoder, calibration)
        return {index: [(index, None)] for index, width in enumerate(decoder.d_ffn) if width}

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
            original: what it was made from.
            kept: for each of its blocks the original's block that it was.
            sources: see there.
        """
        if self.level == "rescale":
            here = {new: sources[old] for new, old in enumerate(kept) if old in sources and decoder.d_ffn[new]}
            return {"rescaled": [asdict(each) for each in rescale_(decoder, original, here, self.windows, progress)]}
        cuts = [*kept[1:], original.n_blocks]
        with_attention = self.level == "refit+attention"
        found = refit_(decoder, original, cuts, self.windows, attention=with_attention, progress=progress)
        warnings = [*_warnings(found)]
        return {"repaired": [_told(each) for each in found]} | ({"warning": "; ".join(warnings)} if warnings else {})


def _told(repaired: Repaired) -> dict[str, Any]:
    """Say what became of a block, in shares of its target's mean square on text held out."""
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
