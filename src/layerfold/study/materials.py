"""What the rows of a study are made from: the base, the texts, and the models that were trained before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerfold.calibration import Calibration, calibration_windows
from layerfold.checkpoint.load import load_beside
from layerfold.checkpoint.model import Model
from layerfold.errors import ModelError
from layerfold.evaluators import Perplexity
from layerfold.files import hash_json
from layerfold.methods import Method
from layerfold.methods.base import Notes
from layerfold.progress import Progress
from layerfold.recovery import Recovery
from layerfold.recovery.text import TrainingText, settings, training_text
from layerfold.search.auto import selection_text, settled
from layerfold.text.corpora import Corpus, Splits, read_corpus
from layerfold.text.windows import TokenWindows


@dataclass(eq=False)
class Materials:
    """What the rows of a study are made from, with one seed. Texts are read when they are first asked for.

    Attributes:
        base: never edited.
        folder: the run's. Trained models are kept in its ``models/``, so that no training is repeated.
        seed: orders the documents, and whatever else is drawn.
        corpus: for calibration, repair and selection, and what students learn from.
        tokens, repair_tokens: of calibration text for methods, and for repairs.
        loaded: hash of the weights, and saved dtype, of each model that was loaded, by (name, revision).
    """

    base: Model
    folder: Path
    seed: int
    corpus: str
    tokens: int
    repair_tokens: int
    loaded: dict[tuple[str, str | None], tuple[str, str]] = field(default_factory=dict)
    _corpora: dict[str, Splits] = field(default_factory=dict, init=False)
    _settled: dict[str, tuple[Method, Notes]] = field(default_factory=dict, init=False)
    _training_texts: dict[tuple[int, str], tuple[object, TrainingText]] = field(default_factory=dict, init=False)

    @cached_property
    def calibration_windows(self) -> TokenWindows:
        """What methods read activations from."""
        return calibration_windows(self.base, self.corpus, self.tokens, self.seed)

    @cached_property
    def repair_windows(self) -> TokenWindows:
        """What repairs are fitted to."""
        return calibration_windows(self.base, self.corpus, self.repair_tokens, self.seed)

    @cached_property
    def quick_windows(self) -> TokenWindows:
        """What a plan's trials are repaired on."""
        return calibration_windows(self.base, self.corpus, max(2, self.repair_tokens // 4), self.seed)

    @cached_property
    def selection(self) -> Perplexity:
        """What candidates are scored on."""
        return selection_text(self.base, self.corpus)

    def calibration(self, progress: Progress) -> Calibration:
        """Return the statistics of the base's activations, which all rows share."""
        self._calibration.progress = progress
        return self._calibration

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(self.base.decoder, self.calibration_windows)

    def settled(self, method: Method, calibration: Calibration | None, progress: Progress) -> tuple[Method, Notes]:
        """Find by a search what a method leaves to one, once for all rows; see `search.auto.settled`."""
        if not method.searched:
            return method, {}
        key = hash_json(method.to_json())
        if key not in self._settled:
            self._settled[key] = settled(method, self.base, calibration, self.selection, progress)
        return self._settled[key]

    def read(self, corpus: str, splits: Iterable[str]) -> Iterator[Corpus]:
        """Yield splits of a corpus, which is read once."""
        if corpus not in self._corpora:
            self._corpora[corpus] = read_corpus(corpus)
        for split in splits:
            yield self._corpora[corpus].split(split)

    def training_text(self, model: Model, recovery: Recovery) -> TrainingText:
        """Cut a training text, once for each tokenizer: all rows but the loaded ones have the base's."""
        tokenizer = model.require_tokenizer()
        key = id(tokenizer), hash_json(recovery.resolved())
        if key not in self._training_texts:
            # The tokenizer is kept too: were it to go, another could take its id.
            self._training_texts[key] = tokenizer, training_text(model, recovery, self.seed)
        return self._training_texts[key][1]

    def training(self, recovery: Recovery) -> dict[str, Any]:
        """Return all that determines what a recovery makes of a model, as JSON."""
        return settings(recovery, self.training_text(self.base, recovery), self.base)

    def trained(self, subject: Mapping[str, Any], model: Model, recovery: Recovery, progress: Progress) -> Model:
        """Train a model, or read what an earlier run of this study made of it.

        Its last step's notes say how training went.

        Args:
            subject: all that determines the trained model.
        """
        key = hash_json(dict(subject))[:24]
        kept = self.folder / "models" / key
        with contextlib.suppress(ModelError):  # damaged: it is trained again, and replaced
            if kept.is_dir() and (found := load_beside(model, kept)).tokenizer is not None:
                return replace(found, stored=model.stored)
        # Imported when needed: transformers' Trainer takes seconds, and most studies train nothing.
        from layerfold.recovery.run import Run
        from layerfold.recovery.workspace import clear

        run = Run(
            model,
            recovery,
            self.folder / "training" / key,
            teacher=self.base,
            text=self.training_text(model, recovery),
            overwrite=True,  # the folder is the study's own
        )
        trained, _ = run(progress)
        # In float32 whatever the base came in: what is measured now and in a later run must be one model.
        trained.save(kept, format="compact", overwrite=True, dtype=torch.float32)
        clear(run.folder)
        return trained
