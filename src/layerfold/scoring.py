"""Nats of each token under a causal language model, without ever holding a batch of logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerfold.decoder import Decoder
from layerfold.errors import InputError
from layerfold.progress import SILENT, Progress
from layerfold.statistics import Floats
from layerfold.stepping import fused_activations
from layerfold.windows import Windows

_BATCH_TOKENS = 1024
_LOGIT_BYTES = 2 << 20
"""Logits are made in tiles of about this size, which stay in cache between the readings of them."""
_LEAST_COLUMNS = 128


@torch.no_grad()
def window_nats(
    decoder: Decoder, windows: Windows, progress: Progress = SILENT, description: str = "scoring"
) -> Floats:
    """Sum the nats of each window's scored tokens.

    Returns:
        (windows,) float64, in the order of the windows.

    Raises:
        InputError: token ids outside the model's vocabulary, or windows longer than its context.
    """
    decoder.check_ids(windows.input_ids)
    if windows.context > decoder.context:
        raise InputError(f"context {windows.context}; accepted: 2 ... {decoder.context} (the model's maximum)")
    totals = np.zeros(len(windows))
    decoder.model.eval()
    with fused_activations(decoder.model):
        for batch in progress.track(windows.batches(_BATCH_TOKENS), description):
            input_ids = windows.input_ids[batch]
            position = torch.arange(windows.context)
            scored = (position >= windows.first_scored[batch, None]) & (position < windows.lengths[batch, None])
            hidden = decoder.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            # The state at position t predicts the token at t + 1.
            nats = token_nats(decoder, hidden[:, :-1][scored[:, 1:]], input_ids[scored])
            rows = torch.nonzero(scored)[:, 0]
            totals[batch] = torch.zeros(len(input_ids), dtype=torch.float64).index_add_(0, rows, nats.double()).numpy()
    return totals


@torch.no_grad()
def token_nats(decoder: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, (tokens,), from final hidden states, (tokens, d_model).

    Goes through the vocabulary in tiles for all tokens at once: products of that shape run near the machine's full
    rate, where a few tokens against the whole vocabulary do not.
    """
    head = decoder.model.get_output_embeddings()
    weight: Tensor = head.weight
    bias: Tensor | None = getattr(head, "bias", None)
    hidden = hidden.to(weight.dtype)
    chosen = torch.empty(len(hidden))
    largest = torch.full((len(hidden), 1), -torch.inf)
    total = torch.zeros(len(hidden), 1)
    columns = min(max(_LEAST_COLUMNS, _LOGIT_BYTES // (4 * max(1, len(hidden)))), len(weight))
    buffer = torch.empty(len(hidden) * columns, dtype=weight.dtype)
    for first in range(0, len(weight), columns):
        piece = weight[first : first + columns]
        logits = torch.mm(hidden, piece.T, out=buffer[: len(hidden) * len(piece)].view(len(hidden), len(piece)))
        if bias is not None:
            logits += bias[first : first + columns]
        here = torch.nonzero((targets >= first) & (targets < first + columns))[:, 0]
        chosen[here] = logits[here, targets[here] - first].float()
        # Sum of exponentials so far, rescaled whenever a larger logit turns up.
        larger = torch.maximum(largest, logits.amax(1, keepdim=True))
        total *= (largest - larger).exp_()
        total += logits.sub_(larger).exp_().sum(1, keepdim=True)
        largest = larger
    return (total.log_() + largest)[:, 0] - chosen
