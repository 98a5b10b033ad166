"""Thin: each block keeps so many heads and neurons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods.base import Method, Notes
from layerfold.methods.thin.versions import Shape, walked
from layerfold.model.decoder import Decoder
from layerfold.model.outputs import refittable


@dataclass(frozen=True, kw_only=True)
class Thin(Method):
    """Keep so many groups of heads and so many neurons of each block; the others' work is shared out among them.

    Those stay from which what the block adds to the hidden states is regressed best, and the weights by which they
    write are that regression: see `versions`. A block that keeps nothing goes, and the one before it does its work as
    well as it can.

    Attributes:
        heads: groups of heads that each block keeps, one number a block, as ``12,8,0,12``.
        neurons: neurons that each block keeps, as ``3072,768,0,3072``.

    Source: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", NeurIPS 2023, sections 3.1
    and 3.2, for one layer at a time; here heads and neurons of a block are regressed on together.
    """

    heads: str | tuple[int, ...]
    neurons: str | tuple[int, ...]
    name: ClassVar[str] = "thin"

    def __post_init__(self) -> None:
        counts = {name: _parse(name, getattr(self, name)) for name in ("heads", "neurons")}
        if len(counts["heads"]) != len(counts["neurons"]):
            raise InputError(
                f"heads of {len(counts['heads'])} blocks and neurons of {len(counts['neurons'])}; accepted: as many"
            )
        if not any((*counts["heads"], *counts["neurons"])):
            raise InputError("heads and neurons that are all 0; accepted: at least one block that keeps something")

    @property
    def shapes(self) -> list[Shape]:
        """What each block keeps."""
        heads, neurons = _parse("heads", self.heads), _parse("neurons", self.neurons)
        return [Shape(*both) for both in zip(heads, neurons, strict=True)]

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> Thin:
        """Return the method that leaves these shapes."""
        return cls(heads=tuple(each.heads for each in shapes), neurons=tuple(each.neurons for each in shapes))

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @property
    def removes_blocks(self) -> bool:
        """Whether a block keeps nothing."""
        return Shape(0, 0) in self.shapes

    @property
    def said(self) -> str:
        """The method in a phrase."""
        shapes = self.shapes
        gone = [str(index) for index, shape in enumerate(shapes) if shape == Shape(0, 0)]
        kept = (
            f"thin to {sum(each.heads for each in shapes):,} heads and {sum(each.neurons for each in shapes):,} neurons"
        )
        return kept + (f" without {','.join(gone)}" if gone else "")

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say what each block keeps."""
        yield f"heads of each block:   {resolved['heads']}"
        yield f"neurons of each block: {resolved['neurons']}"

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the counts, spelled out.

        Raises:
            InputError: they are more than a block has, or not of as many blocks.
        """
        shapes = self.shapes
        if len(shapes) != decoder.n_blocks:
            raise InputError(f"heads and neurons of {len(shapes)} blocks for a model of {decoder.n_blocks}")
        there = [Shape(*both) for both in zip(decoder.heads, decoder.d_ffn, strict=True)]
        for index, (shape, most) in enumerate(zip(shapes, there, strict=True)):
            for name in ("heads", "neurons"):
                if getattr(shape, name) > getattr(most, name):
                    raise InputError(
                        f"{getattr(shape, name)} {name} of block {index}; accepted: 0 ... {getattr(most, name)}"
                    )
        check(decoder)
        return {
            "name": self.name,
            "heads": ",".join(str(each.heads) for each in shapes),
            "neurons": ",".join(str(each.neurons) for each in shapes),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the method as recipes write it."""
        shapes = self.shapes
        heads, neurons = (",".join(str(getattr(each, name)) for each in shapes) for name in ("heads", "neurons"))
        return {self.name: {"heads": heads, "neurons": neurons}}

    def outline(self) -> Method:
        """Return what keeps as many heads and neurons, whichever they are."""
        return _First(heads=self.heads, neurons=self.neurons)

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        self.resolved(decoder)
        if calibration is None:
            raise InputError("thin needs calibration text; give a corpus")
        shapes, depth = self.shapes, decoder.n_blocks
        there = [Shape(*both) for both in zip(decoder.heads, decoder.d_ffn, strict=True)]
        kept = [index for index, shape in enumerate(shapes) if shape != Shape(0, 0)]
        lengths = {index: after - index for index, after in zip(kept, [*kept[1:], depth], strict=True)}
        wanted = {
            index: [(shapes[index], length)]
            for index, length in lengths.items()
            if shapes[index] != there[index] or length > 1
        }
        for index, _, _, version in walked(decoder, calibration.windows, wanted, calibration.progress):
            version.apply_(decoder, index)
        decoder.keep_(kept)
        return {}


class _First(Thin):
    """The first heads and neurons of each block stay, with the weights that they have."""

    @property
    def needs_calibration(self) -> bool:
        return False

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        shapes = self.shapes
        for index, shape in enumerate(shapes):
            if 0 < shape.heads < decoder.heads[index]:
                decoder.keep_heads_({index: torch.arange(shape.heads)})
            elif decoder.heads[index] and not shape.heads and shape.neurons:
                decoder.remove_("attention", [index])
            if 0 < shape.neurons < decoder.d_ffn[index]:
                decoder.keep_neurons_({index: torch.arange(shape.neurons)})
            elif decoder.d_ffn[index] and not shape.neurons and shape.heads:
                decoder.remove_("ffn", [index])
        decoder.keep_([index for index, shape in enumerate(shapes) if shape != Shape(0, 0)])
        return {}


def check(decoder: Decoder) -> None:
    """Raise InputError for a decoder whose blocks cannot be thinned.

    Those have FFNs that several of them share, or something behind the matrices that write into the residual stream.
    """
    if any(len(blocks) > 1 for blocks in decoder.blocks_by_ffn):
        raise InputError("thin, of blocks that share an FFN; accepted: blocks with FFNs of their own")
    for index in range(decoder.n_blocks):
        for part in ("attention", "ffn"):
            output = refittable(decoder, index, part)
            if output is not None and output.normed:
                raise InputError(
                    f"thin, of a {part} whose output is normalised; accepted: outputs that are added as they are"
                )


def _parse(name: str, counts: str | tuple[int, ...]) -> list[int]:
    text = counts if isinstance(counts, str) else ",".join(map(str, counts))
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", text):
        raise InputError(f"{name} {text!r}; accepted: one number a block, as '12,8,0,12'")
    return [int(each) for each in text.split(",")]
