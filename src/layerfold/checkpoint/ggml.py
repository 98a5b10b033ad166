"""GGUF files, as llama.cpp reads them: a dense model's weights, its shape and its tokenizer, in one file.

Written through the package `gguf`, which knows the names of tensors and settings. What llama.cpp wants otherwise than
transformers holds it is in `ggml_architectures`. The file is read back before it replaces anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint import structure
from layerfold.checkpoint.ggml_architectures import SCALES, Arch, architecture, rotary, window
from layerfold.checkpoint.ggml_tokenizer import write_tokenizer
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weights import in_dtype
from layerfold.errors import InputError, MissingExtraError, OutputError, one_of
from layerfold.files import replacing
from layerfold.model import deltas
from layerfold.model.decoder import Decoder

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def save_gguf(model: Model, file: Path, dtype: str = "float32", *, overwrite: bool = False) -> str:
    """Write a model as a GGUF file, and read it back.

    Where blocks have sizes of their own, llama.cpp has an architecture for some families that gives each block its own;
    the others' blocks are padded with zeros, as in a dense checkpoint.

    Args:
        dtype: of the matrices, ``float32`` or ``float16``; vectors are always float32.
        overwrite: replace a file.

    Returns:
        GGUF's name of the architecture.

    Raises:
        InputError: an architecture, a dtype or a tokenizer that is not written.
        MissingExtraError: the package `gguf` is not installed.
        OutputError: the file is there and `overwrite` is off, or it reads back with other contents.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    arch = architecture(model.decoder)
    if dtype not in DTYPES:
        raise InputError(f"dtype {one_of(dtype, DTYPES)}")
    if file.exists() and not overwrite:
        raise OutputError(f"{str(file)!r} is there already; --overwrite replaces it")
    decoder = deltas.multiplied_out(model.decoder)
    tensors = dict(_tensors(decoder, arch, DTYPES[dtype]))
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, arch.name)
        _write_shape(writer, decoder, arch, dtype)
        if model.tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            write_tokenizer(writer, model)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(gguf.GGUFReader(temporary), tensors)
    return arch.name


def _tensors(decoder: Decoder, arch: Arch, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors by GGUF's names, (out, in)."""
    import gguf

    enum = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(enum, decoder.n_blocks)
    state = decoder.model.state_dict()
    if arch.by_block:
        yield from _stubs(decoder)
    else:
        state = structure.filled(decoder.model, state)
    tied = structure.aliases(decoder.model).keys() & decoder.model.all_tied_weights_keys.keys()
    modules = decoder.model.named_modules()
    turned = {_in_any_block(f"{path}.weight") for path, each in modules if type(each).__name__ == "Conv1D"}
    order = _order(decoder, arch)
    for own, tensor in state.items():
        if own in tied:
            continue
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"GGUF has no name for {own!r} of a {arch.name}")
        whole = tensor.detach().float().cpu()
        if _in_any_block(own) in turned:
            whole = whole.T
        if (rows := order.get(own.rpartition(".")[0])) is not None:
            whole = whole[rows(len(whole))]
        if arch.norm and own.endswith("norm.weight"):
            whole = whole + arch.norm
        kept = whole if whole.ndim == 1 else in_dtype(own, whole, dtype)
        yield name, kept.contiguous().numpy()


def _in_any_block(name: str) -> str:
    """Return a tensor's name without its block's number: removed matrices are held as other blocks' are."""
    return re.sub(r"\.\d+\.", ".", name, count=1)


def _widths(decoder: Decoder) -> list[int]:
    """Return the number of neurons to write of each block.

    llama.cpp forgets the attention of a block that has no FFN, so such a block gets a few neurons that compute zero.
    """
    return [block.d_ffn or (0 if block.gone("attention") else _STUB) for block in decoder.blocks]


def _stubs(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yield those neurons."""
    for block, width in zip(decoder.blocks, _widths(decoder), strict=True):
        if width != block.d_ffn:
            yield f"blk.{block.index}.ffn_norm.weight", np.ones(decoder.d_model, np.float32)
            for name in ("gate", "up", "down"):
                shape = (decoder.d_model, width) if name == "down" else (width, decoder.d_model)
                yield f"blk.{block.index}.ffn_{name}.weight", np.zeros(shape, np.float32)


_STUB = 32


def _order(decoder: Decoder, arch: Arch) -> dict[str, Callable[[int], Tensor]]:
    """Return the paths of the matrices that GGUF holds in another order, and that order by number of rows."""
    family = decoder.family
    found: dict[str, Callable[[int], Tensor]] = {}
    attention = next((block.attention for block in decoder.blocks if block.heads), None)
    if attention is None:
        return {}
    d_head, group = attention.d_head, attention.channels + 2 * attention.d_head
    for index in range(decoder.n_blocks):
        at = f"{family.blocks}.{index}.{family.attention}."
        if arch.pairs:
            found |= {f"{at}{name}": lambda rows: _paired(rows, d_head) for name in ("q_proj", "k_proj")}
        if family.layout == "by group":
            found[f"{at}{family.attention_inputs[0]}"] = lambda rows: _stacked(rows, attention.channels, d_head, group)
    return found


def _paired(rows: int, d_head: int) -> Tensor:
    """Put channel i of the first half of each head beside channel i of its second half."""
    return torch.arange(rows).reshape(-1, 2, d_head // 2).transpose(1, 2).flatten()


def _stacked(rows: int, queries: int, d_head: int, group: int) -> Tensor:
    """Put the queries of all groups first, then their keys, then their values."""
    parts = torch.arange(rows).reshape(-1, group).split([queries, d_head, d_head], dim=1)
    return torch.cat([part.flatten() for part in parts])


def _write_shape(writer: Any, decoder: Decoder, arch: Arch, dtype: str) -> None:
    import gguf

    config, said = decoder.model.config, decoder.configured
    attention = next((block.attention for block in decoder.blocks if block.heads), None)
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.d_model)
    writer.add_block_count(decoder.n_blocks)
    if arch.by_block:
        queries = said.query_heads // said.groups
        writer.add_feed_forward_length(_widths(decoder))
        writer.add_head_count([queries * groups for groups in decoder.heads])
        writer.add_head_count_kv(list(decoder.heads))
    else:
        writer.add_feed_forward_length(said.d_ffn)
        writer.add_head_count(said.query_heads)
        writer.add_head_count_kv(said.groups)
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_F16)
    epsilon = next((getattr(config, name) for name in _EPSILONS if hasattr(config, name)), 1e-5)  # OLMo's is no setting
    (writer.add_layer_norm_rms_eps if arch.rms else writer.add_layer_norm_eps)(float(epsilon))
    if attention is not None and (found := rotary(decoder)):
        frequencies, base = found.get("full_attention") or next(iter(found.values()))
        writer.add_key_length(attention.d_head)
        writer.add_value_length(attention.d_head)
        writer.add_rope_dimension_count(2 * len(frequencies))
        writer.add_rope_freq_base(base)
        if (sliding := found.get("sliding_attention")) is not None:
            writer.add_rope_freq_base_swa(sliding[1])
    if arch.period > 1 and window(config):
        writer.add_sliding_window(int(config.sliding_window))
    if (parallel := getattr(config, "use_parallel_residual", None)) is not None:
        writer.add_parallel_residual(bool(parallel))
    for name, settings in SCALES.items():
        for value in (getattr(config, setting, None) for setting in settings):
            if value is not None:
                getattr(writer, f"add_{name}")(float(value))


_EPSILONS = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps", "norm_eps")


def _check(reader: Any, wanted: Mapping[str, np.ndarray]) -> None:
    """Raise OutputError where a file's tensors are others than these, bit for bit."""
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    if found.keys() != wanted.keys():
        raise OutputError(f"the GGUF reads back with {len(found)} tensors, not {len(wanted)}")
    for name, tensor in wanted.items():
        if found[name].tobytes() != tensor.tobytes():
            raise OutputError(f"the GGUF reads back with other values of {name!r}")
