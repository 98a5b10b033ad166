"""What other versions of blocks would add to the loss, estimated from one back-propagation for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layerfold.inference.sensitivity import through_block, through_head
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import batch_tokens
from layerfold.maths.precision import widest
from layerfold.memory import room
from layerfold.methods.thin.versions import Shape
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows


@torch.no_grad()
def estimated(
    decoder: Decoder,
    windows: TokenWindows,
    blocks: Sequence[nn.Module | None],
    others: Sequence[Mapping[Shape, nn.Module | None]],
) -> list[dict[Shape, float]]:
    """Return, by block, what each of some modules in its place would add to the nats a token.

    Let L be the nats of the text, g_t = dL/dh_t for what leaves a block at token t, and d_t what the other module would
    change in h_t. To second order, with the Fisher information for the Hessian and without what crosses tokens,

        change of L = sum_t g_t d_t + 1/2 sum_t (g_t d_t)^2.

    So a module is passed once, through its own block, where measuring the loss takes a pass through all that follow.

    Args:
        decoder: embeds and reads out; never edited.
        windows: the text.
        blocks: by index, the module that is in the place of the decoder's block; None where there is none.
        others: by index, the modules by shape; None for no block. Those with estimates that are not finite are left
            out of what is returned.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, equation 4, for a change of the
    loss to second order; Singh and Alistarh, "WoodFisher", 2020, equation 7, for the Fisher information of the text's
    own tokens.
    """
    stepper, wide = Stepper(decoder), widest(decoder.device)
    sums = [{shape: torch.zeros((), dtype=wide, device=decoder.device) for shape in each} for each in others]

    def passed(index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        stepper.replace(index, module)
        return stepper.step(index, hidden)

    with fused_activations(decoder.model):
        for batch in windows.batches(batch_tokens(decoder, len(blocks))):
            states = [stepper.embed(windows.input_ids[batch])]
            for index, module in enumerate(blocks):
                with decoder.resident([index]):
                    states.append(states[-1] if module is None else passed(index, module, states[-1]))
            left = states.pop()
            gradient = through_head(decoder, windows, batch, left.clone())
            for index, module in reversed([*enumerate(blocks)]):
                hidden = states.pop()
                with decoder.resident([index]):
                    for shape, other in others[index].items():
                        change = (hidden if other is None else passed(index, other, hidden)) - left
                        felt = (gradient.float() * change.float()).sum(-1)
                        sums[index][shape] += (felt + felt.square() / 2).sum(dtype=wide)
                    if module is not None:
                        stepper.replace(index, module)
                        gradient, _ = through_block(stepper, index, hidden.clone(), gradient, {})
                left = hidden
            room.release()
    tokens = float((windows.lengths - windows.first_scored).sum())
    found = [{shape: float(total) / tokens for shape, total in each.items()} for each in sums]
    return [{shape: harm for shape, harm in each.items() if math.isfinite(harm)} for each in found]
