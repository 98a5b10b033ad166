"""One row per architecture: where a decoder's blocks are and what its FFN matrices are called."""

from __future__ import annotations

from dataclasses import dataclass

from layerfold.errors import ModelError, one_of


@dataclass(frozen=True)
class Family:
    """Names inside one architecture.

    Attributes:
        blocks: path from the causal LM to the list of blocks.
        ffn: path from a block to its FFN.
        up, gate, down: matrices inside the FFN; `gate` is None where there is none.
        depth: the configuration's name for the number of blocks.
    """

    blocks: str
    ffn: str
    up: str
    gate: str | None
    down: str
    depth: str


_GATED = Family("model.layers", "mlp", "up_proj", "gate_proj", "down_proj", "num_hidden_layers")

FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "mlp", "c_fc", None, "c_proj", "n_layer"),
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
}
"""By `config.model_type`."""


def family_of(model_type: str) -> Family:
    """Return the row of an architecture.

    Raises:
        ModelError: the architecture has no row (an encoder, or one not supported yet).
    """
    if model_type not in FAMILIES:
        raise ModelError(f"unsupported architecture {one_of(model_type, FAMILIES)}")
    return FAMILIES[model_type]
