"""The architectures of llama.cpp, and what it computes of each."""

from __future__ import annotations

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
    """

    name: str
    pairs: bool = False
    norm: float = 0.0
    rms: bool = True
    period: int = 1
    unrotated: int = 0
    unequal: str = ""

    @property
    def by_block(self) -> bool:
        """Whether each block has sizes of its own."""
        return self.name == self.unequal


ARCHITECTURES = {
    "gpt2": Arch("gpt2", rms=False),
    "gpt_bigcode": Arch("starcoder", rms=False),
    "gpt_neox": Arch("gptneox", rms=False),
    "falcon": Arch("falcon", rms=False),
    "phi": Arch("phi2", rms=False),
    "phi3": Arch("phi3"),
    "stablelm": Arch("stablelm", rms=False),
    "starcoder2": Arch("starcoder2", rms=False),
    "llama": Arch("llama", pairs=True, unequal="deci"),
    "mistral": Arch("llama", pairs=True, unequal="deci"),
    "qwen2": Arch("qwen2", unequal="deci"),
    "qwen3": Arch("qwen3"),
    "smollm3": Arch("smollm3", pairs=True, unrotated=4),
    "gemma": Arch("gemma", norm=1.0),
    "gemma2": Arch("gemma2", norm=1.0, period=2),
    "gemma3_text": Arch("gemma3", norm=1.0, period=6),
    "olmo": Arch("olmo", pairs=True, rms=False),
    "olmo2": Arch("olmo2"),
    "olmo3": Arch("olmo2", period=4),
    "granite": Arch("granite", pairs=True),
    "cohere": Arch("command-r", rms=False),
    "glm4": Arch("glm4"),
    "nemotron": Arch("nemotron", norm=1.0, rms=False),
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
    arch = ARCHITECTURES[kind]
    windows = getattr(config, "layer_types", None) or ["sliding_attention" if window(config) else "full_attention"] * 99
    for index, said in zip(range(decoder.n_blocks), windows, strict=False):
        wanted = "full_attention" if (index + 1) % arch.period == 0 else "sliding_attention"
        if said != wanted and (window(config) or decoder.context) < decoder.context:
            raise InputError(f"GGUF of this {kind}: block {index} has {said}, where llama.cpp computes {wanted}")
    unrotated = [index for index, each in enumerate(getattr(config, "no_rope_layers", None) or ()) if not each]
    if unrotated != [
        index for index in range(decoder.n_blocks) if arch.unrotated and (index + 1) % arch.unrotated == 0
    ]:
        raise InputError(f"GGUF of this {kind}: llama.cpp rotates the positions of other blocks than {unrotated}")
    scalar, heads = getattr(config, "query_pre_attn_scalar", None), getattr(config, "head_dim", None)
    if scalar != heads and scalar is not None:
        raise InputError(f"GGUF of this {kind}: query_pre_attn_scalar {scalar}; llama.cpp takes head_dim, {heads}")
    if any(_scaled(*each) for each in rotary(decoder).values()):
        raise InputError(f"GGUF of this {kind}: its rotary frequencies are scaled, which is not written")
    return replace(arch, name=arch.unequal, pairs=True) if arch.unequal and lacking(decoder) else arch


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
