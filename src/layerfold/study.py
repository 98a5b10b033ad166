"""Studies: variants of one base times evaluators, measured alike, resumable, with one seed or several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.files import check_run_folder, write_text
from layerfold.passes import Pass
from layerfold.progress import SILENT, Progress
from layerfold.recipe import Recipe
from layerfold.records import Record, RecordStore, Results
from layerfold.replicates import combined

_MARKER = "study.json"


class Study:
    """Variants of one base times evaluators.

    Each finished record is a file in ``records/``, named by a hash of all that determines it, so that running again
    does only what is missing, and a changed recipe measures only what the change touches. With several seeds, what
    depends on none is measured once.

    Args:
        recipe: what to compare.
        output_dir: the run's folder; made if missing, continued if it holds a study.
        base: the model, if it is loaded already.
        overwrite: write into a folder that holds something else; nothing in it is removed.
        waiting_bytes: memory for variants that are built and wait until all are timed side by side; None takes half of
            what is free. Where more wait, they wait in temporary files and are timed in groups, each with the base.

    Raises:
        OutputError: the folder holds something that is not a study.
        InputError: a method that the base's depth does not admit.
    """

    def __init__(
        self,
        recipe: Recipe,
        output_dir: Path | str,
        *,
        base: Model | None = None,
        overwrite: bool = False,
        waiting_bytes: int | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        check_run_folder(self.output_dir, _MARKER, overwrite=overwrite)
        self.base = base if base is not None else load(recipe.base, revision=recipe.revision)
        self.recipe = recipe.for_base(self.base)
        store = RecordStore(self.output_dir / "records")
        self.passes = {
            seed: Pass(self.recipe.with_seed(seed), self.base, self.output_dir, store, waiting_bytes)
            for seed in self.recipe.seeds or [self.recipe.seed]
        }

    @property
    def labels(self) -> tuple[str, ...]:
        """The variants, the base first."""
        return next(iter(self.passes.values())).labels

    def run(self, progress: Progress = SILENT) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored.

        With recovery, perplexity is measured before and after, everything else after.

        Raises:
            CorpusError: text that a variant is made with stands in text that is scored.
        """
        with progress.doing("reading text"):
            next(iter(self.passes.values())).check_disjoint()  # which documents are read depends on no seed
        marker = {"base": self.base.provenance.to_json(self.output_dir), "recipe": self.recipe.to_json()}
        write_text(self.output_dir / _MARKER, json.dumps(marker, indent=1))
        for seed, one in self.passes.items():
            yield from one.run(progress, "study" if len(self.passes) == 1 else f"study, seed {seed}")

    def results(self) -> Results:
        """Collect the records there are; with several seeds, the means of what depends on the seed."""
        return combined(self.recipe.to_json(), {seed: one.results() for seed, one in self.passes.items()})
