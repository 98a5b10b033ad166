"""Nats of each token under a causal language model, without ever holding a batch of logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerfold.errors import InputError
from layerfold.inference import fused
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream, batch_tokens, taken
from layerfold.maths.intervals import Floats
from layerfold.maths.precision import widest
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.text.windows import TokenWindows

_LOGIT_BYTES = 2 << 20
"""Logits are made in tiles of about this size, which stay in cache between the readings of them; on a GPU in larger
ones, which keep all of it busy."""
_GPU_LOGIT_BYTES = 1 << 30
_LEAST_COLUMNS = 128
_MM_TAKES_TYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
"""Whether `torch.mm` puts half-precision products out in float32."""


def window_nats(
    decoder: Decoder, windows: TokenWindows, progress: Progress = SILENT, description: str = "scoring"
) -> Floats:
    """Sum the nats of each window's scored tokens.

    Returns:
        (windows,) float64, in the order of the windows.

    Raises:
        InputError: token ids outside the model's vocabulary, or windows longer than its context.
    """
    return windows.units.by_window(_piece_nats(decoder, windows, progress, description))


def unit_nats(
    decoder: Decoder, windows: TokenWindows, progress: Progress = SILENT, description: str = "scoring"
) -> Floats:
    """Sum the nats of the scored tokens of each unit of text: see `units`.

    Returns:
        (units,) float64.

    Raises:
        InputError: token ids outside the model's vocabulary, or windows longer than its context.
    """
    return windows.units.by_unit(_piece_nats(decoder, windows, progress, description))


@torch.no_grad()
def _piece_nats(decoder: Decoder, windows: TokenWindows, progress: Progress, description: str) -> Floats:
    decoder.check_ids(windows.input_ids)
    device = decoder.device
    if windows.context > decoder.context:
        raise InputError(f"context {windows.context}; accepted: 2 ... {decoder.context} (the model's maximum)")
    totals = torch.zeros(windows.units.pieces, dtype=widest(device), device=device)
    decoder.model.eval()
    with fused_activations(decoder.model):
        for batch, hidden in _final_states(decoder, windows, progress, description):
            input_ids = windows.input_ids[batch]
            scored = scored_positions(windows, batch)
            nats = token_nats(decoder, taken(hidden, predicting(scored)), input_ids[scored].to(device))
            totals.index_add_(0, windows.pieces(batch, scored).to(device), nats.to(totals.dtype))
    return totals.cpu().double().numpy()


def _final_states(
    decoder: Decoder, windows: TokenWindows, progress: Progress, description: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield batches of windows with what the LM head reads, (windows, tokens, d_model): see `Decoder.readout`."""
    if not decoder.offloaded:
        for batch in progress.track(windows.batches(batch_tokens(decoder)), description):
            input_ids = windows.input_ids[batch].to(decoder.device)
            final = decoder.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            yield batch, decoder.scaled(final)
        return
    # Each block once over all of the text: its weights are read once.
    stream = Stream(Stepper(decoder), windows)
    for index in progress.track(range(decoder.n_blocks), f"{description}, block", decoder.n_blocks):
        stream.advance([index])
    for batch in progress.track(stream.batches, description):
        yield batch, decoder.readout(stream.states[batch])


def scored_positions(windows: TokenWindows, batch: slice | list[int]) -> Tensor:
    """Return which tokens of these windows are scored, (windows, context) bool."""
    position = torch.arange(windows.context)
    return (position >= windows.first_scored[batch, None]) & (position < windows.lengths[batch, None])


def predicting(scored: Tensor) -> Tensor:
    """Return the positions before those that are scored: the state at position t predicts the token at t + 1."""
    return torch.nn.functional.pad(scored[:, 1:], (0, 1))


@torch.no_grad()
def token_nats(decoder: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, (tokens,), from final hidden states, (tokens, d_model)."""
    return log_partition(decoder, hidden) - target_logits(decoder, hidden, targets)


def target_logits(decoder: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Logit of each target, (tokens,), from final hidden states, (tokens, d_model)."""
    weight, bias = _head(decoder)
    logits = (hidden.to(_precision(weight)) * weight[targets]).sum(1)  # in the wider of the two types
    return _capped_(logits if bias is None else logits + bias[targets], decoder.configured.logit_cap).float()


def log_partition(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Log of the sum of the exponentials of all logits, (tokens,), from final hidden states, (tokens, d_model).

    Goes through the vocabulary in tiles for all tokens at once: products of that shape run near the machine's full
    rate, where a few tokens against the whole vocabulary do not. Logits are float32: rounded to 8 or 11 bits, they
    would be off by more than models differ.
    """
    weight, bias = _head(decoder)
    if fused.available(weight) and decoder.configured.logit_cap is None:
        return fused.log_partition(hidden.to(weight.dtype), weight, bias)
    zero = hidden.new_zeros(len(hidden), 1, dtype=_precision(weight))
    _, first = next(_tiles(decoder, hidden, zero))
    shift = first.amax(1, keepdim=True)
    total = _sum_exponentials(decoder, hidden, shift)
    if not torch.isfinite(total).all():
        # A logit lies further above the first tile's largest than float32 can tell: take the largest of all.
        for _, logits in _tiles(decoder, hidden, zero):
            shift = torch.maximum(shift, logits.amax(1, keepdim=True))
        total = _sum_exponentials(decoder, hidden, shift)
    return (total.log_() + shift)[:, 0].float()


@torch.no_grad()
def nats_slope(decoder: Decoder, hidden: Tensor, partition: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of each target's nats, (tokens, d_model), by the final hidden state that predicts it.

    Args:
        partition: the states' `log_partition`.
    """
    weight, _ = _head(decoder)
    slope, cap = weight[targets], decoder.configured.logit_cap
    if cap is not None:
        slope = slope * (1 - (target_logits(decoder, hidden, targets) / cap).square())[:, None]
    return expected_slope(decoder, hidden, partition) - slope


@torch.no_grad()
def expected_slope(decoder: Decoder, hidden: Tensor, partition: Tensor) -> Tensor:
    """Mean of the logits' gradients under the predicted distribution, (tokens, d_model), from final hidden states.

    That is the mean of the LM head's rows where logits are linear in the hidden state, which they are without a cap.

    Args:
        partition: their `log_partition`.
    """
    weight, _ = _head(decoder)
    cap, shift = decoder.configured.logit_cap, partition[:, None].to(_precision(weight))
    mean = torch.zeros_like(hidden, dtype=shift.dtype)
    for rows, logits in _tiles(decoder, hidden, shift):
        slopes = None if cap is None else 1 - ((logits + shift) / cap).square()
        shares = logits.exp_()
        mean.addmm_(shares if slopes is None else shares.mul_(slopes), weight[rows].to(mean.dtype))
    return mean.float()


@dataclass(frozen=True)
class Expectation:
    """What a model predicts for some tokens, for the divergence of other models from it.

    With w the mean of the LM head's rows under p, and logits linear in the hidden state, KL(p || q) = log Z_q - log Z_p
    + (h_p - h_q) w: one look at the vocabulary for each q, the same that its perplexity takes. With a cap of the logits
    each q takes another look.

    Attributes:
        own: log Z_p less the mean of the model's own logits, (tokens,).
        mean: w, (tokens, d_model); None where there is a cap.
        states, partition: of the model, (tokens, d_model) and (tokens,), where there is one.
    """

    own: Tensor
    mean: Tensor | None
    states: Tensor | None = None
    partition: Tensor | None = None

    @classmethod
    def of(cls, decoder: Decoder, states: Tensor) -> Expectation:
        """Return what a model predicts from its final hidden states, (tokens, d_model)."""
        partition = log_partition(decoder, states)
        if decoder.configured.logit_cap is None:
            mean = expected_slope(decoder, states, partition)
            return cls(partition - (states * mean).sum(1), mean)
        return cls(partition - _mean_logits(decoder, states, partition, states), None, states, partition)

    def divergence(self, decoder: Decoder, states: Tensor, partition: Tensor) -> Tensor:
        """Return KL(model || other) for each token, (tokens,).

        Args:
            decoder: has the LM head of both.
            states: the other's final hidden states.
            partition: their `log_partition`.
        """
        if self.mean is not None:
            return partition - (states * self.mean).sum(1) - self.own
        assert self.states is not None
        assert self.partition is not None
        return partition - _mean_logits(decoder, self.states, self.partition, states) - self.own

    def split(self, counts: list[int]) -> Iterator[Expectation]:
        """Yield the expectations for successive runs of tokens, whose lengths are `counts`."""
        own, *others = self._tensors
        pieces = [[None] * len(counts) if each is None else each.split(counts) for each in others]
        for mine, *rest in zip(own.split(counts), *pieces, strict=True):
            yield Expectation(mine, *rest)

    @staticmethod
    def joined(pieces: Iterable[Expectation]) -> Expectation:
        """Undo `split`."""
        own, *others = zip(*(each._tensors for each in pieces), strict=True)
        return Expectation(torch.cat(own), *(None if each[0] is None else torch.cat(each) for each in others))

    @property
    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.own, self.mean, self.states, self.partition


@torch.no_grad()
def _mean_logits(decoder: Decoder, states: Tensor, partition: Tensor, others: Tensor) -> Tensor:
    """Mean of the logits of other final states under what these predict, (tokens,)."""
    shift = partition[:, None].to(_precision(_head(decoder)[0]))
    total = torch.zeros_like(shift[:, 0])
    both = zip(_tiles(decoder, states, shift), _tiles(decoder, others, torch.zeros_like(shift)), strict=True)
    for (_, own), (_, logits) in both:
        total += (own.exp_() * logits).sum(1)
    return total.float()


def _head(decoder: Decoder) -> tuple[Tensor, Tensor | None]:
    """The LM head's weight, (vocabulary, d_model), and bias."""
    head = decoder.model.get_output_embeddings()
    bias: Tensor | None = getattr(head, "bias", None)
    return head.weight.detach(), None if bias is None else bias.detach()


def _precision(weight: Tensor) -> torch.dtype:
    """What the head is computed in: its own precision, at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def _exact(weight: Tensor) -> bool:
    """Whether the device multiplies half-precision numbers exactly and adds the products up in float32."""
    return weight.dtype in (torch.bfloat16, torch.float16) and weight.is_cuda and _MM_TAKES_TYPE


def _operand(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return states in the type in which they are multiplied by the head."""
    return hidden.to(weight.dtype if _exact(weight) else _precision(weight))


def _capped_(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _tiles(decoder: Decoder, hidden: Tensor, shift: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the vocabulary with their logits less `shift`, (tokens, rows), in one buffer."""
    (weight, bias), cap = _head(decoder), decoder.configured.logit_cap
    hidden = _operand(hidden, weight)
    room = _LOGIT_BYTES if hidden.device.type == "cpu" else _GPU_LOGIT_BYTES
    columns = min(max(_LEAST_COLUMNS, room // (4 * max(1, len(hidden)))), len(weight))
    buffer = hidden.new_empty(len(hidden) * columns, dtype=shift.dtype)
    for first in range(0, len(weight), columns):
        rows = slice(first, min(first + columns, len(weight)))
        piece = weight[rows].to(hidden.dtype)
        logits = buffer[: len(hidden) * len(piece)].view(len(hidden), len(piece))
        if cap is not None:
            logits.copy_(hidden.to(shift.dtype) @ piece.T.to(shift.dtype))
            yield rows, _capped_(logits if bias is None else logits.add_(bias[rows]), cap).sub_(shift)
            continue
        if hidden.dtype == shift.dtype:
            # The shift goes in with the product: one reading of the tile less.
            torch.addmm(shift, hidden, piece.T, beta=-1, out=logits)
        else:
            torch.mm(hidden, piece.T, out_dtype=shift.dtype, out=logits).sub_(shift)
        yield rows, logits if bias is None else logits.add_(bias[rows])


def _sum_exponentials(decoder: Decoder, hidden: Tensor, shift: Tensor) -> Tensor:
    total = torch.zeros_like(shift)
    for _, logits in _tiles(decoder, hidden, shift):
        total += logits.exp_().sum(1, keepdim=True)
    return total
