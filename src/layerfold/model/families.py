"""One row per architecture: where a decoder's parts are, what they are called, and what differs between blocks.

A row says what a block looks like. What a model admits follows from it and from the weights: see `structure`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from layerfold.errors import ModelError, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal["apart", "stacked", "by group"]
"""How the outputs of the matrices that make queries, keys and values are laid out.

``apart``: a matrix for each. ``stacked``: one matrix, all queries, then all keys, then all values. ``by group``: one
matrix, the queries, the key and the value of the first group of heads, then those of the second.
"""


def _as_written(row: Family, config: Any) -> Family:
    return row


@dataclass(frozen=True)
class Family:
    """Names inside one architecture; paths inside a block are relative to it.

    Attributes:
        blocks: path from the causal LM to the list of blocks.
        readout: paths from the causal LM to what stands between the last block and the LM head, in order; those that a
            model does not have are skipped.
        attention: a block's attention.
        mixers: what stands in its place in some blocks of a hybrid, and has no heads that can be removed, with the last
            matrix inside it.
        attention_norm, attention_after: the norm before it, and that of its output; empty where there is none.
        attention_inputs: the matrices that make its queries, keys and values, in this order; or the one that makes all.
        attention_output: the last matrix inside it; empty where it is no attention that is known.
        layout: see `Layout`.
        counts: what the attention remembers of its size, by attribute: ``queries``, the number of query heads,
            ``groups``, or ``channels``, what its output matrix reads.
        ffn: a block's FFN; empty where its matrices are on the block itself.
        ffn_norm, ffn_after: as of the attention. Where the FFN reads what the attention reads, the first is empty.
        up, gate, down: matrices inside the FFN; the last is empty where it is no row of matrices, as in a mixture of
            experts. `gate` is None where there is none; where it is `up`, one matrix holds
            both, the gate first.
        act: the activation, where the FFN's matrices are on the block itself.
        adds: whether an FFN is given the residual stream too, and adds it.
        stream_norms: whether norms are of the residual stream, after a sublayer was added: they stay where that goes.
        depth, d_ffn: the configuration's names for the number of blocks and of an FFN's neurons.
        groups: its name for the number of heads of keys and values; empty where each query head has its own.
        one_group: whether all query heads read the same keys and values.
        slopes: whether each head has its own slope of a bias for distance, by its number (ALiBi).
        residual: the configuration's name for what a sublayer's output is multiplied by before it is added.
        logit_scale, logit_divisor: its names for what logits are multiplied or divided by.
        logit_cap: its name for the cap c of logits, z -> c tanh(z / c).
        tuples: whether a block returns a tuple.
        adapt: changes the row to what a configuration says.
    """

    blocks: str = "model.layers"
    readout: tuple[str, ...] = ("model.norm",)
    attention: str = "self_attn"
    mixers: tuple[tuple[str, str], ...] = ()
    attention_norm: str = "input_layernorm"
    attention_after: str = ""
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    layout: Layout = "apart"
    counts: tuple[tuple[str, str], ...] = ()
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    ffn_after: str = ""
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"
    act: str = ""
    adds: bool = False
    stream_norms: bool = False
    depth: str = "num_hidden_layers"
    d_ffn: str = "intermediate_size"
    groups: str = "num_key_value_heads"
    one_group: bool = False
    slopes: bool = False
    residual: str = ""
    logit_scale: str = ""
    logit_divisor: str = ""
    logit_cap: str = ""
    tuples: bool = False
    adapt: Callable[[Family, Any], Family] = _as_written

    @property
    def gated(self) -> bool:
        """Whether an FFN has a gate."""
        return self.gate is not None

    def norms(self, part: str) -> list[str]:
        """Return the norms that only the ``attention`` or the ``ffn`` of a block has, before and after it."""
        if self.stream_norms:
            return []
        if part == "attention":
            before = self.attention_norm if self.ffn_norm or self.ffn_after else ""
            return [name for name in (before, self.attention_after) if name]
        return [name for name in (self.ffn_norm, self.ffn_after) if name]

    @property
    def fused_gate(self) -> bool:
        """Whether one matrix holds the gate and `up`."""
        return self.gate == self.up


def _stablelm(row: Family, config: Any) -> Family:
    return replace(row, ffn_norm="") if config.use_parallel_residual else row


def _opt(row: Family, config: Any) -> Family:
    return row if config.do_layer_norm_before else replace(row, stream_norms=True)


def _bloom(row: Family, config: Any) -> Family:
    return replace(row, stream_norms=bool(config.apply_residual_connection_post_layernorm))


def _bigcode(row: Family, config: Any) -> Family:
    return replace(row, one_group=True) if config.multi_query else replace(row, layout="by group")


def _falcon(row: Family, config: Any) -> Family:
    row = replace(row, slopes=bool(config.alibi))
    if not config.new_decoder_architecture and config.multi_query:
        row = replace(row, layout="stacked", one_group=True)
    if not (config.parallel_attn or config.new_decoder_architecture):
        return row
    two = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    return replace(row, attention_norm="ln_attn", ffn_norm="ln_mlp") if two == 2 else replace(row, ffn_norm="")


_LLAMA = Family()
_AFTER = replace(_LLAMA, attention_norm="", attention_after="post_attention_layernorm", ffn_norm="")
_AFTER = replace(_AFTER, ffn_after="post_feedforward_layernorm")
_AROUND = replace(_AFTER, attention_norm="input_layernorm", ffn_norm="pre_feedforward_layernorm")
_GEMMA = replace(_AROUND, logit_cap="final_logit_softcapping")
_GPT2 = Family(
    blocks="transformer.h",
    readout=("transformer.ln_f",),
    attention="attn",
    attention_norm="ln_1",
    attention_inputs=("c_attn",),
    attention_output="c_proj",
    layout="stacked",
    counts=(("num_heads", "queries"), ("split_size", "channels")),
    ffn_norm="ln_2",
    up="c_fc",
    gate=None,
    down="c_proj",
    depth="n_layer",
    d_ffn="n_inner",
    groups="",
)
_BLOOM = Family(
    blocks="transformer.h",
    readout=("transformer.ln_f",),
    attention="self_attention",
    attention_inputs=("query_key_value",),
    attention_output="dense",
    layout="by group",
    counts=(("num_heads", "queries"),),
    up="dense_h_to_4h",
    gate=None,
    down="dense_4h_to_h",
    depth="n_layer",
    d_ffn="",
    groups="",
    adds=True,
    slopes=True,
    tuples=True,
    adapt=_bloom,
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, counts=(("num_heads", "queries"),), adapt=_bigcode),
    "gpt_neo": replace(
        _GPT2,
        attention="attn",
        attention_inputs=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        attention_output="attention.out_proj",
        layout="apart",
        counts=(("attention.num_heads", "queries"),),
        depth="num_layers",
        d_ffn="intermediate_size",
        tuples=True,
    ),
    "gptj": replace(
        _GPT2,
        attention_inputs=("q_proj", "k_proj", "v_proj"),
        attention_output="out_proj",
        layout="apart",
        counts=(("num_attention_heads", "queries"),),
        ffn_norm="",
        up="fc_in",
        down="fc_out",
        tuples=True,
    ),
    "gpt_neox": replace(
        _BLOOM,
        blocks="gpt_neox.layers",
        readout=("gpt_neox.final_layer_norm",),
        attention="attention",
        counts=(),
        depth="num_hidden_layers",
        d_ffn="intermediate_size",
        adds=False,
        slopes=False,
        tuples=False,
        adapt=_as_written,
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        readout=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        attention_norm="self_attn_layer_norm",
        attention_output="out_proj",
        counts=(("num_heads", "queries"),),
        ffn="",
        ffn_norm="final_layer_norm",
        up="fc1",
        gate=None,
        down="fc2",
        act="activation_fn",
        d_ffn="ffn_dim",
        groups="",
        adapt=_opt,
    ),
    "bloom": _BLOOM,
    "falcon": replace(
        _BLOOM,
        depth="num_hidden_layers",
        d_ffn="ffn_hidden_size",
        counts=(("num_heads", "queries"), ("num_kv_heads", "groups")),
        groups="num_kv_heads",
        adds=False,
        adapt=_falcon,
    ),
    "mpt": replace(
        _BLOOM,
        blocks="transformer.blocks",
        readout=("transformer.norm_f",),
        attention="attn",
        attention_norm="norm_1",
        attention_inputs=("Wqkv",),
        attention_output="out_proj",
        layout="stacked",
        counts=(("n_heads", "queries"),),
        ffn="ffn",
        ffn_norm="norm_2",
        up="up_proj",
        down="down_proj",
        depth="n_layers",
        adapt=_as_written,
    ),
    "phi": replace(
        _LLAMA,
        readout=("model.final_layernorm",),
        attention_output="dense",
        ffn_norm="",
        up="fc1",
        gate=None,
        down="fc2",
    ),
    "phi3": replace(
        _LLAMA,
        attention_inputs=("qkv_proj",),
        layout="stacked",
        counts=(("config.num_attention_heads", "queries"), ("num_key_value_heads", "groups")),
        up="gate_up_proj",
        gate="gate_up_proj",
    ),
    "stablelm": replace(_LLAMA, counts=(("num_heads", "queries"), ("num_key_value_heads", "groups")), adapt=_stablelm),
    "starcoder2": replace(_LLAMA, up="c_fc", gate=None, down="c_proj"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_5_text": replace(_LLAMA, mixers=(("linear_attn", "out_proj"),)),
    "smollm3": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _AFTER,
    "olmo3": _AFTER,
    "exaone4": _AFTER,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": replace(_LLAMA, residual="residual_multiplier", logit_divisor="logits_scaling"),
    "cohere": replace(_LLAMA, ffn_norm="", logit_scale="logit_scale"),
    "glm4": replace(
        _LLAMA,
        attention_after="post_self_attn_layernorm",
        ffn_after="post_mlp_layernorm",
        up="gate_up_proj",
        gate="gate_up_proj",
    ),
    "nemotron": replace(_LLAMA, gate=None),
    "nanochat": replace(_LLAMA, up="fc1", gate=None, down="fc2", logit_cap="final_logit_softcapping"),
}
"""By `config.model_type`."""


_OWN = "_layerfold_family"
"""Where a model keeps a row that its architecture does not have."""


def remember_(model: PreTrainedModel, row: Family) -> None:
    """Give a model a row of its own, which copies of it have too."""
    setattr(model, _OWN, row)


def family_of(model: PreTrainedModel) -> Family:
    """Return the row of a model: its own, or that of its architecture, as configured.

    Raises:
        ModelError: it has none, and its architecture neither.
    """
    found: Family | None = getattr(model, _OWN, None)
    if found is not None:
        return found
    name = model.config.model_type
    if name not in FAMILIES:
        raise ModelError(f"unsupported architecture {one_of(name, FAMILIES)}, or another decoder")
    row = FAMILIES[name]
    return row.adapt(row, model.config)
