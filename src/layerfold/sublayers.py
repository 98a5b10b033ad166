"""What stands where a block's attention or FFN was removed: it holds no parameters and adds nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

PARTS = ("attention", "ffn")


class AbsentAttention(nn.Module):
    """Adds zero to the residual stream, and counts the tokens that it sees in the cache.

    Attributes:
        layer_idx: the block's index, by the name that transformers gives it.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        """Return zero, which broadcasts, and no attention weights."""
        if past_key_values is not None:
            # Positions and masks follow from the length of what is cached, and nothing cached counts as no length.
            batch, tokens, _width = hidden_states.shape
            one_channel = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(one_channel, one_channel, self.layer_idx)
        return hidden_states.new_zeros(()), None


class AbsentFFN(nn.Module):
    """Adds zero to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zero, which broadcasts."""
        return hidden_states.new_zeros(())
