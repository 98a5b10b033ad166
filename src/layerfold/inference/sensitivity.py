"""How much the loss would miss each neuron and each group of heads, to first order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerfold.errors import ModelError
from layerfold.inference.scoring import log_partition, nats_slope, predicting, scored_positions
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import batch_tokens
from layerfold.maths.precision import widest
from layerfold.memory import room
from layerfold.model.block import Block
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix, watching
from layerfold.progress import SILENT, Progress
from layerfold.text.windows import TokenWindows


@dataclass(frozen=True)
class Sensitivities:
    """Sums over tokens of (a dL/da)^2, a being what a unit puts out and L the nats of the text.

    A neuron puts out one channel, a group of heads many, whose a dL/da go together: they are added up first. Heads as a
    whole are then scaled to what their channels would come to one by one, as neurons are counted. Without that one
    ranking over both keeps too many heads.

    Attributes:
        neurons: by block, (d_ffn,) float64.
        heads: by block, (groups,) float64.
    """

    neurons: dict[int, Tensor]
    heads: dict[int, Tensor]


def sensitivities(decoder: Decoder, windows: TokenWindows, progress: Progress = SILENT) -> Sensitivities:
    """Return what setting each unit's output to zero would change in the loss, to first order, squared, token by token.

    Back-propagation goes block by block: a block runs once more from what entered it, so that the activations of one
    block and one batch are held, whatever the depth; and no logits are.

    Args:
        decoder: stays as it is.
        windows: calibration text.

    Raises:
        ModelError: gradients that are not finite.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, equations 6 and 8 (the Taylor
    expansion, of gates); Michel et al., "Are Sixteen Heads Really Better than One?", 2019 (heads).
    """
    blocks = decoder.blocks
    read = {(block.index, "ffn"): block.ffn.down for block in blocks if block.d_ffn}
    read |= {(block.index, "attention"): block.attention.output for block in blocks if block.heads}
    device, wide = decoder.device, widest(decoder.device)
    felt = {place: torch.zeros(_units(blocks[place[0]], place[1]), dtype=wide, device=device) for place in read}
    apart = torch.zeros((), dtype=wide, device=device)  # what the channels of all heads come to one by one
    stepper = Stepper(decoder)
    decoder.model.eval()
    with fused_activations(decoder.model), _frozen(decoder.model):
        for batch in progress.track(windows.batches(batch_tokens(decoder, len(blocks))), "back-propagating"):
            states = [stepper.embed(windows.input_ids[batch])]
            for block in blocks:
                states.append(stepper.step(block.index, states[-1]))
            gradient = through_head(decoder, windows, batch, states.pop())
            for block in reversed(blocks):
                own = {part: read[index, part] for index, part in read if index == block.index}
                with decoder.resident([block.index]):
                    gradient, changes = through_block(stepper, block.index, states.pop(), gradient, own)
                for part, change in changes.items():
                    total = felt[block.index, part]
                    sums = change.unflatten(-1, (len(total), -1)).sum(-1)
                    total += sums.square().sum((0, 1), dtype=wide)
                    if part == "attention":
                        apart += change.square().sum(dtype=wide)
            room.release()
    felt = {place: total.cpu().double() for place, total in felt.items()}
    for (index, part), total in felt.items():
        if not total.isfinite().all():
            raise ModelError(f"gradients at block {index}'s {part} on the calibration text are not finite")
    neurons, heads = ({index: felt[index, of] for index, of in felt if of == part} for part in ("ffn", "attention"))
    together = sum(float(total.sum()) for total in heads.values())
    scale = float(apart) / together if together else 1.0
    return Sensitivities(neurons, {index: total * scale for index, total in heads.items()})


def _units(block: Block, part: str) -> int:
    return block.d_ffn if part == "ffn" else block.heads


@torch.no_grad()
def through_head(decoder: Decoder, windows: TokenWindows, batch: slice, hidden: Tensor) -> Tensor:
    """Return dL/dhidden, (windows, tokens, d_model), for what leaves the last block."""
    ids, scored = windows.input_ids[batch], scored_positions(windows, batch)
    with torch.enable_grad():
        hidden = hidden.requires_grad_()
        final = decoder.readout(hidden)
    # The state at position t predicts the token at t + 1; of its nats the gradient is E_p[w] - w of that token.
    rows = predicting(scored).flatten().nonzero()[:, 0].to(final.device)
    found = final.detach().flatten(0, 1)[rows]
    gradient = torch.zeros_like(final)
    slope = nats_slope(decoder, found, log_partition(decoder, found), ids[scored].to(found.device))
    gradient.view(-1, gradient.shape[-1])[rows] = slope.to(gradient.dtype)
    return torch.autograd.grad(final, hidden, gradient)[0]


def through_block(
    stepper: Stepper, index: int, hidden: Tensor, gradient: Tensor, read: Mapping[str, Matrix]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return dL/dhidden for what enters a block, and a dL/da, (windows, tokens, inputs), for what each matrix reads."""
    with torch.enable_grad(), watching(read.values()) as seen:
        hidden = hidden.requires_grad_()
        left = stepper.run(index, hidden)
        inputs = [seen[matrix] for matrix in read.values()]
        found = torch.autograd.grad(left, [hidden, *inputs], gradient)
    slopes = zip(read, inputs, found[1:], strict=True)
    felt = {part: each.detach().float() * slope.float() for part, each, slope in slopes}
    return found[0], {part: each if each.ndim == 3 else each[None] for part, each in felt.items()}  # OPT's FFNs


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no parameter's gradient meanwhile."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
