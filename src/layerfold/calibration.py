"""What methods need to know of a model's activations, collected in one pass over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from layerfold.checkpoint.model import Model, default_corpus
from layerfold.checkpoint.save import hash_weights
from layerfold.errors import InputError, ModelError
from layerfold.inference.sensitivity import Sensitivities, sensitivities
from layerfold.inference.spool import Spool
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream
from layerfold.maths.linalg import Match, match_neurons
from layerfold.maths.moments import CrossMoments, SecondMoments
from layerfold.model.block import Projection
from layerfold.model.decoder import Decoder, check_precision
from layerfold.model.matrix import Matrix, watching
from layerfold.progress import SILENT, Progress
from layerfold.text.corpora import read_corpus
from layerfold.text.used import Note, cut_enough
from layerfold.text.windows import TokenWindows

_CONTEXT = 1024

Pair = tuple[int, int]
"""(anchor, other): indices of two blocks, anchor first."""


@dataclass(frozen=True)
class FFNInputs:
    """Second moments of what an FFN's matrices read: ``up`` and ``gate``, (d_model) variables, ``down``, (d_ffn)."""

    up: SecondMoments
    down: SecondMoments


class Calibration:
    """Statistics of one decoder's activations over one set of windows, computed when asked for and remembered.

    The pass goes block by block: each block runs once over all windows, so that moments of the blocks before it need
    not be held. What is held is one (d_ffn, d_ffn) product for each pair that ends at that block, and the activations
    of one batch. The residual stream, 4 * d_model bytes a token, is in temporary files: once for the block at hand,
    and once for each open anchor.

    Args:
        decoder: the model as it is now; statistics asked for after an edit of it would be of another model.
        windows: calibration text; positions past a window's length are excluded.

    Raises:
        InputError: weights of several dtypes.
    """

    def __init__(self, decoder: Decoder, windows: TokenWindows, progress: Progress = SILENT) -> None:
        check_precision(decoder)
        self.decoder = decoder
        self.windows = windows
        self.progress = progress
        self._matches: dict[Pair, Match] = {}
        self._ffn_inputs: dict[int, FFNInputs] = {}
        self._sensitivities: dict[str, Sensitivities] = {}

    def matches(self, pairs: Iterable[Pair]) -> dict[Pair, Match]:
        """Match the neurons of each pair of blocks by the correlation of their activations, the absolute one if gated.

        Raises:
            ModelError: activations that are not finite.
        """
        wanted = list(pairs)
        missing = [pair for pair in wanted if pair not in self._matches]
        flips, waiting = self.decoder.family.gated, list[tuple[Pair, Future[Match]]]()
        device = self.decoder.device
        with fused_activations(self.decoder.model), ThreadPoolExecutor(1, "layerfold-matching") as beside:
            for pair, correlation in self._correlations(missing):
                # The assignment takes one core, and runs beside the next block; one matrix waits for it at most.
                self._matches |= {before: match.result().to(device) for before, match in waiting}
                waiting = [(pair, beside.submit(match_neurons, correlation.cpu(), flips=flips))]
            self._matches |= {before: match.result().to(device) for before, match in waiting}
        return {pair: self._matches[pair] for pair in wanted}

    def correlations(self, pairs: Iterable[Pair]) -> dict[Pair, Tensor]:
        """Return the (d_ffn, d_ffn) neuron correlations of each pair."""
        with fused_activations(self.decoder.model):
            return dict(self._correlations(list(pairs)))

    @torch.no_grad()
    def _correlations(self, pairs: list[Pair]) -> Iterator[tuple[Pair, Tensor]]:
        pairs = list(dict.fromkeys(pairs))
        if not pairs:
            return
        check_widths(self.decoder, pairs)
        ffns = {index: self.decoder.blocks[index].ffn for pair in pairs for index in pair}
        # Each pair is met at the later of its two blocks, with the earlier one's FFN inputs at hand.
        last = max(map(max, pairs))
        last_use = {early: max(max(p) for p in pairs if min(p) == early) for early in set(map(min, pairs))}
        stream = Stream(Stepper(self.decoder), self.windows)
        inputs: dict[int, Spool] = {}
        for index in self.progress.track(range(last + 1), "calibrating, block", last + 1):
            here = [pair for pair in pairs if max(pair) == index]
            moments = {pair: CrossMoments() for pair in here}
            if index in last_use:
                inputs[index] = stream.spool()
            ffn = ffns.get(index)
            earlier_blocks = self.decoder.resident(min(pair) for pair in here)
            with watching(() if ffn is None else (ffn.up, ffn.down)) as seen, earlier_blocks:
                for batch, _, hidden in stream.walk([index]):
                    stream.states[batch] = hidden
                    if ffn is None:
                        continue
                    if index in last_use:
                        inputs[index][batch] = seen[ffn.up].reshape(hidden.shape)
                    for pair in here:
                        earlier = ffns[min(pair)].neurons(inputs[min(pair)][batch])
                        moments[pair].update(stream.rows(batch, earlier), stream.rows(batch, seen[ffn.down]))
                        del earlier
                    seen.clear()
            inputs = {anchor: states for anchor, states in inputs.items() if last_use[anchor] > index}
            for pair in here:
                found = moments.pop(pair)
                for block, finite in zip(pair if pair[0] < pair[1] else pair[::-1], found.finite, strict=True):
                    if not finite:
                        raise ModelError(
                            f"the neurons of block {block} on the calibration text are not finite, or their squares "
                            "are not"
                        )
                correlation = found.correlation()
                yield pair, correlation if pair[0] <= pair[1] else correlation.T

    @torch.no_grad()
    def each_block(
        self,
        visit: Callable[[int, dict[str, SecondMoments]], None],
        *,
        whole: bool,
        edits: bool,
        doing: str,
        names: Container[str] | None = None,
        pooled: bool = False,
    ) -> None:
        """Visit each block, in order, with the second moments of what its projections read.

        Args:
            visit: takes a block's index and the moments by projection (the same where several read the same).
            whole: whether moments of pairs of inputs are wanted too: `SecondMoments`. Those of one block are held.
            edits: whether a visit changes its block, so that what comes after is to see the changed one's outputs.
            doing: what the progress bar says.
            names: of the projections whose moments are wanted; None stands for all. Nothing runs after the last.
            pooled: give the moments of a matrix that several blocks share once, to the first of them, over the rows of
                all: the text passes on to the last of them before the first is visited.

        Raises:
            ModelError: what a projection reads is not finite.
        """
        wanted = [each for each in self.decoder.projections if names is None or each.name in names]
        blocks = self.decoder.n_blocks if names is None else 1 + max(each.block or 0 for each in wanted)
        watched = _watched(wanted, pooled)
        with fused_activations(self.decoder.model):
            stream = Stream(Stepper(self.decoder), self.windows)
            for index in self.progress.track(range(blocks), doing, blocks):
                matrices = watched.get(index, {})
                moments: dict[str, SecondMoments] = {}
                with watching(each for here in matrices.values() for each in here.values()) as seen:
                    for batch, block, hidden in stream.walk(range(index, max(matrices, default=index) + 1)):
                        if block == index and not edits:
                            stream.states[batch] = hidden
                        first: dict[int, str] = {}
                        for name, matrix in matrices.get(block, {}).items():
                            # Matrices that read the same share their moments.
                            known = first.setdefault(id(seen[matrix]), name)
                            if known != name:
                                moments[name] = moments[known]
                                continue
                            moments.setdefault(name, SecondMoments(whole)).update(stream.rows(batch, seen[matrix]))
                        seen.clear()
                _check_finite(moments)
                if matrices or names is None:
                    with self.decoder.resident([index], edited=edits):
                        visit(index, moments)
                del moments
                if edits:
                    stream.advance([index])

    def ffn_inputs(self, blocks: Iterable[int]) -> dict[int, FFNInputs]:
        """Return the second moments of what the matrices of these blocks' FFNs read; those of all asked for are held.

        Raises:
            ModelError: it is not finite.
        """
        chosen = list(blocks)
        missing = [index for index in chosen if index not in self._ffn_inputs]
        ffns = {index: self.decoder.blocks[index].ffn for index in missing}
        names = {
            each.name: (each.block, which)
            for each in self.decoder.projections
            if each.block in ffns
            for which in ("up", "down")
            if each.matrix.module is getattr(ffns[each.block], which).module
        }

        def keep(index: int, moments: dict[str, SecondMoments]) -> None:
            self._ffn_inputs[index] = FFNInputs(**{names[name][1]: each for name, each in moments.items()})

        if missing:
            self.each_block(keep, whole=True, edits=False, doing="reading activations, block", names=names)
        return {index: self._ffn_inputs[index] for index in chosen}

    def sensitivities(self, decoder: Decoder) -> Sensitivities:
        """Return how much a decoder would miss each neuron and each group of heads; once for all of the same weights.

        Raises:
            ModelError: gradients that are not finite.
        """
        weights = hash_weights(decoder.model)
        if weights not in self._sensitivities:
            self._sensitivities[weights] = sensitivities(decoder, self.windows, self.progress)
        return self._sensitivities[weights]

    def of(self, decoder: Decoder) -> Calibration:
        """Return the same text for another decoder."""
        other = Calibration(decoder, self.windows, self.progress)
        other._sensitivities = self._sensitivities  # which are told apart by weights
        return other


def calibration_windows(
    model: Model, corpus: str | None, tokens: int, seed: int, *, note: Note = SILENT.note
) -> TokenWindows:
    """Cut calibration text for a model: the ``calibration`` split of a corpus, documents in a seeded order.

    The ``train`` split is read too where the other holds less than was asked for.

    Args:
        note: is told how much text there was.
    """
    splits = read_corpus(corpus or default_corpus(model))
    texts = [splits.split("calibration"), splits["calibration"] + splits["train"]]
    return cut_enough(texts, model.require_tokenizer(), min(model.decoder.context, _CONTEXT), tokens, seed, note)


def shortage(windows: TokenWindows, asked: int, doing: str) -> str | None:
    """Say that a text holds fewer tokens than were asked for; None where it does not.

    Args:
        doing: what reads it.
    """
    read = int(windows.lengths.sum())
    if asked - read <= 1:  # a last token alone makes no window
        return None
    return (
        f"{doing}: {windows.corpus!r}, split {windows.split}: {read:,} of the {asked:,} tokens asked for; "
        "a longer text gives more"
    )


def check_widths(decoder: Decoder, pairs: Iterable[Pair]) -> None:
    """Raise InputError for a pair of blocks whose FFNs have not as many neurons."""
    blocks = decoder.blocks
    for one, two in pairs:
        if blocks[one].ffn.d_ffn != blocks[two].ffn.d_ffn:
            widths = f"{blocks[one].d_ffn} and {blocks[two].d_ffn}"
            raise InputError(f"blocks {one} and {two} have {widths} neurons; accepted: as many")


def _watched(wanted: Iterable[Projection], pooled: bool) -> dict[int, dict[int, dict[str, Matrix]]]:
    """By the block that gets the moments: by the block that reads, the matrices, by the name that the moments get."""
    first: dict[int, Projection] = {}
    found: dict[int, dict[int, dict[str, Matrix]]] = {}
    for each in wanted:
        owner = first.setdefault(each.matrix.key, each) if pooled else each
        found.setdefault(owner.block or 0, {}).setdefault(each.block or 0, {})[owner.name] = each.matrix
    return found


def _check_finite(moments: Mapping[str, SecondMoments]) -> None:
    for name, each in moments.items():
        if not each.squares.isfinite().all():
            raise ModelError(f"what {name!r} reads on the calibration text is not finite, or its squares are not")
