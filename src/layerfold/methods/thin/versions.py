"""Versions of a block with fewer heads and neurons: which of them stay, and the weights that make up for the rest.

Let x be the hidden state before the block in the original, and H_c the target: the state after it, or after blocks
behind it that go. The heads that stay are those from whose outputs the attention's own output is regressed best. The
neurons that stay are those from which, beside the heads, H_c - x is regressed best; both by backward elimination. Then

    W = argmin E w |H_c - x - W f|^2 + ridge |(W - W_0) S|^2

for what the heads and neurons that stay put out, f, and their weights in the original, W_0, as in a repair.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from layerfold.errors import ModelError
from layerfold.inference.holding import halved, held_out_windows, parts, weights
from layerfold.inference.spool import Spool
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream, taken
from layerfold.maths.elimination import eliminated
from layerfold.maths.ridge import NOT_FINITE, RegressionMoments
from layerfold.model.block import PARTS, Block
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import watching
from layerfold.model.offload import gathered_
from layerfold.model.outputs import refittable
from layerfold.progress import SILENT, Progress
from layerfold.text.windows import TokenWindows

RIDGES = (1e-3, 1e-2, 1e-1)
"""Penalties, as multiples of each input's mean square; the held-out windows choose."""

_STEPS = 48
"""In so many steps of an elimination all neurons go."""


@dataclass(frozen=True, order=True)
class Shape:
    """How many groups of heads and how many neurons a block keeps; it goes where both are none."""

    heads: int
    neurons: int


@dataclass(frozen=True)
class Version:
    """A block with fewer heads and neurons.

    Attributes:
        heads, neurons: indices of those that stay, in order; none where the attention or the FFN goes.
        outputs: by part, the weight of its output matrix, (d_model, in), and what is added to its bias, (d_model,), or
            None.
    """

    heads: Tensor
    neurons: Tensor
    outputs: Mapping[str, tuple[Tensor, Tensor | None]]

    @torch.no_grad()
    def apply_(self, decoder: Decoder, index: int) -> None:
        """Make a decoder's block this version."""
        block = decoder.blocks[index]
        if block.heads and not len(self.heads):
            decoder.remove_("attention", [index])
        elif block.heads:
            decoder.keep_heads_({index: self.heads})
        if block.d_ffn and not len(self.neurons):
            decoder.remove_("ffn", [index])
        elif block.d_ffn:
            decoder.keep_neurons_({index: self.neurons})
        self._write_(decoder.blocks[index])

    @torch.no_grad()
    def of(self, block: Block) -> nn.Module:
        """Return this version of a block, which stays as it is; what does not differ is the block's own."""
        found = thinned(block, self.heads)
        if block.d_ffn and not len(self.neurons):
            found.remove_("ffn")
        elif block.d_ffn:
            found.ffn.keep_(self.neurons)
        self._write_(_anew(found))
        return found.module

    def _write_(self, block: Block) -> None:
        for part, (weight, bias) in self.outputs.items():
            matrix = block.output(part)
            assert matrix is not None
            matrix.own_()
            matrix.weight.copy_(weight)
            if bias is not None and matrix.bias is not None:
                matrix.bias.add_(bias)


def thinned(block: Block, heads: Tensor) -> Block:
    """Return a copy of a block with some of its groups of heads; what does not differ is the block's own."""
    known = {id(tensor): tensor for tensor in (*block.module.parameters(), *block.module.buffers())}
    found = replace(block, module=copy.deepcopy(block.module, known))
    gathered_([found.module])  # its own tensors stay where they are made
    if block.heads and not len(heads):
        found.remove_("attention")
    elif block.heads:
        found.attention.keep_(heads)
    return _anew(found)


def _anew(block: Block) -> Block:
    """Return a view that has not looked at its parts yet."""
    return Block(block.index, block.module, block.family, block.queries)


@torch.no_grad()
def walked(
    decoder: Decoder,
    windows: TokenWindows,
    wanted: Mapping[int, Sequence[tuple[Shape, int]]],
    progress: Progress = SILENT,
) -> Iterator[tuple[int, Shape, int, Version]]:
    """Yield versions of blocks, front to back, each fitted to the hidden states of the decoder as it is.

    The moments of one block with some of its heads are held at a time. A block may be edited once its last version has
    been yielded.

    Args:
        windows: calibration text. Every 8th window is held out.
        wanted: by block, shapes that keep something, each with the length of the run of blocks that the version
            replaces, itself included.

    Yields:
        The block's index, the shape, the length and the version.

    Raises:
        InputError: text of a single window, or a decoder whose outputs cannot be refitted.
        ModelError: activations that are not finite.
    """
    windows = halved(windows)
    held_out = held_out_windows(windows)
    with fused_activations(decoder.model):
        stream = Stream(Stepper(decoder), windows)
        ahead = deque([stream.states])
        last = max(wanted, default=-1) + 1
        for index in progress.track(range(last), "fitting versions, block", last):
            some = wanted.get(index, ())
            while len(ahead) <= max((length for _, length in some), default=1):
                stream.states = ahead[-1]
                ahead.append(stream.passed([index + len(ahead) - 1]))
            stream.states = ahead[0]
            targets = dict(enumerate(ahead))
            with decoder.resident([index], edited=True):
                for (shape, length), version in versions(stream, held_out, index, targets, some):
                    yield index, shape, length, version
            ahead.popleft()


@torch.no_grad()
def versions(
    stream: Stream, held_out: Tensor, index: int, targets: Mapping[int, Spool], wanted: Sequence[tuple[Shape, int]]
) -> Iterator[tuple[tuple[Shape, int], Version]]:
    """Yield versions of one block.

    Args:
        stream: of the original, before the block.
        held_out: windows that choose the ridges, (windows,) bool.
        targets: by length of the run of blocks that the version replaces, itself included, the states behind it; that
            of length 1, what leaves the block itself, has to be there.
        wanted: shapes that keep something, each with a length.

    Raises:
        ModelError: activations that are not finite.
    """
    block = stream.stepper.decoder.blocks[index]

    def regression(heads: Tensor, options: Sequence[tuple[Shape, int]]) -> _Regression:
        lengths = {length: targets[length] for length in sorted({length for _, length in options} or {1})}
        return _Regression(stream, held_out, block, heads, lengths, targets[1])

    by_heads: dict[int, list[tuple[Shape, int]]] = {}
    for option in wanted:
        by_heads.setdefault(option[0].heads, []).append(option)
    whole = by_heads.pop(block.heads, [])
    order: Tensor | None = None
    if whole or any(by_heads):  # of which heads stay, the whole attention decides
        found = regression(torch.arange(block.heads), whole)
        for shape, length in whole:
            yield (shape, length), found.version(shape.neurons, length)
        order = found.head_order() if any(by_heads) else None
        del found
    for heads, options in by_heads.items():
        kept = torch.arange(0) if order is None or not heads else order[len(order) - heads :].sort().values
        found = regression(kept, options)
        for shape, length in options:
            yield (shape, length), found.version(shape.neurons, length)
        del found


class _Regression:
    """The regression of what is to leave a block on what its heads and neurons put out, with some of the heads."""

    def __init__(
        self,
        stream: Stream,
        held_out: Tensor,
        block: Block,
        heads: Tensor,
        targets: Mapping[int, Spool],
        own: Spool,
    ) -> None:
        decoder = stream.stepper.decoder
        self._heads, self._block, self._lengths = heads, block, list(targets)
        here = thinned(block, heads)
        found = {part: refittable(decoder, here, part) for part in PARTS}
        self._outputs = {part: output for part, output in found.items() if output is not None}
        self._scale = decoder.configured.residual_scale
        self._constant = any(output.constant for output in self._outputs.values())
        stepper = stream.stepper.like(decoder)
        stepper.replace(block.index, here.module)
        self._moments = self._measured(stream, stepper, held_out, targets, own)
        # What all weights of these heads and of the neurons are in the original, (d_model, in), a bias being none.
        self._start = torch.cat([output.weight.float() for output in self._outputs.values()], dim=1)
        if self._constant:
            self._start = torch.cat([self._start, self._start.new_zeros(len(self._start), 1)], dim=1)
        self._orders: dict[int, Tensor] = {}
        grams, products = [], []
        for each in self._moments:
            gram = each.gram(self._constant)
            given = gram @ self._start.T
            # The residual of each target and what the block puts out: all that the inputs are to give.
            missed = each.products(self._constant).split(len(self._start), dim=1)
            grams.append(gram)
            products.append({length: rest + given for length, rest in zip(self._lengths, missed, strict=True)})
        self._grams, self._products = grams, products
        if not all(bool(each.isfinite().all()) for each in (*grams, *(p for two in products for p in two.values()))):
            raise ModelError(NOT_FINITE)

    @property
    def _read(self) -> int:
        """How many of the inputs are the attention's."""
        attention = self._outputs.get("attention")
        return 0 if attention is None else attention.weight.shape[1]

    def _measured(
        self, stream: Stream, stepper: Stepper, held_out: Tensor, targets: Mapping[int, Spool], own: Spool
    ) -> tuple[RegressionMoments, RegressionMoments]:
        moments = RegressionMoments(), RegressionMoments()
        outputs = list(self._outputs.values())
        with watching(outputs) as seen:
            for batch, _, hidden in stream.walk([self._block.index], stepper):
                for place, rows in enumerate(parts(stream, held_out, batch)):
                    if rows.any():
                        read = torch.cat([each.features(taken(seen[each], rows)) for each in outputs], dim=1)
                        left = taken(hidden, rows).float()
                        missed = torch.cat([taken(each[batch], rows) - left for each in targets.values()], dim=1)
                        moments[place].update(read, missed, weights(taken(own[batch], rows)))
                seen.clear()
        return moments

    def head_order(self) -> Tensor:
        """Return the groups of heads, those that the attention's own output misses least first."""
        gram, width = self._grams[0][: self._read, : self._read], self._block.attention.channels
        start = self._start[:, : self._read]
        return eliminated(gram, gram @ start.T, start, torch.arange(self._read, device=gram.device), width).cpu()

    def _order(self, length: int) -> Tensor:
        """Return the neurons, those that are missed least first."""
        if length not in self._orders:
            gram, count = self._grams[0], self._block.d_ffn
            neurons = torch.arange(self._read, self._read + count, device=gram.device)
            at_once = -(-count // _STEPS)
            self._orders[length] = eliminated(
                gram, self._products[0][length], self._start, neurons, at_once=at_once
            ).cpu()
        return self._orders[length]

    def version(self, neurons: int, length: int) -> Version:
        """Return the version with so many neurons."""
        count = self._block.d_ffn
        kept = torch.arange(count) if neurons == count else self._order(length)[count - neurons :].sort().values
        last = "ffn" if neurons else "attention"
        constant = self._constant and self._outputs[last].constant
        end = len(self._start[0]) - 1
        places = [torch.arange(self._read), self._read + kept, *([torch.tensor([end])] if constant else [])]
        ffn = self._outputs.get("ffn")
        # What goes with an FFN is its bias too.
        lost = ffn.bias if ffn is not None and not neurons else None
        weight = self._solved(torch.cat(places).to(self._start.device), length, lost, constant=constant)
        bias = weight[:, -1] if constant else None
        outputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        if "attention" in self._outputs:  # or what a hybrid has in its place
            outputs["attention"] = weight[:, : self._read], bias if last == "attention" else None
        if neurons:
            outputs["ffn"] = weight[:, self._read : self._read + neurons], bias
        dtype = self._block.output("ffn" if self._block.d_ffn else "attention").weight.dtype  # type: ignore[union-attr]
        outputs = {
            part: (matrix.to(dtype), None if added is None else (added / self._scale).to(dtype))
            for part, (matrix, added) in outputs.items()
        }
        return Version(self._heads, kept[:neurons], outputs)

    def _solved(self, inputs: Tensor, length: int, lost: Tensor | None, *, constant: bool) -> Tensor:
        """Return the weights of some inputs, (d_model, inputs); `lost` is a bias that goes."""
        start = self._start[:, inputs]
        (gram, missed), (held, held_missed) = (
            (each[inputs][:, inputs], products[length][inputs] - each[inputs][:, inputs] @ start.T)
            for each, products in zip(self._grams, self._products, strict=True)
        )
        if lost is not None and constant:
            offset = lost.float() * self._scale
            missed, held_missed = (rest + each[:, -1:] * offset for rest, each in ((missed, gram), (held_missed, held)))
        energies = gram.diagonal().clone()
        energies.clamp_(min=1e-6 * float(energies.mean()))
        if constant:
            energies[-1] = 0
        best, least = torch.zeros_like(missed), 0.0
        for ridge in RIDGES:
            factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge * energies))
            if int(failed):
                continue
            change = torch.cholesky_solve(missed, factor)
            gained = float((change * (held @ change - 2 * held_missed)).sum(dtype=torch.float64))
            if gained < least:
                best, least = change, gained
        return start + best.T
