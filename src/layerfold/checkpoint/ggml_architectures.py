"""The architectures of llama.cpp, and what it computes of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerfold.checkpoint.structure import lacking
from layerfold.errors import InputError, one_of
from layerfold.model.decoder import Decoder


@dataclass(frozen=True)
class Arch:
    """What llama.cpp calls an architecture, and wants otherwise than transformers holds it.

    Attributes:
        name: GGUF's.
        pairs: whether the two channels that a rotation turns together lie side by side in queries and keys, not half a
            head apart.
        norm: what is added to the weights of norms.
        rms: whether norms are by the root mean square.
        period: each which block has full attention, the others a sliding window; 1 where all have it.
        unrotated: each which block has no rotary positions; 0 where all have them.
        unequal: GGUF's name of an architecture that computes the same, and gives each block sizes of its own.
        square: whether heads have to take the whole width together.
        tied: whether embedding and LM head have to be one matrix, or two; None where both will do.
        may: settings that may differ from the family's default, beside `_WRITTEN`.
    """

    name: str
    pairs: bool = False
    norm: float = 0.0
    rms: bool = True
    period: int = 1
    unrotated: int = 0
    unequal: str = ""
    square: bool = True
    tied: bool | None = None
    may: tuple[str, ...] = ()

    @property
    def by_block(self) -> bool:
        """Whether each block has sizes of its own."""
        return self.name == self.unequal


_BIASES = ("attention_bias", "mlp_bias")
ARCHITECTURES = {
    "gpt2": Arch("gpt2", rms=False),
    "gpt_bigcode": Arch("starcoder", rms=False, may=("multi_query",)),
    "gpt_neox": Arch("gptneox", rms=False, tied=False, may=("use_parallel_residual",)),
    "falcon": Arch("falcon", rms=False, may=("multi_query", "new_decoder_architecture", "num_ln_in_parallel_attn")),
    "phi": Arch("phi2", rms=False, tied=False),
    "phi3": Arch("phi3"),
    "stablelm": Arch("stablelm", rms=False, tied=False, may=("use_parallel_residual", "use_qkv_bias")),
    "starcoder2": Arch("starcoder2", rms=False),
    "llama": Arch("llama", pairs=True, unequal="deci", square=False, may=_BIASES),
    "mistral": Arch("llama", pairs=True, unequal="deci", square=False),
    "qwen2": Arch("qwen2", unequal="deci"),
    "qwen3": Arch("qwen3", square=False),
    "smollm3": Arch("smollm3", pairs=True, unrotated=4, square=False),
    "gemma": Arch("gemma", norm=1.0, square=False, tied=True),
    "gemma2": Arch("gemma2", norm=1.0, period=2, square=False, tied=True),
    "gemma3_text": Arch("gemma3", norm=1.0, period=6, square=False, tied=True),
    "olmo": Arch("olmo", pairs=True, rms=False),
    "olmo2": Arch("olmo2", tied=False),
    "olmo3": Arch("olmo2", period=4, tied=False),
    "granite": Arch("granite", pairs=True, square=False, may=_BIASES),
    "cohere": Arch("command-r", rms=False, tied=True),
    "glm4": Arch("glm4", square=False, may=_BIASES),
    "nemotron": Arch("nemotron", norm=1.0, rms=False, tied=False),
}
"""By `config.model_type`; llama.cpp itself computes the same from each in the tests."""


def named(kind: str) -> str:
    """Return GGUF's name of a family, and that for blocks of unequal sizes; empty where layerfold writes none."""
    arch = ARCHITECTURES.get(kind)
    return "" if arch is None else f"{arch.name}; {arch.unequal} for unequal blocks" if arch.unequal else arch.name


def architecture(decoder: Decoder) -> Arch:
    """Return the architecture to write: that for unequal blocks where they are so, and there is one.

    Raises:
        InputError: there is none, or llama.cpp computes something else than this configuration says.
    """
    config, kind = decoder.model.config, decoder.model.config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(f"GGUF of a {one_of(kind, ARCHITECTURES)}")
    arch, depth = ARCHITECTURES[kind], decoder.n_blocks
    if not any(decoder.heads):
        raise InputError(f"GGUF of a {kind} without any attention")
    for name, (said, default) in _others(config, arch).items():
        raise InputError(f"GGUF of this {kind}: {name} {said!r}; llama.cpp computes {default!r}")
    if arch.tied not in (None, bool(config.tie_word_embeddings)):
        raise InputError(f"GGUF of this {kind}: tie_word_embeddings {not arch.tied}; llama.cpp reads {arch.tied}")
    windows = (
        getattr(config, "layer_types", None) or ["sliding_attention" if window(config) else "full_attention"] * depth
    )
    for index, said in enumerate(windows[:depth]):
        wanted = "full_attention" if (index + 1) % arch.period == 0 else "sliding_attention"
        if said != wanted and (arch.period > 1 or (window(config) or decoder.context) < decoder.context):
            raise InputError(f"GGUF of this {kind}: block {index} has {said}, where llama.cpp computes {wanted}")
    unrotated = [index for index, each in enumerate(getattr(config, "no_rope_layers", None) or ()) if not each]
    if unrotated != [index for index in range(depth) if arch.unrotated and (index + 1) % arch.unrotated == 0]:
        raise InputError(f"GGUF of this {kind}: llama.cpp rotates the positions of other blocks than {unrotated}")
    scalar, heads = getattr(config, "query_pre_attn_scalar", None), getattr(config, "head_dim", None)
    if scalar != heads and scalar is not None:
        raise InputError(f"GGUF of this {kind}: query_pre_attn_scalar {scalar}; llama.cpp takes head_dim, {heads}")
    if any(_scaled(*each) for each in rotary(decoder).values()) or _types(config) - {"default"}:
        raise InputError(f"GGUF of this {kind}: its rotary frequencies are scaled, which is not written")
    square = not arch.square or _square(decoder)
    # llama.cpp looks for heads in the first block, and for something in the last.
    parts = decoder.removed_parts
    last_gone = depth - 1 in parts["attention"] and depth - 1 in parts["ffn"]
    if arch.unequal and (lacking(decoder) or not square) and decoder.heads[0] and not last_gone:
        return replace(arch, name=arch.unequal, pairs=True)
    if not square:
        raise InputError(f"GGUF of this {kind}: heads that do not take the whole width together")
    return arch


_WRITTEN = {
    *("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_hidden_size", "num_hidden_layers"),
    *("n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim", "n_ctx"),
    *("max_position_embeddings", "n_positions", "rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps"),
    *("norm_eps", "rope_parameters", "partial_rotary_factor", "rotary_pct", "tie_word_embeddings", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
    *("query_pre_attn_scalar", "original_max_position_embeddings", "sliding_window_pattern"),
}
"""Settings that are written, or checked by themselves."""

SCALES = {
    "attn_logit_softcapping": ["attn_logit_softcapping"],
    "final_logit_softcapping": ["final_logit_softcapping"],
    "attention_scale": ["attention_multiplier"],
    "embedding_scale": ["embedding_multiplier"],
    "residual_scale": ["residual_multiplier"],
    "logit_scale": ["logits_scaling", "logit_scale"],
}
"""GGUF's settings, and transformers' names of each; None cannot be written."""

_NOTHING = re.compile(
    "drop|_token_id|summary|initializer|output_|label|return_|cache|version|dtype|name|architectures|task|pretraining|"
    "chunk|tie_last|implementation|^is_|cross_attention|problem|prefix|reorder|upcast|model_type|lora|tp_plan"
)
"""Settings that change no logit."""


def _others(config: Any, arch: Arch) -> dict[str, tuple[Any, Any]]:
    """Return the settings that llama.cpp does not know, where they differ from the family's default, with that."""
    said, default = config.to_dict(), type(config)().to_dict()
    scales = {name for names in SCALES.values() for name in names if said.get(name) is not None}
    known = _WRITTEN | scales | set(arch.may)
    return {
        name: (said[name], value)
        for name, value in default.items()
        if name not in known and not _NOTHING.search(name) and name in said and said[name] != value
    }


def _types(config: Any) -> set[str]:
    """Return the types of scaling of the rotary frequencies, by kind of layer."""
    said = getattr(config, "rope_parameters", None) or {}
    each = [said, *(value for value in said.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in each if "rope_type" in entry}


def _square(decoder: Decoder) -> bool:
    attention = next(block.attention for block in decoder.blocks if block.heads)
    return decoder.configured.query_heads * attention.d_head == decoder.d_model


def window(config: Any) -> int | None:
    """Return the length of the sliding window, in tokens, where one is used."""
    used = getattr(config, "use_sliding_window", True)
    window: int | None = getattr(config, "sliding_window", None) if used else None
    return window


def rotary(decoder: Decoder) -> dict[str, tuple[Tensor, float]]:
    """Return the frequencies of the rotations, (rotated channels / 2,), and their base, by kind of layer."""
    found = {}
    for name, buffer in decoder.model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            said, kind = decoder.model.config.rope_parameters, name.rpartition(".")[2].removesuffix("_inv_freq")
            found[kind] = buffer, float(said.get(kind, said)["rope_theta"])
    return found


def _scaled(frequencies: Tensor, base: float) -> bool:
    plain = base ** -(torch.arange(len(frequencies)).to(frequencies) / len(frequencies))
    return not torch.allclose(frequencies, plain, rtol=1e-4)
