"""Models of every kind that a checkpoint holds, without a tokenizer, which takes most of the time of a load."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import FAMILY_NAMES, chosen, halve_, sparsify, tiny, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.checkpoint.structure import MANIFEST
from layerfold.methods import Collapse, Merge, Share
from layerfold.model.decoder import Decoder
from layerfold.model.masks import hold_

WIDTHS = (30, 7, 48, 1)


def shares(window: str, **settings: Any) -> Callable[[Decoder], None]:
    return lambda decoder: Share(window=window, **{"init": "svd", "align": "none"} | settings).apply(decoder, None)


def ties(groups: str) -> Callable[[Decoder], None]:
    return lambda decoder: Merge(groups=groups, align="none", tie=True).apply(decoder, None)


def lacks(decoder: Decoder) -> None:
    decoder.remove_("attention", [0, 3])
    decoder.remove_("ffn", [1])


def widths(decoder: Decoder, some: tuple[int, ...] = WIDTHS) -> None:
    decoder.keep_neurons_({index: chosen(decoder, index, width) for index, width in enumerate(some)})


def heads(decoder: Decoder) -> None:
    """Fewer heads in blocks 0 and 3, fewer neurons in 0 and 1, and no attention in 2."""
    decoder.keep_heads_({0: torch.tensor([1]), 3: torch.tensor([0])})
    decoder.keep_neurons_({0: chosen(decoder, 0, 30), 1: chosen(decoder, 1, 7)})
    decoder.remove_("attention", [2])


def lacks_also(decoder: Decoder) -> None:
    decoder.remove_("attention", [0, 3])
    decoder.remove_("ffn", [0])


def masks_attention(decoder: Decoder) -> None:
    name, weight = next((n, p) for n, p in decoder.model.named_parameters() if "attn" in n and n.endswith("weight"))
    hold_(decoder, {name: sparsify(weight)})


Edit = Callable[[Decoder], object]
EDITS: dict[str, list[Edit]] = {
    "plain": [],
    "tied": [ties("1-3")],
    "lacking": [lacks, lambda decoder: decoder.remove_("ffn", [3])],
    "widths": [widths],
    "heads": [heads],
    "masked": [halve_],
    "masked, of fewer heads": [halve_, heads],
    "masked, of several widths, lacking": [halve_, widths, lacks_also],
    "shared": [shares("1:3", rank=4)],
    "shared, lacking": [shares("2:2", rank=4), lacks],
    "collapsed": [lambda decoder: Collapse(n=3, align="none").apply(decoder, None)],
    "tied, one use removed": [ties("1-3"), lambda decoder: decoder.remove_("ffn", [1])],  # which named the tensors
    "of one width": [lambda decoder: widths(decoder, (12,) * 4)],
    "the widest block dropped": [widths, lambda decoder: decoder.keep_([0, 1, 3])],
    "the widest FFN dropped": [widths, lambda decoder: decoder.remove_("ffn", [2])],
    "no FFN left": [widths, lambda decoder: decoder.remove_("ffn", range(4))],
    "fewer heads everywhere": [lambda decoder: decoder.keep_heads_(dict.fromkeys(range(4), torch.tensor([1])))],
    "tied, of one width": [
        ties("1-3"),
        lambda decoder: decoder.keep_neurons_(dict.fromkeys((3, 1, 2), chosen(decoder, 1, 9))),
    ],
    "shared, of fewer heads": [
        shares("0:2", rank=2),
        lambda decoder: decoder.keep_heads_({0: torch.tensor([1])}),
    ],
    "shared, anchored": [shares("1:3", rank=4, base="anchor", anchor="last")],
    "shared, allotted": [shares("0:4", rank=2, ranks="allotted", base="mean")],
    "shared without deltas": [shares("0:2", rank=0)],
    "shared twice": [shares("2:2", rank=5), shares("0:2", rank=3, init="zero", base="mean")],
    "shared, narrow": [
        lambda decoder: decoder.keep_neurons_({index: chosen(decoder, index, 9) for index in (1, 2)}),
        shares("1:2", rank=3),
    ],
    "shared, then shallow": [shares("0:3", rank=4), lambda decoder: decoder.keep_([1, 2, 3])],
    "shared, one of its blocks left": [shares("0:3", rank=4), lambda decoder: decoder.keep_([1, 3])],
    "shared after a tie": [ties("0-1,2-3"), shares("0:2", rank=2)],
    "shared and masked": [shares("1:3", rank=4), masks_attention],
}
OF_ALL_FAMILIES = ["plain", "tied", "lacking", "heads", "masked, of several widths, lacking", "shared, lacking"]
KINDS = [
    (kind, family)
    for kind in EDITS
    for family in (FAMILY_NAMES if kind in OF_ALL_FAMILIES else ("gpt2", "qwen2" if "shared" in kind else "qwen3"))
]


Saved = Callable[[str, str, str], Path]
"""A fixture: where a kind of model lies, of a family and in a form."""


def model_of(decoder: Decoder) -> Model:
    return Model(decoder, None, Provenance("tiny"))


@functools.cache
def _base(family: str) -> Decoder:
    return Decoder(tiny_model(family))


def made(kind: str, family: str) -> Model:
    decoder = _base(family).copy()
    for edit in EDITS[kind]:
        edit(decoder)
    return model_of(decoder)


def with_tokenizer(kind: str, family: str) -> Model:
    return tiny(family).of(made(kind, family).decoder)


def by_transformers(folder: Path) -> Any:
    """What transformers makes of a folder by itself."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def change_manifest(folder: Path, **changes: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest(folder) | changes))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-5, atol=1e-5)
