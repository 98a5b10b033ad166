"""Other ways to make a decoder smaller, each written from its paper's description as a plain configuration.

Each takes a model, how many blocks' size is asked for, and the text that it may read. It returns a copy that holds no
more parameters than `budget` says, or None where it cannot get there; the model that is given stays as it is.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.evaluators import Perplexity
from layerfold.inference.scoring import window_nats
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream
from layerfold.maths.ridge import RegressionMoments
from layerfold.methods import Collapse, Merge, Prune
from layerfold.methods.prune.method import Criterion
from layerfold.model.block import Block
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix
from layerfold.progress import SILENT
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection, beam
from layerfold.search.stages import Blocks, Lacking
from layerfold.text.windows import TokenWindows

_RIDGE = 1e-4
"""Penalty of the linear map, as a fraction of the mean square of what it reads; on pocket 1e-6 and 1e-2 do as well."""


@dataclass(frozen=True)
class Texts:
    """What a method may read; the text that it is judged by shares no document with either.

    Attributes:
        calibration: what is fitted to, and what the peers choose by.
        selection: what layerfold's own plan chooses by.
    """

    calibration: TokenWindows
    selection: Perplexity


@dataclass(frozen=True)
class Peer:
    """A method of the comparison.

    Attributes:
        title: what the table calls it.
        source: the paper.
        smaller: takes a model, a number of blocks and the texts.
        zeros: whether its parameters are only zero, not gone.
        version: a new one where what it makes has changed, so that kept results of the old one are not read.
    """

    title: str
    source: str
    smaller: Callable[[Model, int, Texts], Model | None]
    zeros: bool = False
    version: int = 1


def budget(decoder: Decoder, kept: int) -> int:
    """Parameters of a decoder that has only so many of its blocks, each of average size."""
    in_blocks = {id(tensor): tensor.numel() for block in decoder.blocks for tensor in block.module.parameters()}
    gone = decoder.n_blocks - kept
    return decoder.size().parameters - -(-gone * sum(in_blocks.values()) // decoder.n_blocks)


# What sizes have in common is worked out once. Keys are the objects themselves: nothing here edits the base.


@functools.lru_cache(maxsize=2)
def _calibration(decoder: Decoder, windows: TokenWindows) -> Calibration:
    """Remembers which neurons answer to which."""
    return Calibration(decoder, windows)


@functools.lru_cache(maxsize=2)
def _scores(decoder: Decoder, windows: TokenWindows) -> Scores:
    """Remembers the nats of every candidate that lacks blocks."""
    return Scores(Lacking(decoder), windows, divergence=False)


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def distances(decoder: Decoder, windows: TokenWindows) -> Tensor:
    """1 - E[cos(x_i, x_j)] over tokens, (depth + 1, depth + 1) float64; x_i enters block i, the last the final norm."""
    depth = decoder.n_blocks
    total = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
    states: list[Tensor] = []

    with fused_activations(decoder.model):
        stream = Stream(Stepper(decoder), windows)
        for batch, index, hidden in stream.walk(range(depth)):
            real = stream.holds_text(batch)
            if index == 0:
                states[:] = [normalize(stream.states[batch][real], dim=-1)]
            states.append(normalize(hidden[real], dim=-1))
            if index == depth - 1:
                each = torch.stack(states, dim=1)
                total.add_((each @ each.mT).sum(0, dtype=torch.float64))
    return 1 - total / int(windows.lengths.sum())


def without(model: Model, gone: Blocks) -> Model:
    """Return a copy without some blocks."""
    smaller = model.copy()
    smaller.decoder.keep_([index for index in range(model.decoder.n_blocks) if index not in gone])
    return smaller


def averaging(model: Model, kept: int, texts: Texts) -> Model:
    """Collapse consecutive groups as equal in size as can be, neurons aligned by the Hungarian method."""
    smaller = model.copy()
    groups = [group for group in np.array_split(np.arange(model.decoder.n_blocks), kept) if len(group) > 1]
    if groups:
        spelled = ",".join(f"{group[0]}-{group[-1]}" for group in groups)
        Collapse(groups=spelled).apply(smaller.decoder, _calibration(model.decoder, texts.calibration))
    return smaller


def block_influence(model: Model, kept: int, texts: Texts) -> Model:
    """Drop, all at once, the blocks whose output points where their input does: BI_i = 1 - E[cos(x_i, x_i+1)]."""
    influence = distances(model.decoder, texts.calibration).diagonal(1)
    return without(model, tuple(influence.argsort(stable=True)[: model.decoder.n_blocks - kept].tolist()))


def greedy(model: Model, kept: int, texts: Texts) -> Model:
    """Drop block after block, each time the one that perplexity on the calibration text rises least without."""
    gone = model.decoder.n_blocks - kept
    if not gone:
        return model.copy()
    scores = _scores(model.decoder, texts.calibration)
    select = Selection(scores, "perplexity", race=False, seed=0, progress=SILENT)
    found = beam(select, range(model.decoder.n_blocks), range(gone, gone + 1), keep=1, width=1)
    return without(model, found[gone][0])


def linear_in_place(model: Model, kept: int, texts: Texts) -> Model:
    """Cut the run of blocks whose ends point the same way most; a linear map of what the FFN before adds stands for it.

    The run has a block before it, whose down-projection takes the map in.
    """
    depth = model.decoder.n_blocks
    gone = depth - kept
    if not gone:
        return model.copy()
    first = 1 + int(distances(model.decoder, texts.calibration).diagonal(gone)[1:].argmin())
    smaller = without(model, tuple(range(first, first + gone)))
    fold_(smaller.decoder.blocks[first - 1].ffn.down, linear_map(model.decoder, texts.calibration, first, gone))
    return smaller


@torch.no_grad()
def linear_map(decoder: Decoder, windows: TokenWindows, first: int, gone: int) -> Tensor:
    """Return T, (d_model, d_model), of least E|T m + y - x'|^2, x' being what leaves the last block of a run.

    m is what the FFN of the block before the run adds, y the state that it is added to. A little ridge, on T - 1, makes
    it well defined however little text there is; a run that does nothing has T = 1.

    Args:
        first: the run's first block, which has one before it.
        gone: how many blocks are in the run.
    """
    moments = RegressionMoments()
    added: list[Tensor] = []
    before: list[Tensor] = []

    with fused_activations(decoder.model):
        stream = Stream(Stepper(decoder), windows)
        handle = ffn_module(decoder.blocks[first - 1]).register_forward_hook(lambda _, __, out: added.append(out))
        try:
            for batch, index, hidden in stream.walk(range(first + gone)):
                if index == first - 1:
                    before[:] = [hidden]
                if index == first + gone - 1:
                    rows = stream.holds_text(batch)
                    moments.update(added.pop()[rows], (hidden - before[0])[rows])
        finally:
            handle.remove()
    gram, products = (each(constant=False).double() for each in (moments.gram, moments.products))
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.eye(decoder.d_model) + torch.linalg.solve(gram, products).T.float()


def ffn_module(block: Block) -> nn.Module:
    """The module whose output is what a block's FFN adds to the residual stream."""
    found: nn.Module = operator.attrgetter(block.family.ffn)(block.module)
    return found


def fold_(matrix: Matrix, change: Tensor) -> None:
    """Let an affine map be followed by a linear one, (out, out)."""
    for tensor in matrix.tensors:
        tensor.copy_(change @ tensor)


def merge_and_tie(model: Model, kept: int, texts: Texts) -> Model | None:
    """Let as few neighbouring FFNs as the budget allows be one: those that the calibration text misses least."""
    decoder, windows = model.decoder, texts.calibration
    saved = decoder.size().parameters - budget(decoder, kept)
    group = 1 + math.ceil(saved / min(sum(t.numel() for t in block.ffn.tensors()) for block in decoder.blocks))
    if group == 1:
        return model.copy()
    starts = range(decoder.n_blocks - group + 1)
    calibration = _calibration(decoder, windows)
    calibration.matches((first, first + other) for first in starts for other in range(1, group))
    best: tuple[float, Model] | None = None
    for first in starts:
        merged = model.copy()
        Merge(groups=f"{first}-{first + group - 1}", tie=True).apply(merged.decoder, calibration)
        nats = float(window_nats(merged.decoder, windows).sum())
        best = (nats, merged) if best is None or nats < best[0] else best
    return None if best is None else best[1]


def zeroing(criterion: Criterion, model: Model, kept: int, texts: Texts) -> Model | None:
    """Zero weights of attentions and FFNs until as many parameters are other than zero as the budget says."""
    smaller = model.copy()
    method = Prune(nonzero=min(budget(model.decoder, kept), model.decoder.size().nonzero), criterion=criterion)
    try:
        method.resolved(smaller.decoder)
    except InputError:  # more than all that there is to zero
        return None
    method.apply(smaller.decoder, Calibration(smaller.decoder, texts.calibration))
    return smaller


PEERS = {
    "averaging": Peer("FFNs averaged in equal groups", "the published notebooks", averaging),
    "bi": Peer("ShortGPT: Block Influence", "arXiv 2403.03853", block_influence),
    "sleb": Peer("SLEB: greedy by perplexity", "arXiv 2402.09025", greedy),
    "replaceme": Peer("ReplaceMe: a linear map", "arXiv 2505.02819", linear_in_place),
    "merge": Peer("FFNs merged and tied", "arXiv 2501.06126", merge_and_tie),
    "magnitude": Peer("magnitude", "arXiv 1506.02626", functools.partial(zeroing, "magnitude"), zeros=True),
    "wanda": Peer("Wanda", "arXiv 2306.11695", functools.partial(zeroing, "wanda"), zeros=True),
    "sparsegpt": Peer("SparseGPT", "arXiv 2301.00774", functools.partial(zeroing, "sparsegpt"), zeros=True),
}
"""By the name that the command line takes."""
