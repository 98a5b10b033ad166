"""What all searches do: open a folder, read texts, keep scores, judge the best on test text, write what was found."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from layerfold import defaults
from layerfold.calibration import calibration_windows, shortage
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.checkpoint.save import hash_weights
from layerfold.environment import environment
from layerfold.evaluators import Perplexity
from layerfold.files import check_run_folder, hash_json, write_text
from layerfold.maths.intervals import Floats
from layerfold.progress import SILENT, Progress
from layerfold.search.judging import describe
from layerfold.search.results import Document
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Stages
from layerfold.text.windows import Windows

RESULT = "search.json"

D = TypeVar("D", bound=Document)


class SearchRun:
    """The folder and the texts of a search in progress.

    Args:
        model: never edited.
        folder: keeps scores, so that an interrupted search goes on; None keeps nothing.
        marker: glob pattern of the files that such a folder has. Files of scores are named by it.
        overwrite: accept a folder that holds something else; nothing in it is removed.
        corpus: its ``validation`` split selects, its ``test`` split judges; None takes the model's own.
        tokens, test_tokens: limits of the two texts.
        context: window length; None takes the model's maximum, 2,048 at most.

    Attributes:
        sha256: hash of the weights as they are now; the decoder may have been edited since it was loaded.

    Raises:
        OutputError: a folder that holds something other than such a search.
    """

    def __init__(
        self,
        model: Model,
        folder: Path | str | None,
        marker: str,
        *,
        overwrite: bool,
        progress: Progress,
        corpus: str | None,
        tokens: int,
        test_tokens: int,
        context: int | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            check_run_folder(self.folder, marker, overwrite=overwrite)
        self.model, self.progress, self._marker = model, progress, marker
        self.corpus = corpus or default_corpus(model)
        self.selection_text, self._test_text = (
            Perplexity(corpus=self.corpus, split=split, context=context, limit_tokens=limit)
            for split, limit in (("validation", tokens), ("test", test_tokens))
        )
        self.sha256 = hash_weights(model.decoder.model)

    @cached_property
    def texts(self) -> tuple[Windows, Windows]:
        """Windows of the selection text and of the test text, read when first asked for."""
        with self.progress.doing("reading text"):
            return self.selection_text.windows(self.model), self._test_text.windows(self.model)

    @property
    def header(self) -> dict[str, Any]:
        """The fields of `Document` besides the settings."""
        return {
            "model": self.model.name,
            "model_sha256": self.sha256,
            "text": describe(self.selection_text, self.model),
            "test_text": describe(self._test_text, self.model),
            "environment": environment(),
        }

    def calibration(self, tokens: int, seed: int, reader: str | None = None) -> Windows:
        """Cut calibration text; a reader, as ``repair``, is named where there is less of it than asked for."""
        windows = calibration_windows(self.model, self.corpus, tokens, seed)
        if reader is not None and (said := shortage(windows, tokens, reader)):
            self.progress.note(said)
        return windows

    def repair_texts(self, tokens: int, seed: int) -> tuple[Windows, Windows]:
        """Cut the text that whole repairs are fitted to, and the quarter of it that quick ones are fitted to."""
        return self.calibration(tokens, seed, "repair"), self.calibration(max(2, tokens // 4), seed)

    def scores(self, stages: Stages, text: Windows, known: dict[str, Any], *, divergence: bool) -> Scores:
        """Return scores on a text, those of an earlier run included.

        Args:
            known: what determines them besides the model and the text, as JSON.
        """
        key = hash_json({"model": self.sha256, **known, "text": text.sha256})
        file = None if self.folder is None else self.folder / self._marker.replace("*", key[:24])
        return Scores(stages, text, divergence=divergence, file=file, key=key)

    def judge(self, scores: Scores, best: Iterable[Blocks]) -> dict[Blocks, Floats]:
        """Measure the model and the best candidates on the test text: (units,) sums of nats, the model's under ()."""
        wanted = [(), *best]
        scores.measure(wanted, progress=self.progress, description="measuring the best on test text")
        return {blocks: scores.unit_nats(blocks) for blocks in wanted}


@dataclass(frozen=True, kw_only=True)
class Search(Generic[D]):
    """What all searches have in common.

    Attributes:
        race: give up on a candidate as soon as others are clearly better: faster by far, but only candidates that ran
            to the end are listed. See `selection.Selection`.
        corpus: its ``validation`` split selects, its ``test`` split judges, and its ``calibration`` split is what
            methods and repairs read; None takes the model's own.
        tokens, test_tokens: limits of the first two.
        context: their window length; None takes the model's maximum, 2,048 at most.
        seed: orders the windows of a race, and the calibration documents.
    """

    marker: ClassVar[str]
    race: bool = False
    corpus: str | None = None
    tokens: int = defaults.SELECTION_TOKENS
    test_tokens: int = defaults.LIMIT_TOKENS
    context: int | None = None
    seed: int = 0

    def __call__(
        self, model: Model, folder: Path | str | None = None, *, overwrite: bool = False, progress: Progress = SILENT
    ) -> D:
        """Search.

        Args:
            folder: keeps what is measured, so that an interrupted search goes on, and gets the result; None keeps
                nothing.
            overwrite: write into a folder that holds something else; nothing in it is removed.

        Raises:
            InputError: settings that the model does not admit, too many candidates, a context too long.
            OutputError: a folder that holds something other than such a search.
        """
        run = SearchRun(
            model,
            folder,
            self.marker,
            overwrite=overwrite,
            progress=progress,
            corpus=self.corpus,
            tokens=self.tokens,
            test_tokens=self.test_tokens,
            context=self.context,
        )
        found = self._found(run)
        if run.folder is not None:
            write_text(run.folder / RESULT, json.dumps(found.to_json(), indent=1))
        return found

    @abstractmethod
    def _found(self, run: SearchRun) -> D:
        """Score candidates, choose among them, and judge the best."""
