"""Models without weights, for their structure alone."""

from __future__ import annotations

from layerfold.checkpoint.save import quiet
from layerfold.model.admitted import Structure, structure_of
from layerfold.model.decoder import Decoder
from layerfold.model.families import FAMILIES


def structures() -> dict[str, Structure]:
    """Return the structure of each family, at its configuration's defaults, from a model without weights."""
    with quiet():
        return {name: structure_of(_outline(name)) for name in sorted(FAMILIES)}


def _outline(name: str) -> Decoder:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(name, **{FAMILIES[name].depth: 2})
    except Exception:  # what it says of each block is of another depth; each version has its own error for that
        config = AutoConfig.for_model(name)
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(config))
