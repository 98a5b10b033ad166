"""What a decoder's structure is, and which methods it admits: derived from its row and its weights, listed nowhere."""

from __future__ import annotations

from dataclasses import dataclass

from layerfold.model.decoder import Decoder
from layerfold.model.families import Family


@dataclass(frozen=True)
class Structure:
    """A decoder's structure in words, and what follows from it.

    Attributes:
        ffn: its FFNs.
        attention: the matrices of its attentions.
        norms: where its norms are, and whether FFN and attention read the same.
        heads: how heads can be removed.
        refit: how a repair solves for what blocks write.
        width: whether its configuration says how many neurons FFNs have, so that narrower ones make a dense checkpoint
            smaller.
    """

    ffn: str
    attention: str
    norms: str
    heads: str
    refit: str
    width: str


def structure_of(decoder: Decoder) -> Structure:
    """Return the structure of a decoder, and what it admits."""
    family = decoder.family
    return Structure(
        ffn=_ffn(family),
        attention=_attention(family),
        norms=_norms(family),
        heads=_heads(decoder),
        refit=refit_of(family),
        width="in the configuration" if family.d_ffn else "fixed: narrower ones are padded",
    )


def refit_of(family: Family) -> str:
    """Say how a repair solves for what blocks write into the residual stream."""
    if family.stream_norms:
        return "no: norms are of the residual stream itself"
    if family.attention_after or family.ffn_after:
        return "attention and FFN in turn: a norm follows each"
    return "attention and FFN jointly"


def _ffn(family: Family) -> str:
    where = "" if family.ffn else ", on the block itself"
    if not family.gated:
        return f"plain{where}"
    return f"gated, one matrix for gate and up{where}" if family.fused_gate else f"gated{where}"


def _attention(family: Family) -> str:
    words = {"apart": "three matrices", "stacked": "one matrix, stacked", "by group": "one matrix, by group of heads"}
    others = f"; {', '.join(name for name, _ in family.mixers)} in some blocks" if family.mixers else ""
    return words[family.layout] + others


def _norms(family: Family) -> str:
    if family.stream_norms:
        return "of the residual stream"
    before, after = family.attention_norm or family.ffn_norm, family.attention_after or family.ffn_after
    said = "before and after" if before and after else "after" if after else "before"
    return said if family.ffn_norm or family.ffn_after else f"{said}, one for attention and FFN"


def _heads(decoder: Decoder) -> str:
    if decoder.family.one_group:
        return "together: all read the same keys"
    why = decoder.joined_heads
    return f"together: {why}" if why else "by group"
