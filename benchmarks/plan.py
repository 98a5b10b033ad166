"""What layerfold makes of a model when it is told a number of parameters: blocks, then neurons, then a repair."""

from __future__ import annotations

import math

from peers import Peer, Texts, budget, without

from layerfold.calibration import Calibration
from layerfold.decoder import Decoder
from layerfold.hub import Model
from layerfold.narrowing import narrow_
from layerfold.progress import SILENT
from layerfold.repairing import refit_
from layerfold.scoring import window_nats
from layerfold.search.repaired import Repairs
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection
from layerfold.search.strategies import beam
from layerfold.windows import Windows

_WIDTH = 4
"""Of the beam in which blocks to drop are looked for."""


def own(model: Model, kept: int, texts: Texts) -> Model:
    """What layerfold does when it is told a number of parameters."""
    return plan_(model, budget(model.decoder, kept), texts)


def plan_(model: Model, parameters: int, texts: Texts) -> Model:
    """Drop blocks, remove FFN neurons down to a number of parameters, and repair what is left, without training.

    Begins with blocks alone, and ends where one block less to drop makes perplexity on the selection text worse.
    """
    decoder = model.decoder
    block = math.ceil((decoder.size().parameters - budget(decoder, 0)) / decoder.n_blocks)
    most = min(math.ceil((decoder.size().parameters - parameters) / block), decoder.n_blocks - 1)
    best, least = model.copy(), math.inf
    if not most:
        return best
    scores = Scores(
        Repairs(decoder, texts.calibration, texts.calibration, SILENT).stages(most), texts.selection, divergence=False
    )
    select = Selection(scores, "perplexity", race=True, seed=0, progress=SILENT)
    found = {0: [()]} | beam(select, range(decoder.n_blocks), range(1, most + 1), keep=1, width=_WIDTH)
    for count in range(most, -1, -1):
        smaller = without(model, found[count][0])
        if not narrowed_(smaller.decoder, parameters, texts.calibration):
            break
        kept = [index for index in range(decoder.n_blocks) if index not in found[count][0]]
        refit_(smaller.decoder, decoder, [*kept[1:], decoder.n_blocks], texts.calibration, attention=True)
        nats = float(window_nats(smaller.decoder, texts.selection).sum())
        if nats >= least:
            break
        best, least = smaller, nats
    return best


def narrowed_(decoder: Decoder, parameters: int, windows: Windows) -> bool:
    """Remove neurons by wanda, of all FFNs alike, down to a number of parameters; say whether that can be done."""
    ffn = decoder.blocks[0].ffn
    each = sum(tensor.numel() for matrix in ffn.matrices for tensor in matrix.tensors)
    each = (each - (0 if ffn.down.bias is None else len(ffn.down.bias))) // ffn.d_ffn
    removed = max(0, math.ceil((decoder.size().parameters - parameters) / each))
    if removed > sum(decoder.d_ffn) - decoder.n_blocks:
        return False
    if removed:
        narrow_(decoder, removed, "wanda", "global", Calibration(decoder, windows))
    return True


OWN = Peer("layerfold: blocks, neurons, repair", "", own)
