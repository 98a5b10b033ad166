"""Nats of each token under a causal language model, without ever holding a batch of logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from layerfold.decoder import Decoder
from layerfold.errors import InputError
from layerfold.progress import SILENT, Progress
from layerfold.statistics import Floats
from layerfold.windows import Windows

_BATCH_TOKENS = 2048
_LOGIT_BYTES = 24 << 20
"""Logits are made in pieces of about this size: small enough to stay in cache between the two readings of them."""


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
    vocabulary = decoder.model.config.vocab_size
    if int(windows.input_ids.max()) >= vocabulary:
        raise InputError(
            f"token id {int(windows.input_ids.max())} for a vocabulary of {vocabulary}: the wrong tokenizer?"
        )
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
    """Negative log-likelihood of each target, (tokens,), from final hidden states, (tokens, d_model)."""
    head = decoder.model.get_output_embeddings()
    weight: Tensor = head.weight
    bias: Tensor | None = getattr(head, "bias", None)
    rows = max(1, _LOGIT_BYTES // (4 * weight.shape[0]))
    buffer = torch.empty(min(rows, len(hidden)), weight.shape[0])
    nats = torch.empty(len(hidden))
    for first in range(0, len(hidden), rows):
        piece = slice(first, first + rows)
        logits = buffer[: len(hidden[piece])]
        torch.mm(hidden[piece].to(weight.dtype), weight.T, out=logits)
        if bias is not None:
            logits += bias
        chosen = logits.gather(1, targets[piece, None])[:, 0]
        largest = logits.amax(1, keepdim=True)
        nats[piece] = logits.sub_(largest).exp_().sum(1).log_() + largest[:, 0] - chosen
    return nats


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """Run GPT-2's activation, written out as six passes over memory, as the one kernel that computes the same."""
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == "NewGELUActivation"
    ]
    for parent, name, _ in swapped:
        setattr(parent, name, nn.GELU("tanh"))
    try:
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)
