"""Generation: of a fixed length, greedy or drawn, or greedy of many prompts at once until each ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerfold.errors import InputError
from layerfold.model.decoder import Decoder


@torch.no_grad()
def greedy(decoder: Decoder, prompt: Tensor, new_tokens: int) -> Tensor:
    """Continue a prompt greedily, with the cache on and end-of-text suppressed.

    The checkpoint's own generation settings are ignored, except for its end-of-text tokens.

    Args:
        prompt: (1, tokens) int64.

    Returns:
        (new_tokens,) int64, the new tokens alone.

    Raises:
        InputError: prompt and new tokens exceed the context.
    """
    return _of_length(decoder, prompt, new_tokens, {})


def sampled(decoder: Decoder, prompt: Tensor, new_tokens: int, temperature: float, top_p: float, seed: int) -> Tensor:
    """Continue a prompt by nucleus sampling, otherwise as `greedy` does; the global random numbers stay as they are.

    Args:
        temperature: divides the logits.
        top_p: share of the probability that the tokens hold which may be drawn.
        seed: of the random numbers.
    """
    drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    device = decoder.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _of_length(decoder, prompt, new_tokens, drawing)


def _of_length(decoder: Decoder, prompt: Tensor, new_tokens: int, options: dict[str, Any]) -> Tensor:
    check_room(decoder, [prompt.shape[1]], new_tokens)
    end = decoder.model.generation_config.eos_token_id
    settings = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "eos_token_id": end, "pad_token_id": 0}
    return _generate(decoder, prompt, torch.ones_like(prompt), settings | options)[0]


@torch.no_grad()
def continue_each(
    decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, end: int | None, **options: Any
) -> list[list[int]]:
    """Continue prompts of any lengths in one batch, padded on the left, which changes none of them.

    What a checkpoint's own generation settings say is set aside.

    Args:
        prompts: token ids, none empty.
        new_tokens: at most so many are added to each.
        end: the token after which a text is over; it is not returned.
        options: what of `generate` is to be other than greedy.

    Returns:
        The new tokens alone, one list a prompt.

    Raises:
        InputError: an empty prompt, or one that exceeds the context with its new tokens.
    """
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    longest = check_room(decoder, lengths, new_tokens)
    padding = 0 if end is None else end
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    real = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    settings = {"max_new_tokens": new_tokens, "eos_token_id": end, "pad_token_id": padding} | options
    produced = _generate(decoder, ids, real, settings).tolist()
    return [row[: row.index(end)] if end in row else row for row in produced]


def check_room(decoder: Decoder, lengths: Sequence[int], new_tokens: int) -> int:
    """Return the greatest of some prompts' lengths, if they and what is to follow fit the context."""
    longest = max(lengths)
    if not all(lengths):
        raise InputError("a prompt of no tokens; accepted: at least one")
    if longest + new_tokens > decoder.context:
        raise InputError(
            f"prompt of {longest} tokens and {new_tokens} new ones; accepted: {decoder.context} in all, the context"
        )
    return longest


def _generate(decoder: Decoder, ids: Tensor, real: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return the tokens after `ids`, greedy unless the settings say otherwise, (rows, new tokens)."""
    decoder.check_ids(ids)
    model = decoder.model
    ids, real = ids.to(decoder.device), real.to(decoder.device)
    # Whatever `generate` is not told, it takes from here: lengths, penalties, forced and forbidden tokens.
    own, model.generation_config = model.generation_config, type(model.generation_config)()
    try:
        produced: Tensor = model.generate(ids, attention_mask=real, use_cache=True, **{"do_sample": False} | settings)
    finally:
        model.generation_config = own
    return produced[:, ids.shape[1] :]
