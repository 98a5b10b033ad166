"""Fitted averages: for each group of FFNs the one that comes closest to what each of them did, on its own inputs.

The first matrices (up, gate) of a group's blocks l become

    W = argmin sum_l E w |W_l x_l - W x_l|^2 + ridge |(W - mean(W_l)) S|^2,

where x_l is what block l's FFN reads, and the neurons are in the anchor's order. The last matrix (down) is then
regressed, in the same way, from the neurons that the new first matrices give to what each block's own FFN put out. In a
group that becomes one block, it is regressed from that block's neurons to all that is missing of the hidden states
behind the group.

A bias is the weight of one more input that is always 1, without a penalty. S is diagonal and holds the root mean square
of each input. A token's weight w is the inverse of the mean square of its hidden state behind the block, since the next
norm divides by that. Held-out windows choose the ridge. Groups are fitted front to back, each on the inputs that the
groups before it leave.

Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, section 3 (RegMean),
fits each matrix of whole models so. Here the FFNs of one model are merged, as Verma and Elbayad average them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerfold.calibration import Calibration, Pair
from layerfold.errors import ModelError
from layerfold.inference.holding import held_out_windows, parts, weights
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream, taken
from layerfold.maths.linalg import Match
from layerfold.model.decoder import Decoder
from layerfold.model.ffn import FFN
from layerfold.model.matrix import watching

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
"""Penalties, as multiples of each input's mean square; with infinity the mean of the weights stays."""

_LEAST = 1e-6
"""Smallest mean square of an input that sets its penalty, as a share of the mean over the inputs."""

NOT_FINITE = "what the FFNs of blocks {} to {} read or put out is not finite on the calibration text"


@dataclass(frozen=True)
class Fitted:
    """What a group's FFNs become.

    Attributes:
        anchor: the block whose FFN it is in place of.
        tensors: weights and biases as `FFN.tensors` orders them.
        notes: of each matrix the ridge, and the share of the held-out outputs that the mean and the fit miss; JSON.
    """

    anchor: int
    tensors: list[Tensor]
    notes: dict[str, Any]


class _Moments:
    """Weighted second moments of inputs, a 1 being the last of them, and outputs, over two parts of the text.

    Attributes:
        products: of the inputs, (2, in + 1, in + 1): to fit, and held out.
        cross: of outputs and inputs, (2, out, in + 1).
        squares: of the outputs, (2, out).
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.products = torch.zeros(2, inputs + 1, inputs + 1, device=device)
        self.cross = torch.zeros(2, outputs, inputs + 1, device=device)
        self.squares = torch.zeros(2, outputs, device=device)

    def read_(self, part: int, inputs: Tensor, weight: Tensor, outputs: Tensor | None = None) -> None:
        """Add rows, (rows, in) and (rows, out), to one part; `weight` is (rows,)."""
        root = weight.sqrt()[:, None]
        scaled = torch.cat([inputs.float() * root, root], dim=1)
        self.products[part].addmm_(scaled.T, scaled)
        if outputs is not None:
            wanted = outputs.float() * root
            self.cross[part].addmm_(wanted.T, scaled)
            self.squares[part] += wanted.square().sum(0)

    def put_out_(self, inputs: _Moments, matrix: Tensor) -> None:
        """Add inputs and what a matrix, (out, in + 1), its bias the last column, puts out for them."""
        cross = matrix @ inputs.products
        self.products += inputs.products
        self.cross += cross
        self.squares += (cross * matrix).sum(2)

    @property
    def finite(self) -> bool:
        """Whether all of them are."""
        return all(bool(each.isfinite().all()) for each in (self.products, self.cross, self.squares))

    def solve(self, start: Tensor, *, biased: bool) -> tuple[Tensor, dict[str, Any]]:
        """Return the regression of the outputs on the inputs, (out, in + 1), and notes.

        Args:
            start: what a ridge draws it to.
            biased: whether the last column may differ from 0.
        """
        count = self.products.shape[1] - (not biased)
        products, cross, start = self.products[:, :count, :count], self.cross[:, :, :count], start[:, :count]
        total = float(self.squares[1].sum(dtype=torch.float64))

        def missed(matrix: Tensor) -> float:
            change = (matrix * (matrix @ products[1] - 2 * cross[1])).sum(dtype=torch.float64)
            return max(0.0, total + float(change)) / total if total > 0 else 0.0

        best, chosen, least = start, math.inf, missed(start)
        notes: dict[str, Any] = {"mean": least}
        energies = products[0].diagonal().clone()
        energies.clamp_(min=_LEAST * float(energies.mean()))
        if biased:
            energies[-1] = 0
        for ridge in RIDGES[:-1]:
            factor, failed = torch.linalg.cholesky_ex(products[0] + torch.diag(ridge * energies))
            if int(failed):
                continue
            found = torch.cholesky_solve((cross[0] + ridge * start * energies).T, factor).T
            if (rest := missed(found)) < least:
                best, chosen, least = found, ridge, rest
        notes |= {"fitted": least, "ridge": None if math.isinf(chosen) else chosen}
        return best, notes


def fit(
    decoder: Decoder,
    groups: Sequence[range],
    anchors: Sequence[int],
    matches: Mapping[Pair, Match],
    calibration: Calibration,
    *,
    collapse: bool,
) -> Iterator[Fitted]:
    """Yield for each group, front to back, what its FFNs become; the caller writes it before it asks for the next.

    The moments of one group are held at a time.

    Args:
        groups: of two or more consecutive blocks, none in two of them.
        anchors: of the groups.
        matches: of the neurons of the others with those of the anchor; none where they are not reordered.
        collapse: whether the anchor is to do what the whole group did, and the others will go.

    Raises:
        InputError: text of one window.
        ModelError: activations that are not finite.
    """
    held_out = held_out_windows(calibration.windows)
    reached = 0
    ordered = list(zip(groups, anchors, strict=True))
    with fused_activations(decoder.model):
        stream = Stream(Stepper(decoder), calibration.windows)
        for group, anchor in calibration.progress.track(ordered, "fitting averages, group", len(ordered)):
            stream.advance(range(reached, group[0]))
            reached = group.stop
            with decoder.resident(group, edited=True):
                yield _fit(stream, held_out, group, anchor, matches, collapse=collapse)
            stream.advance([anchor] if collapse else group)


def _fit(
    stream: Stream, held_out: Tensor, group: range, anchor: int, matches: Mapping[Pair, Match], *, collapse: bool
) -> Fitted:
    """Fit one group; the stream stays before it."""
    decoder = stream.stepper.decoder
    ffns = {index: decoder.blocks[index].ffn for index in group}
    own = {index: _matrices(ffn, matches.get((anchor, index))) for index, ffn in ffns.items()}
    biased = [matrix.bias is not None for matrix in ffns[anchor].matrices]
    tensors: list[Tensor] = []
    notes = []

    def solve(place: int, moments: _Moments) -> None:
        if not moments.finite:
            raise ModelError(NOT_FINITE.format(group[0], group[-1]))
        mean = torch.stack([each[place] for each in own.values()]).mean(0)
        matrix, found = moments.solve(mean, biased=biased[place])
        notes.append(found)
        tensors.extend([matrix[:, :-1], matrix[:, -1]] if biased[place] else [matrix])

    read = _read(stream, held_out, ffns)
    for place in range(len(biased) - 1):
        out, inputs = own[anchor][place].shape
        outputs = _Moments(inputs - 1, out, decoder.device)
        for index, moments in read.items():
            outputs.put_out_(moments, own[index][place])
        solve(place, outputs)
    del read
    new = ffns[anchor].copy()
    for mine, value in zip((each for matrix in new.matrices[:-1] for each in matrix.tensors), tensors, strict=True):
        mine.copy_(value)
    # Behind a norm of the FFN's output what is missing of the hidden states is not linear in the last matrix.
    alone = anchor if collapse and not decoder.family.ffn_after else None
    solve(len(biased) - 1, _put_out(stream, held_out, ffns, new, alone))
    return Fitted(anchor, tensors, {"block": anchor, "matrices": notes})


def _read(stream: Stream, held_out: Tensor, ffns: Mapping[int, FFN]) -> dict[int, _Moments]:
    """Return, by block, the moments of what each FFN reads."""
    decoder = stream.stepper.decoder
    up = {index: ffn.matrices[0] for index, ffn in ffns.items()}
    found = {index: _Moments(each.inputs, 0, decoder.device) for index, each in up.items()}
    with watching(up.values()) as seen:
        for batch, index, hidden in stream.walk(ffns):
            for part, rows in enumerate(parts(stream, held_out, batch)):
                if rows.any():
                    found[index].read_(part, taken(seen[up[index]], rows), weights(taken(hidden, rows)))
            seen.clear()
    return found


def _put_out(stream: Stream, held_out: Tensor, ffns: Mapping[int, FFN], new: FFN, alone: int | None) -> _Moments:
    """Return the moments of new neurons and of what they are to put out.

    Args:
        new: computes the neurons.
        alone: the block that is to do what the whole group did; None where each does what it did.
    """
    decoder = stream.stepper.decoder
    chosen = ffns if alone is None else [alone]
    up, down = ({index: ffns[index].matrices[place] for index in chosen} for place in (0, -1))
    found = _Moments(new.d_ffn, decoder.d_model, decoder.device)
    with watching(up.values()) as read, watching(down.values(), outputs=True) as given:
        for batch, index, hidden in stream.walk(ffns):
            if alone is not None and index != max(ffns):
                continue
            here, missing = index, None
            if alone is not None:
                here = alone
                missing = (hidden - stream.stepper.step(alone, stream.states[batch])).float()
                missing /= decoder.configured.residual_scale
            for part, rows in enumerate(parts(stream, held_out, batch)):
                if rows.any():
                    wanted = taken(given[down[here]], rows).float()
                    wanted = wanted if missing is None else wanted + taken(missing, rows)
                    neurons = new.neurons(taken(read[up[here]], rows))
                    found.read_(part, neurons, weights(taken(hidden, rows)), wanted)
            read.clear()
            given.clear()
    return found


def _matrices(ffn: FFN, match: Match | None) -> list[Tensor]:
    """Return an FFN's matrices in float32, (out, in + 1), the bias the last column, neurons in the anchor's order."""
    order = torch.arange(ffn.d_ffn, device=ffn.down.weight.device) if match is None else match.order
    flat = iter(ffn.tensors(order, None if match is None else match.signs))
    found = []
    for matrix in ffn.matrices:
        weight = next(flat).float()
        bias = weight.new_zeros(len(weight)) if matrix.bias is None else next(flat).float()
        found.append(torch.cat([weight, bias[:, None]], dim=1))
    return found
