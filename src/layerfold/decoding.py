"""Greedy generation of a fixed length."""

from __future__ import annotations

import torch
from torch import Tensor

from layerfold.decoder import Decoder
from layerfold.errors import InputError


@torch.no_grad()
def greedy(decoder: Decoder, prompt: Tensor, new_tokens: int) -> Tensor:
    """Continue a prompt greedily, with the cache on and end-of-text suppressed.

    What a checkpoint's own generation settings say of sampling, beams or penalties is set aside.

    Args:
        prompt: (1, tokens) int64.

    Returns:
        (new_tokens,) int64, the new tokens alone.

    Raises:
        InputError: prompt and new tokens exceed the context.
    """
    decoder.check_ids(prompt)
    tokens = prompt.shape[1]
    if not tokens:
        raise InputError("a prompt of no tokens; accepted: at least one")
    if tokens + new_tokens > decoder.context:
        raise InputError(
            f"prompt of {tokens} tokens and {new_tokens} new ones; accepted: {decoder.context} in all, the context"
        )
    produced: Tensor = decoder.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        use_cache=True,
        pad_token_id=0,
    )
    return produced[0, tokens:]
