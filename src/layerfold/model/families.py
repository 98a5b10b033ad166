"""One row per architecture: where a decoder's blocks are and what its FFN matrices are called."""

from __future__ import annotations

from dataclasses import dataclass

from layerfold.errors import ModelError, one_of


@dataclass(frozen=True)
class Family:
    """Names inside one architecture.

    Attributes:
        blocks: path from the causal LM to the list of blocks.
        norm: path from the causal LM to the norm after the last block.
        attention, attention_norm: a block's attention and the norm before it.
        attention_inputs: the matrices that make its queries, keys and values, in this order; or the one that makes all.
        attention_output: the last matrix inside it.
        ffn, ffn_norm: a block's FFN and the norm before it.
        up, gate, down: matrices inside the FFN; `gate` is None where there is none.
        depth, d_ffn: the configuration's names for the number of blocks and of an FFN's neurons.
    """

    blocks: str
    norm: str
    attention: str
    attention_norm: str
    attention_inputs: tuple[str, ...]
    attention_output: str
    ffn: str
    ffn_norm: str
    up: str
    gate: str | None
    down: str
    depth: str
    d_ffn: str


_GATED = Family(
    blocks="model.layers",
    norm="model.norm",
    attention="self_attn",
    attention_norm="input_layernorm",
    attention_inputs=("q_proj", "k_proj", "v_proj"),
    attention_output="o_proj",
    ffn="mlp",
    ffn_norm="post_attention_layernorm",
    up="up_proj",
    gate="gate_proj",
    down="down_proj",
    depth="num_hidden_layers",
    d_ffn="intermediate_size",
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="transformer.h",
        norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        attention_inputs=("c_attn",),
        attention_output="c_proj",
        ffn="mlp",
        ffn_norm="ln_2",
        up="c_fc",
        gate=None,
        down="c_proj",
        depth="n_layer",
        d_ffn="n_inner",
    ),
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
