"""The kernel of `fused`, in a file of its own: Triton, which torch brings along for GPUs, is imported with it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # Triton takes no annotations but its own
    hidden,
    weight,
    bias,
    found,
    tokens,
    vocabulary,
    stride,
    width: tl.constexpr,
    has_bias: tl.constexpr,
    rows_at_once: tl.constexpr,
    columns_at_once: tl.constexpr,
    step: tl.constexpr,
):
    """Keep the running maximum and sum of a tile's rows; see `fused.log_partition`."""
    rows = tl.program_id(0).to(tl.int64) * rows_at_once + tl.arange(0, rows_at_once)
    real = rows < tokens
    channels = tl.arange(0, step)
    highest = tl.full((rows_at_once,), float("-inf"), tl.float32)
    total = tl.zeros((rows_at_once,), tl.float32)
    for first in range(0, vocabulary, columns_at_once):
        columns = first + tl.arange(0, columns_at_once)
        inside = columns < vocabulary
        logits = tl.zeros((rows_at_once, columns_at_once), tl.float32)
        for begin in range(0, width, step):
            held = begin + channels
            states = tl.load(
                hidden + rows[:, None] * width + held[None, :], mask=real[:, None] & (held < width)[None, :], other=0
            )
            weights = tl.load(
                weight + columns.to(tl.int64)[None, :] * stride + held[:, None],
                mask=inside[None, :] & (held < width)[:, None],
                other=0,
            )
            logits = tl.dot(states, weights, logits)
        if has_bias:
            logits += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)[None, :]
        logits = tl.where(inside[None, :], logits, float("-inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(logits - above[:, None]), 1)
        highest = above
    tl.store(found + rows, highest + tl.log(total), mask=real)
