"""Scores of candidates on a text, kept in a file that an interrupted search goes on from."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path as File
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from layerfold.files import replacing
from layerfold.inference.scoring import Expectation, log_partition, predicting, scored_positions, target_logits
from layerfold.inference.stepping import fused_activations
from layerfold.inference.streaming import batch_tokens, taken
from layerfold.maths.intervals import Floats
from layerfold.maths.precision import widest
from layerfold.progress import SILENT, Progress, Step
from layerfold.search.stages import Blocks, Stages, walk
from layerfold.text.windows import TokenWindows

Objective = Literal["perplexity", "kl"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

_SAVE_SECONDS = 30.0


class Scores:
    """Nats and divergence of candidates on the windows of one text.

    The divergence is KL(model || candidate), at no further cost: see `scoring.Expectation`, of whose result
    d_model float32 a token are held.

    Args:
        stages: what candidates consist of; the first decoder is the model's.
        windows: the text.
        divergence: whether to measure it beside the nats.
        file: where scores are kept; None keeps nothing.
        key: hash of the model and the text; a file of another key is replaced.

    Attributes:
        tokens: (windows,), the number of scored tokens of each.
        head_tokens: number of tokens for which logits of the whole vocabulary were computed here.
    """

    def __init__(
        self,
        stages: Stages,
        windows: TokenWindows,
        *,
        divergence: bool = True,
        file: File | None = None,
        key: str = "",
    ) -> None:
        self.windows = windows
        self._stages, self._decoder = stages, stages.steppers[0].decoder
        self._divergence, self._file, self._key = divergence, file, key
        self.tokens: Floats = (windows.lengths - windows.first_scored).double().numpy()
        self._rows: dict[Blocks, Floats] = {}  # (objectives, pieces) each: see `Units`
        self._references: dict[int, Expectation] = {}
        self.head_tokens = 0
        self._read()

    def values(self, candidate: Blocks, objective: Objective) -> Floats:
        """Return sums of nats (``perplexity``) or divergence (``kl``), (windows,); nan where not measured."""
        return self.windows.units.by_window(self._rows[candidate][OBJECTIVES.index(objective)])

    def unit_nats(self, candidate: Blocks) -> Floats:
        """Return sums of nats over the text's units, (units,), in place of its windows; nan where not measured."""
        return self.windows.units.by_unit(self._rows[candidate][0])

    def lacks(self, candidate: Blocks) -> bool:
        """Whether the nats of a candidate are still to be measured on some window."""
        return candidate not in self._rows or bool(np.isnan(self._rows[candidate][0]).any())

    def mean(self, candidate: Blocks, objective: Objective) -> float:
        """Return nats (``perplexity``) or divergence (``kl``) a token over all of the text; nan where not measured."""
        return float(self.values(candidate, objective).sum() / self.tokens.sum())

    def parameters(self, candidate: Blocks) -> int:
        """Count the distinct parameters of a candidate."""
        blocks = [block.module for stepper in self._stages.steppers for block in stepper.decoder.blocks]
        used = {id(tensor): tensor.numel() for tensor in self._decoder.model.parameters()}
        for block in blocks[: self._decoder.n_blocks]:
            for tensor in block.parameters():
                used.pop(id(tensor), None)
        for stage in self._stages.path(candidate):
            used |= {id(tensor): tensor.numel() for tensor in blocks[stage].parameters()}
        return sum(used.values())

    def measure(
        self,
        candidates: Iterable[Blocks],
        windows: Sequence[int] | None = None,
        progress: Progress = SILENT,
        description: str = "measuring",
    ) -> None:
        """Measure what is missing of candidates on these windows, all by default."""
        lacking: dict[Blocks, NDArray[np.bool_]] = {}
        for candidate in candidates:
            if candidate not in self._rows:
                self._rows[candidate] = np.full((len(OBJECTIVES), self.windows.units.pieces), np.nan)
            lacking[candidate] = np.isnan(self.values(candidate, "perplexity"))
        everywhere = range(len(self.windows)) if windows is None else windows
        chosen = [window for window in everywhere if any(row[window] for row in lacking.values())]
        # The states along one path are held.
        size = max(1, batch_tokens(self._decoder, self._decoder.n_blocks) // self.windows.context)
        steps: list[Step] = []
        for first in range(0, len(chosen), size):
            batch = chosen[first : first + size]
            missing = [candidate for candidate, row in lacking.items() if row[batch].any()]
            steps.append(Step(f"{first + len(batch)} of {len(chosen)} windows", len(missing), (batch, missing)))
        saved = time.monotonic()
        try:
            for step in progress.track(steps, description, sum(step.weight for step in steps)):
                # Closed at once where this is interrupted: until then the model runs with other activations.
                with closing(self._measured(*step.payload)) as work:
                    for _ in progress.track(work, "candidates", step.weight):
                        if time.monotonic() - saved > _SAVE_SECONDS:
                            self._write()
                            saved = time.monotonic()
        finally:
            if steps:
                self._write()

    @torch.no_grad()
    def _measured(self, batch: list[int], candidates: list[Blocks]) -> Generator[Blocks, None, None]:
        """Measure candidates on a batch of windows, yielding each that is done."""
        by_path = {self._stages.path(candidate): candidate for candidate in candidates}
        input_ids, scored = self.windows.input_ids[batch], scored_positions(self.windows, batch)
        device = self._decoder.device
        targets, piece = input_ids[scored].to(device), self.windows.pieces(batch, scored)
        pieces, of_pieces = piece.unique(return_inverse=True)
        of_pieces = of_pieces.to(device)
        with ExitStack() as stack:
            for stepper in self._stages.steppers:
                stepper.decoder.model.eval()
                stack.enter_context(fused_activations(stepper.decoder.model))
            # Each stepper records what its blocks are called with; the states are the same.
            first, *_ = [stepper.embed(input_ids) for stepper in self._stages.steppers]
            reference = self._reference(batch, first, scored) if self._divergence else None
            for path, hidden in walk(by_path, first, self._step):
                final = self._final(hidden, scored)
                partition = log_partition(self._decoder, final)
                nats = partition - target_logits(self._decoder, final, targets)
                divergence = nats * torch.nan
                if reference is not None:
                    divergence = reference.divergence(self._decoder, final, partition)
                table = self._rows[by_path[path]]
                for sums, figures in zip(table, (nats, divergence), strict=True):
                    total = torch.zeros(len(pieces), dtype=widest(device), device=device)
                    total.index_add_(0, of_pieces, figures.to(total.dtype))
                    sums[pieces.numpy()] = total.cpu().double().numpy()
                self.head_tokens += len(targets)
                yield by_path[path]

    def _step(self, stage: int, hidden: Tensor) -> Tensor:
        which, index = divmod(stage, self._decoder.n_blocks)
        return self._stages.steppers[which].step(index, hidden)

    def _final(self, hidden: Tensor, scored: Tensor) -> Tensor:
        """Normalised states from which the scored tokens are predicted: each stands one position before its token."""
        return self._decoder.readout(taken(hidden, predicting(scored)))

    def _reference(self, batch: list[int], first: Tensor, scored: Tensor) -> Expectation:
        """What the model itself predicts."""
        if not self._references.keys() >= set(batch):
            ((_, hidden),) = walk([tuple(range(self._decoder.n_blocks))], first, self._step)
            final = self._final(hidden, scored)
            self.head_tokens += 2 * len(final)
            expected = Expectation.of(self._decoder, final)
            self._references |= dict(zip(batch, expected.split(scored.sum(1).tolist()), strict=True))
        return Expectation.joined(self._references[window] for window in batch)

    def _write(self) -> None:
        if self._file is None or not self._rows:
            return
        lacking = np.zeros((len(self._rows), self._decoder.n_blocks), dtype=np.uint8)
        for row, candidate in enumerate(self._rows):
            lacking[row, list(candidate)] = 1
        with replacing(self._file) as temporary:
            save_file({"removed": lacking, "sums": np.stack(list(self._rows.values()))}, temporary, {"key": self._key})

    def _read(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        try:
            with safe_open(self._file, framework="numpy") as stored:
                if stored.metadata()["key"] != self._key:
                    return
                lacking, sums = stored.get_tensor("removed"), stored.get_tensor("sums")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return  # damaged: it is measured again, and replaced
        shape = (len(lacking), len(OBJECTIVES), self.windows.units.pieces)
        if lacking.shape[1:] == (self._decoder.n_blocks,) and sums.shape == shape and sums.dtype == np.float64:
            self._rows = {tuple(np.flatnonzero(row).tolist()): table for row, table in zip(lacking, sums, strict=True)}
