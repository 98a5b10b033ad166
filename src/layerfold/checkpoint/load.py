"""Loading of models: the embedded one, a folder, a GGUF file, the Hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerfold.checkpoint import compact, structure, weights
from layerfold.checkpoint.card import licence_of
from layerfold.checkpoint.model import POCKET, POCKET_VERSION, Model, Stored
from layerfold.checkpoint.provenance import Provenance
from layerfold.checkpoint.save import hash_weights, quiet, read_manifest, restore_
from layerfold.checkpoint.weights import dtype_name
from layerfold.environment import AUTO, device_of, dtype_of, hub_reachable, offload_of
from layerfold.errors import (
    InputError,
    LayerfoldError,
    MissingExtraError,
    ModelError,
    OfflineError,
    OutputError,
    first_line,
    nearest,
    one_of,
)
from layerfold.memory import room
from layerfold.model.decoder import Decoder
from layerfold.model.families import FAMILIES
from layerfold.model.inferring import view
from layerfold.model.offload import map_, offload_

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POCKET_FOLDER = Path(__file__).parents[1] / "pocket"
_POCKET_LICENCE = "apache-2.0"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
) -> Model:
    """Load a causal language model; `Model.stored` has the dtype of its checkpoint.

    Args:
        name: ``pocket`` (``pocket@2``), a checkpoint folder (transformers' or either of layerfold's forms), a
            ``.gguf`` file, or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the checkpoint's own code.
        device: where it computes: see `device_of`.
        dtype: what it computes in: see `dtype_of`.
        offload: whether its weights wait in temporary files: see `offload_of`, and `model.offload`.

    Raises:
        InputError: an unknown name; a device or a dtype that there is not.
        ModelError: an unsupported architecture; missing, damaged, quantised or non-finite weights; an adapter.
        OfflineError: a Hub id that is neither cached nor reachable.
        OutputError: no room for weights that are to wait in files.
        MissingExtraError: a GGUF file without the package that reads it.
    """
    place = device_of(device)
    dtype_of(dtype, place, torch.float32)  # refused before anything is read
    offload = offload_of(offload)
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"model {str(name)[:60]!r}: {error}") from error
    options = {"trust_remote_code": trust_remote_code}
    with quiet():
        if str(name) in (POCKET, POCKET_VERSION):
            model = _load_folder(POCKET_VERSION, _POCKET_FOLDER, options)
        elif str(name).startswith(f"{POCKET}@"):
            raise InputError(f"model {str(name)!r}; accepted: {POCKET_VERSION}, the version that is embedded")
        elif path.is_dir():
            model = _load_folder(str(name), path, options)
        elif path.suffix == ".gguf":
            model = _load_gguf(path, options)
        elif str(name).startswith((".", "~", os.sep)) and not path.exists():
            raise InputError(f"no folder at {str(name)!r}; {nearest(path.name, _beside(path))}".rstrip("; "))
        elif path.exists() or not _HUB_ID.fullmatch(str(name)):
            raise InputError(f"model {str(name)!r}; accepted: {POCKET}, an existing folder, a .gguf file, a Hub id")
        else:
            model = _load_hub(str(name), options | {"revision": revision})
    model.decoder.check_finite()
    provenance = replace(model.provenance, base_sha256=model.provenance.base_sha256 or model.sha256)
    in_dtype, stored = dtype_of(dtype, place, model.saved_dtype), model.stored
    apart = _waits(model.decoder, place, in_dtype, offload)
    if apart:
        try:
            map_(model.decoder.model if place.type == "cpu" else torch.nn.ModuleList(_blocks(model.decoder)))
        except OutputError:
            if offload != AUTO:
                raise  # else what has no room in files stays in memory
    if model.decoder.dtype != in_dtype:
        own = None if torch.promote_types(model.decoder.dtype, in_dtype) == in_dtype else model.sha256
        weights.cast_(model.decoder.model, in_dtype)
        if own is not None:
            stored = replace(stored, rounded=(hash_weights(model.decoder.model), own))
    if apart and place.type != "cpu":
        offload_(model.decoder.model, _blocks(model.decoder), place)
    else:
        model.decoder.model.to(place)
    return replace(model, provenance=provenance, stored=stored)


def _blocks(decoder: Decoder) -> list[torch.nn.Module]:
    return [block.module for block in decoder.blocks]


def _waits(decoder: Decoder, device: torch.device, dtype: torch.dtype, offload: str) -> bool:
    """Whether weights are to wait in files: ``auto`` lets them where they and a copy do not fit in the free memory.

    Of a GPU's memory they may take four fifths: most methods need no copy.
    """
    if offload != AUTO:
        return offload == "always"
    weights: int = dtype.itemsize * sum(each.numel() for each in decoder.model.parameters())
    return 2 * weights > room.available() if device.type == "cpu" else 1.25 * weights > room.free(device)


def load_beside(model: Model, name: str | Path, *, revision: str | None = None) -> Model:
    """Load a model to where another one computes, in the same dtype; see `load`."""
    decoder, offload = model.decoder, "always" if model.decoder.offloaded else None
    return load(name, revision=revision, device=str(decoder.device), dtype=dtype_name(decoder.dtype), offload=offload)


def _beside(path: Path) -> list[str]:
    """Return the names of the folders beside a path."""
    try:
        return [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return []


def _load_folder(name: str, folder: Path, options: dict[str, Any]) -> Model:
    manifest = read_manifest(folder)
    provenance = Provenance(name, location=None if name == POCKET_VERSION else str(folder.resolve()))
    if manifest is not None:
        try:
            provenance = Provenance.from_json(manifest["provenance"], folder)
        except (TypeError, KeyError) as error:
            raise structure.damaged(folder, error) from error
    _check_no_adapter(str(folder), (folder / "adapter_config.json").is_file())
    if not (folder / "config.json").is_file():
        raise ModelError(f"the folder {str(folder)!r} holds no config.json: not a checkpoint")
    weights.check_pointers(folder / name for name in ("config.json", *_TOKENIZER_FILES))
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = _tokenizer(str(folder), options) if has_tokenizer else None
    if manifest is not None and manifest["format"] == "compact":
        with _as_model_errors(str(folder)):
            model = compact.load(folder, manifest)
            stored = Stored(model.dtype, weights.tokenizer_class(str(folder), options), licence_of(folder))
            return Model(view(model), tokenizer, provenance, stored)
    if not any(folder.glob("*.safetensors")):
        kinds = ", ".join(sorted({file.suffix for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".h5"}}))
        raise ModelError(
            f"the folder {str(folder)!r} holds no .safetensors weights{f' (only {kinds}, not loaded)' if kinds else ''}"
        )
    decoder, stored = _from_pretrained(str(folder), options)
    if manifest is not None:
        restore_(decoder, manifest, folder)
    licence = _POCKET_LICENCE if folder == _POCKET_FOLDER else licence_of(folder)
    return Model(decoder, tokenizer, provenance, replace(stored, licence=licence))


def _check_no_adapter(source: str, found: bool) -> None:
    """Raise ModelError for an adapter: transformers applies it only where peft is installed."""
    if found:
        raise ModelError(
            f"{source!r} holds an adapter (adapter_config.json), which is not applied; accepted: a model merged with "
            "its adapter (peft's merge_and_unload), or the weights without that file"
        )


def _load_gguf(path: Path, options: dict[str, Any]) -> Model:
    if not path.is_file():
        raise ModelError(f"no file at {str(path)!r}")
    weights.check_pointers([path])
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    options = options | {"gguf_file": path.name}
    folder = str(path.parent)
    decoder, stored = _from_pretrained(folder, options)
    # The weights are plain float32 now, but transformers refuses to save a model from a quantised file.
    quantizer = getattr(decoder.model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(decoder.model)
    provenance = Provenance(str(path), location=str(path.resolve()))
    return Model(decoder, _tokenizer(folder, options), provenance, stored)


def _load_hub(name: str, options: dict[str, Any]) -> Model:
    options = options | {"local_files_only": not hub_reachable()}
    if (folder := _layerfolds(name, options)) is not None:
        model = _load_folder(name, folder, {"trust_remote_code": options["trust_remote_code"]})
        return replace(model, provenance=replace(model.provenance, location=None))  # of the machine that it came from
    decoder, stored = _from_pretrained(name, options)
    revision = getattr(decoder.model.config, "_commit_hash", None)
    return Model(decoder, _tokenizer(name, options), Provenance(name, revision=revision), stored)


def _layerfolds(name: str, options: dict[str, Any]) -> Path | None:
    """Return the folder of a checkpoint on the Hub that layerfold wrote; None where it wrote none of that name."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    where = {"revision": options["revision"], "local_files_only": options["local_files_only"]}
    try:
        hf_hub_download(name, structure.MANIFEST, **where)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None  # what is wrong shows when its configuration is read
    with _as_model_errors(name, offline=options["local_files_only"]):
        return Path(snapshot_download(name, **where))


def _from_pretrained(source: str, options: dict[str, Any]) -> tuple[Decoder, Stored]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from_gguf = "gguf_file" in options
    with _as_model_errors(source, offline=options.get("local_files_only", False)):
        # The architecture first: an unsupported one is refused before its weights are read.
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type == compact.MODEL_TYPE:
            raise ModelError(f"{source!r} holds a compact checkpoint without its {structure.MANIFEST}")
        check_architecture(config)
        if from_gguf and config.model_type == "gpt2":
            config.n_positions = config.n_ctx  # which transformers reads there, and builds nothing from
        if from_gguf:
            stored, read_in = Stored(), torch.float32
        else:
            weights.check_plain(source, config)
            _check_no_adapter(source, weights.find(source, "adapter_config.json", options) is not None)
            files = weights.find_weights(source, options)
            weights.check_pointers(files)
            kept, uniform = weights.stored_dtype(files)
            stored = Stored(kept, weights.tokenizer_class(source, options))
            read_in = kept if uniform else torch.float32  # which holds every number of the others
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=read_in,
            output_loading_info=True,
            **({} if from_gguf else {"use_safetensors": True}),
            **options,
        )
    model, info = loaded
    # A constant in older GPT-2 checkpoints.
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not key.endswith(".attn.masked_bias")}
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    }
    if wrong:
        said = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:3])} ({len(names)})" for kind, names in wrong.items()
        )
        raise ModelError(f"the weights of {source!r} do not fit its configuration: {said}")
    model.eval()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(config, "tie_word_embeddings", False) and head is not None and head.weight is not table.weight:
        # The files hold two tensors. transformers 5 keeps both in any case, 4.x only without this setting.
        model.config.tie_word_embeddings = False
    return view(model), stored


def check_architecture(config: Any) -> None:
    """Refuse, before any weight is read, what is no causal language model.

    Raises:
        ModelError: an encoder, an encoder-decoder, a model of images.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = config.model_type
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    loads = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) or (own or "")
    if name in FAMILIES or str(loads).endswith("ForCausalLM"):
        return
    kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "no causal language model"
    if hasattr(config, "vision_config"):
        kind = "a model of images and text"
    raise ModelError(f"unsupported architecture {one_of(name, FAMILIES)}, or another decoder; this is {kind}")


def _tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _as_model_errors(source, offline=options.get("local_files_only", False)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    return tokenizer


@contextlib.contextmanager
def _as_model_errors(source: str, offline: bool = False) -> Iterator[None]:
    """Turn the libraries' many kinds of errors for an unreadable checkpoint into one line."""
    try:
        yield
    except LayerfoldError:
        raise
    except Exception as error:
        line = first_line(error)
        if offline:
            missing = f"the Hub cannot be reached, and {source!r} is neither a folder nor in the Hub's local cache"
            near = nearest(source, [POCKET, *_beside(Path(source))])
            raise OfflineError(f"{missing}; {near}".rstrip("; ")) from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source!r} brings code of its own, which is not run; accepted: --trust-remote-code "
                "(trust_remote_code=True from Python), once you have read that code"
            ) from error
        known = f" (architectures: {', '.join(FAMILIES)})" if "model_type" in line else ""
        raise ModelError(f"the model {source!r} cannot be loaded: {line}{known}") from error
