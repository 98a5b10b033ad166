"""GGUF files, as llama.cpp reads them: a dense model's weights, its shape and its tokenizer, in one file.

Written through the package `gguf`, which knows the names of tensors and settings. What llama.cpp wants otherwise than
transformers holds it is here: `_Arch`. The file is read back before it replaces anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint import structure
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weights import in_dtype
from layerfold.errors import InputError, MissingExtraError, OutputError, one_of
from layerfold.files import replacing
from layerfold.model import deltas
from layerfold.model.decoder import Decoder

DTYPES = {"float32": torch.float32, "float16": torch.float16}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""


@dataclass(frozen=True)
class _Arch:
    """What llama.cpp calls an architecture, and wants otherwise than transformers holds it.

    Attributes:
        name: GGUF's.
        pairs: whether the two channels that a rotation turns together lie side by side in queries and keys, not half a
            head apart.
        norm: what is added to the weights of norms.
        rms: whether norms are by the root mean square.
        window: whether it has a sliding window.
    """

    name: str
    pairs: bool = False
    norm: float = 0.0
    rms: bool = True
    window: bool = False


_ARCHS = {
    "gpt2": _Arch("gpt2", rms=False),
    "llama": _Arch("llama", pairs=True),
    "mistral": _Arch("llama", pairs=True),
    "qwen2": _Arch("qwen2"),
    "qwen3": _Arch("qwen3"),
    "gemma2": _Arch("gemma2", norm=1.0, window=True),
    "gemma3_text": _Arch("gemma3", norm=1.0, window=True),
    "starcoder2": _Arch("starcoder2", rms=False),
}
"""By `config.model_type`; each is read back by transformers in the tests."""


def save_gguf(model: Model, file: Path, dtype: str = "float32", *, overwrite: bool = False) -> None:
    """Write a model as a GGUF file, and read it back.

    Args:
        dtype: of the matrices, ``float32`` or ``float16``; vectors are always float32.
        overwrite: replace a file.

    Raises:
        InputError: an architecture, a dtype or a tokenizer that is not written.
        MissingExtraError: the package `gguf` is not installed.
        OutputError: the file is there and `overwrite` is off, or it reads back with other contents.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    kind = model.decoder.model.config.model_type
    if kind not in _ARCHS:
        raise InputError(f"GGUF of a {one_of(kind, _ARCHS)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype {one_of(dtype, DTYPES)}")
    if file.exists() and not overwrite:
        raise OutputError(f"{str(file)!r} is there already; --overwrite replaces it")
    arch = _ARCHS[kind]
    decoder = deltas.multiplied_out(model.decoder)
    tensors = dict(_tensors(decoder, arch, DTYPES[dtype]))
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, arch.name)
        _write_shape(writer, decoder, arch, dtype)
        if model.tokenizer is not None:
            _write_tokenizer(writer, model)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(gguf.GGUFReader(temporary), tensors)


def _tensors(decoder: Decoder, arch: _Arch, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors by GGUF's names, (out, in)."""
    import gguf

    enum = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(enum, decoder.n_blocks)
    state = structure.filled(decoder.model, decoder.model.state_dict())
    tied = structure.aliases(decoder.model)
    turned = {f"{path}.weight" for path, each in decoder.model.named_modules() if type(each).__name__ == "Conv1D"}
    heads = _rotated(decoder, arch)
    for own, tensor in state.items():
        if own in tied and own in decoder.model.all_tied_weights_keys:
            continue
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"GGUF has no name for {own!r} of a {arch.name}")
        whole = tensor.detach().float().cpu()
        if own in turned:
            whole = whole.T
        if (count := heads.get(own.rpartition(".")[0])) is not None:
            whole = _paired(whole, count)
        if arch.norm and own.endswith("norm.weight"):
            whole = whole + arch.norm
        kept = whole if whole.ndim == 1 else in_dtype(own, whole, dtype)
        yield name, kept.contiguous().numpy()


def _rotated(decoder: Decoder, arch: _Arch) -> dict[str, int]:
    """Return the paths of the matrices whose rows are put pair by pair, with their numbers of heads."""
    if not arch.pairs:
        return {}
    said, path = decoder.configured, decoder.family.blocks
    counts = {"q_proj": said.query_heads, "k_proj": said.groups}
    each = ((index, name, count) for index in range(decoder.n_blocks) for name, count in counts.items())
    return {f"{path}.{index}.{decoder.family.attention}.{name}": count for index, name, count in each}


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Put channel i of the first half of each head beside channel i of its second half."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _write_shape(writer: Any, decoder: Decoder, arch: _Arch, dtype: str) -> None:
    import gguf

    config, said = decoder.model.config, decoder.configured
    attention = next((block.attention for block in decoder.blocks if block.heads), None)
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.d_model)
    writer.add_block_count(decoder.n_blocks)
    writer.add_feed_forward_length(said.d_ffn)
    writer.add_head_count(said.query_heads)
    writer.add_head_count_kv(said.groups)
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_F16)
    epsilon = next(getattr(config, name) for name in _EPSILONS if hasattr(config, name))
    (writer.add_layer_norm_rms_eps if arch.rms else writer.add_layer_norm_eps)(float(epsilon))
    if attention is not None and arch.name != "gpt2":
        writer.add_key_length(attention.d_head)
        writer.add_value_length(attention.d_head)
        writer.add_rope_dimension_count(attention.d_head)
    if (theta := _theta(getattr(config, "rope_parameters", None))) is not None:
        writer.add_rope_freq_base(theta)
    if arch.window and config.sliding_window:
        writer.add_sliding_window(int(config.sliding_window))


_EPSILONS = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps")


def _theta(parameters: Any) -> float | None:
    """Return the base of the rotations; of kinds of layers, that of full attention."""
    if not isinstance(parameters, Mapping):
        return None
    said = parameters.get("full_attention", parameters)
    return float(said["rope_theta"]) if "rope_theta" in said else None


def _write_tokenizer(writer: Any, model: Model) -> None:
    """Write a byte-level BPE.

    Raises:
        InputError: another kind.
    """
    tokenizer = model.require_tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    steps = _steps(document.get("pre_tokenizer"))
    if document["model"]["type"] != "BPE" or "ByteLevel" not in [step["type"] for step in steps]:
        raise InputError(f"GGUF with a tokenizer of kind {document['model']['type']}; accepted: BPE of bytes")
    rows = int(model.decoder.model.config.vocab_size)
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [_UNUSED] * rows
    for token, index in document["model"]["vocab"].items():
        tokens[index], kinds[index] = token, _NORMAL
    for each in document["added_tokens"]:
        tokens[each["id"]], kinds[each["id"]] = each["content"], _CONTROL if each["special"] else _USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(steps))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(int(index))
    writer.add_add_bos_token(False)


def _steps(pre: Any) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer."""
    if pre is None:
        return []
    steps: list[dict[str, Any]] = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return steps


def _pre(steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name of a pre-tokenizer; ``default`` for one that it may have under another name."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and r"\p{N}|" in str(steps[0]["pattern"]):
        return "qwen2"
    return "default"


def _check(reader: Any, wanted: Mapping[str, np.ndarray]) -> None:
    """Raise OutputError where a file's tensors are others than these, bit for bit."""
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    if found.keys() != wanted.keys():
        raise OutputError(f"the GGUF reads back with {len(found)} tensors, not {len(wanted)}")
    for name, tensor in wanted.items():
        if found[name].tobytes() != tensor.tobytes():
            raise OutputError(f"the GGUF reads back with other values of {name!r}")
