"""What all searches do: open a folder, read texts, keep scores, and judge the best on test text."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from layerfold import defaults
from layerfold.calibration import calibration_windows, shortage
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.environment import environment
from layerfold.evaluators import Perplexity
from layerfold.files import check_run_folder, hash_json, write_text
from layerfold.maths.intervals import Floats
from layerfold.progress import SILENT, Progress
from layerfold.search.judging import describe
from layerfold.search.results import Document
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Stages
from layerfold.text.windows import TokenWindows

RESULT = "search.json"

D = TypeVar("D", bound=Document[Any])
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Search(Generic[R]):
    """What all searches have in common.

    Attributes:
        corpus: text that calibrates, selects (validation split) and judges (test split); by default the model's own.
        tokens: selection tokens.
        test_tokens: test tokens.
        seed: orders the calibration documents, and the windows of a race.
    """

    marker: ClassVar[str]
    """Glob pattern of the files that the folder of such a search has; files of scores are named by it."""
    corpus: str | None = None
    tokens: int = defaults.SELECTION_TOKENS
    test_tokens: int = defaults.LIMIT_TOKENS
    seed: int = 0

    def __call__(
        self, model: Model, folder: Path | str | None = None, *, overwrite: bool = False, progress: Progress = SILENT
    ) -> R:
        """Search.

        Args:
            model: never edited.
            folder: keeps what is measured, so that an interrupted search goes on; None keeps nothing.
            overwrite: write into a folder that holds something else; nothing in it is removed.

        Raises:
            InputError: settings that the model does not admit, too many candidates, or a budget that nothing meets.
            OutputError: a folder that holds something other than such a search.
        """
        folder = None if folder is None else Path(folder)
        if folder is not None:
            check_run_folder(folder, self.marker, overwrite=overwrite)
        return self._found(SearchRun(self, model, folder, progress))

    @abstractmethod
    def _found(self, run: SearchRun) -> R:
        """Score candidates, choose among them, and judge the best."""


class SearchRun:
    """A search in progress.

    Attributes:
        corpus: its name.
        sha256: hash of the weights as they are now; the decoder may have been edited since it was loaded.
    """

    def __init__(self, search: Search[Any], model: Model, folder: Path | None, progress: Progress) -> None:
        self._search, self.model, self.folder, self.progress = search, model, folder, progress
        self.corpus = search.corpus or default_corpus(model)
        self.sha256 = model.now_sha256

    def read(self, context: int | None = None) -> tuple[TokenWindows, TokenWindows]:
        """Return the windows of the selection text and of the test text.

        Args:
            context: window length; None takes the model's maximum, 2,048 at most.
        """
        limits = {"validation": self._search.tokens, "test": self._search.test_tokens}
        with self.progress.doing("reading text"):
            self.selection_text, self._test_text = (
                Perplexity(corpus=self.corpus, split=split, context=context, limit_tokens=limit)
                for split, limit in limits.items()
            )
            return self.selection_text.windows(self.model), self._test_text.windows(self.model)

    @property
    def header(self) -> dict[str, Any]:
        """The fields of `Document` besides the settings, once the texts are read."""
        return {
            "model": self.model.name,
            "model_sha256": self.sha256,
            "text": describe(self.selection_text, self.model),
            "test_text": describe(self._test_text, self.model),
            "environment": environment() | self.model.decoder.computed,
        }

    def calibration(self, tokens: int, reader: str | None = None) -> TokenWindows:
        """Cut calibration text; a reader, as ``repair``, is named where there is less of it than asked for."""
        windows = calibration_windows(self.model, self.corpus, tokens, self._search.seed)
        if reader is not None and (said := shortage(windows, tokens, reader)):
            self.progress.note(said)
        return windows

    def repair_texts(self, tokens: int, parts: int = 4) -> tuple[TokenWindows, TokenWindows]:
        """Cut the text that whole repairs are fitted to, and the first part of it that quick ones are fitted to."""
        return self.calibration(tokens, "repair"), self.calibration(max(2, tokens // parts))

    def scores(self, stages: Stages, text: TokenWindows, known: dict[str, Any], *, divergence: bool) -> Scores:
        """Return scores on a text, those of an earlier run included.

        Args:
            known: what determines them besides the model and the text, as JSON.
        """
        key = hash_json({"model": self.sha256, **self.model.decoder.computed, **known, "text": text.sha256})
        file = None if self.folder is None else self.folder / self._search.marker.replace("*", key[:24])
        return Scores(stages, text, divergence=divergence, file=file, key=key)

    def judge(self, scores: Scores, best: Iterable[Blocks]) -> dict[Blocks, Floats]:
        """Measure the model and the best candidates on the test text: (units,) sums of nats, the model's under ()."""
        wanted = [(), *best]
        scores.measure(wanted, progress=self.progress, description="measuring the best on test text")
        return {blocks: scores.unit_nats(blocks) for blocks in wanted}

    def written(self, found: D) -> D:
        """Write what was found into the folder, and return it."""
        if self.folder is not None:
            write_text(self.folder / RESULT, json.dumps(found.to_json(), indent=1))
        return found
