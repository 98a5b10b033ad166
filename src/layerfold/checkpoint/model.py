"""A model: a decoder, its tokenizer, and where it comes from."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerfold.checkpoint.save import Format, Stored, hash_weights, save
from layerfold.environment import versions
from layerfold.errors import (
    ModelError,
)
from layerfold.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


POCKET = "pocket"


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from and what was done to it.

    Attributes:
        base: the name that the first model in the chain was loaded by.
        location: the absolute path of that model, where it is a folder or a file; a checkpoint keeps it relative to
            itself, so that the two can be moved together.
        revision: the Hub's commit, where it came from there.
        base_sha256: hash of the base's weights as loaded.
        steps: what was done to it, in order: each the resolved method, what calibrated it, its seed and notes.
        versions: of layerfold and what it stands on, when it was last written.
    """

    base: str
    revision: str | None = None
    base_sha256: str | None = None
    steps: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    location: str | None = None

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Return what ``layerfold.json`` keeps in this folder."""
        location = self.location
        if location is not None:
            with contextlib.suppress(ValueError):  # on Windows no path leads from one drive to another
                location = os.path.relpath(location, folder.resolve())
        return {**self.__dict__, "steps": list(self.steps), "versions": versions(), "location": location}

    @classmethod
    def from_json(cls, known: dict[str, Any], folder: Path) -> Provenance:
        """Return what `to_json` wrote into a folder.

        Raises:
            TypeError, KeyError: it is something else.
        """
        location = known.get("location")
        located = None if location is None else os.path.normpath(folder.resolve() / location)
        return cls(**{**known, "steps": tuple(known["steps"]), "location": located})


@dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer and where it comes from.

    Attributes:
        stored: how the checkpoint that it was loaded from holds it, which `save` keeps to.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    provenance: Provenance
    stored: Stored = field(default_factory=Stored)

    @property
    def name(self) -> str:
        """The base's name, and what was done to it."""
        done = [step["method"]["name"] for step in self.provenance.steps]
        return self.provenance.base + (f" after {', '.join(done)}" if done else "")

    @property
    def saved_dtype(self) -> torch.dtype:
        """What `save` writes its weights in unless told otherwise: the dtype that they came in."""
        own: torch.dtype = self.decoder.model.dtype
        return self.stored.dtype or own

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights as they were when first asked for."""
        return hash_weights(self.decoder.model)

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
        """Return a model whose decoder can be edited while this one stays."""
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
    ) -> str:
        """Write a checkpoint; see `checkpoint.save`."""
        return save(
            self.decoder,
            self.tokenizer,
            Path(directory),
            self.provenance.to_json(Path(directory)),
            format=format,
            overwrite=overwrite,
            stored=self.stored,
            dtype=dtype,
        )


def is_pocket(model: Model) -> bool:
    """Whether a model is the embedded one, or was made from it."""
    return model.provenance.base == POCKET


def default_corpus(model: Model) -> str:
    """Return the corpus that fits a model: pocket's own, or the one that GPT-2 studies use."""
    return "imdb" if is_pocket(model) else "wikitext/wikitext-2-raw-v1"
