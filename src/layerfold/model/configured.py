"""What a configuration says of a decoder, whatever its architecture calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerfold import defaults
from layerfold.model.families import Family

_BY_BLOCK = ("layer_types", "block_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""What says something of each block."""
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "seq_length")
"""The largest number of positions; MPT's and, of old, Bloom's too."""


class Configured:
    """A live view of a configuration: what is written into it, the next model that is built from it has.

    Args:
        config: of transformers.
        family: names its entries.
    """

    def __init__(self, config: Any, family: Family) -> None:
        self._config, self._family = config, family

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self._config.hidden_size)

    @property
    def context(self) -> int:
        """The largest number of positions; 2,048 where it says none."""
        said = (getattr(self._config, name, None) for name in _CONTEXTS)
        return int(next(filter(None, said), defaults.CONTEXT))

    @property
    def query_heads(self) -> int:
        """The number of query heads of an attention."""
        return int(getattr(self._config, "num_attention_heads", None) or 1)

    @property
    def groups(self) -> int:
        """The number of heads of keys and values of an attention."""
        name = self._family.groups
        said = getattr(self._config, name, None) if name else None
        return 1 if self._family.one_group else int(said or self.query_heads)

    @property
    def d_ffn(self) -> int:
        """The number of neurons of an FFN."""
        said = getattr(self._config, self._family.d_ffn, None) if self._family.d_ffn else None
        return int(said or 4 * self.d_model)

    @property
    def logit_scale(self) -> float:
        """What the LM head's products are multiplied by."""
        family = self._family
        scale = float(getattr(self._config, family.logit_scale)) if family.logit_scale else 1.0
        return scale / float(getattr(self._config, family.logit_divisor)) if family.logit_divisor else scale

    @property
    def logit_cap(self) -> float | None:
        """The cap c of logits, z -> c tanh(z / c); None where there is none."""
        name = self._family.logit_cap
        cap = getattr(self._config, name, None) if name else None
        return None if cap is None else float(cap)

    @property
    def residual_scale(self) -> float:
        """What an attention's or FFN's output is multiplied by before it is added to the residual stream."""
        name = self._family.residual
        return float(getattr(self._config, name)) if name else 1.0

    def keep_(self, kept: Sequence[int], depth: int) -> None:
        """Write the new depth, and keep the entries of the blocks that are left in what it says of each block.

        Args:
            kept: the indices of the blocks that are left, in order.
            depth: the number of blocks before.
        """
        config = self._config
        setattr(config, self._family.depth, len(kept))
        for name in _BY_BLOCK:
            if isinstance(said := getattr(config, name, None), list | tuple) and len(said) == depth:
                setattr(config, name, [said[index] for index in kept])
        if getattr(config, "attention_types", None) is not None:  # GPT-Neo's: runs of kinds, with their repetitions
            config.attention_types = [[[kind], 1] for kind in config.attention_layers]

    def say_width_(self, widest: int) -> None:
        """Write the number of neurons of the widest FFN, where it has an entry for it."""
        if widest and self._family.d_ffn and widest != self.d_ffn:
            setattr(self._config, self._family.d_ffn, widest)

    def say_heads_(self, groups: int, queries: int, d_head: int) -> None:
        """Write the number of heads of every attention.

        Args:
            groups: number of heads of keys and values.
            queries: number of query heads that read each of them.
            d_head: channels of a head.
        """
        config, name = self._config, self._family.groups
        if hasattr(config, "head_dim") or name:
            config.head_dim = d_head
        config.num_attention_heads = groups * queries
        if name and getattr(config, name, None) is not None:
            setattr(config, name, groups)
