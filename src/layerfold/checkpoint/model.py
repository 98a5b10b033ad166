"""A model: a decoder, its tokenizer, and its provenance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerfold.checkpoint import portable, readback
from layerfold.checkpoint.card import CARD, Figure, card
from layerfold.checkpoint.provenance import Provenance
from layerfold.checkpoint.save import FORMAT_VERSION, Format, hash_weights, quiet, read_manifest, write
from layerfold.checkpoint.structure import MANIFEST
from layerfold.checkpoint.weights import dtype_name
from layerfold.errors import ModelError
from layerfold.files import writing_folder
from layerfold.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


POCKET = "pocket"
"""Name of the embedded model, as users type it."""
POCKET_VERSION = "pocket@2"
"""Its name in a provenance: weights of another training are another base."""


@dataclass(frozen=True)
class Stored:
    """Format of the checkpoint that a model was loaded from.

    Attributes:
        dtype: dtype of most of its weights; None for a model that comes from no checkpoint.
        tokenizer_class: class in its ``tokenizer_config.json``; None where it names none.
        licence: that of the checkpoint's model card; None where it names none.
        rounded: hash of the weights as they were rounded to the dtype that is computed in, and before; None where they
            were not.
    """

    dtype: torch.dtype | None = None
    tokenizer_class: str | None = None
    licence: str | None = None
    rounded: tuple[str, str] | None = None


@dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer and its provenance.

    Attributes:
        stored: format of the checkpoint that it was loaded from, which `save` keeps.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    provenance: Provenance
    stored: Stored = field(default_factory=Stored)

    @property
    def name(self) -> str:
        """The base's name, and the methods applied to it."""
        done = [step["method"]["name"] for step in self.provenance.steps]
        return self.provenance.base + (f" after {', '.join(done)}" if done else "")

    @property
    def saved_dtype(self) -> torch.dtype:
        """Default dtype of the weights in `save`: that of the checkpoint they came from."""
        own: torch.dtype = self.decoder.model.dtype
        return self.stored.dtype or own

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights, as they were at the first request; see `now_sha256`."""
        return self.now_sha256

    @property
    def now_sha256(self) -> str:
        """Hash of the weights as they are now. Weights that are only rounded count as their checkpoint holds them."""
        now = hash_weights(self.decoder.model)
        rounded, own = self.stored.rounded or (None, now)
        return own if now == rounded else now

    def _card(self, format: Format, dtype: torch.dtype, figures: Sequence[Figure]) -> str:
        return card(self.decoder, self.provenance, self.stored.licence, format, dtype, figures)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ModelError: the model came without one.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"the model {self.provenance.base!r} has no tokenizer, and text cannot be read without one"
            )
        return self.tokenizer

    def with_step(self, step: dict[str, Any]) -> Model:
        """Return this model with a step added to its provenance."""
        provenance = replace(self.provenance, steps=(*self.provenance.steps, step))
        return replace(self, provenance=provenance)

    def copy(self) -> Model:
        """Return a copy, whose decoder can be edited without effect on this one."""
        return self.of(self.decoder.copy())

    def of(self, decoder: Decoder) -> Model:
        """Return this model with another decoder."""
        return replace(self, decoder=decoder)

    def save(
        self,
        directory: Path | str,
        *,
        format: Format = "dense",
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        figures: Sequence[Figure] = (),
    ) -> str:
        """Write a checkpoint and its model card, and read it back; the folder appears whole or not at all.

        Args:
            format: see `checkpoint.save`.
            overwrite: replace a folder that is not empty, with everything in it.
            dtype: dtype of the weights in the files; None takes `saved_dtype`.
            figures: what was measured of it, for the card.

        Returns:
            The form and the dtype, for the user.

        Raises:
            InputError: an unknown format, or weights that the dtype cannot hold.
            OutputError: the folder is not empty and `overwrite` is off, it cannot be written, or a file reads back with
                other contents. The folder then keeps its former contents.
        """
        dtype = self.saved_dtype if dtype is None else dtype
        manifest = {
            "format": format,
            "format_version": FORMAT_VERSION,
            "provenance": self.provenance.to_json(Path(directory)),
            "dtype": {
                "loaded": dtype_name(self.saved_dtype),
                "computed": dtype_name(self.decoder.model.dtype),
                "saved": dtype_name(dtype),
            },
        }
        with quiet(), writing_folder(Path(directory), overwrite=overwrite) as folder:
            manifest |= write(self.decoder, folder, format, dtype)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
                portable.write_tokenizer_config_(folder, self.stored.tokenizer_class)
                readback.check_tokenizer(folder, self.tokenizer)
            (folder / CARD).write_text(self._card(format, dtype, figures), encoding="utf-8")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            read_manifest(folder)
        return f"{format}, {dtype_name(dtype)}"


def is_pocket(model: Model) -> bool:
    """Whether a model is the embedded one, in any version, or was made from it."""
    return model.provenance.base.partition("@")[0] == POCKET


def default_corpus(model: Model) -> str:
    """Return a model's default corpus: pocket's own, or that of GPT-2 studies."""
    return "imdb" if is_pocket(model) else "wikitext/wikitext-2-raw-v1"
