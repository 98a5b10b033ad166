"""Where models come from: the embedded one, a folder, a GGUF file, the Hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerfold import checkpoint, compact, structure
from layerfold.decoder import Decoder
from layerfold.errors import (
    InputError,
    LayerfoldError,
    MissingExtraError,
    ModelError,
    OfflineError,
    first_line,
    nearest,
)
from layerfold.families import FAMILIES, family_of
from layerfold.network import hub_reachable
from layerfold.records import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POCKET = "pocket"
_POCKET_FOLDER = Path(__file__).parent / "pocket"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from and what was done to it.

    Attributes:
        base: the name that the first model in the chain was loaded by.
        revision: the Hub's commit, where it came from there.
        base_sha256: hash of the base's weights as loaded.
        steps: what was done to it, in order: each the resolved method, what calibrated it, its seed and notes.
        versions: of layerfold and what it stands on, when it was last written.
    """

    base: str
    revision: str | None = None
    base_sha256: str | None = None
    steps: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """Return what ``layerfold.json`` keeps."""
        return {**self.__dict__, "steps": list(self.steps), "versions": versions()}


@dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer and where it comes from."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    provenance: Provenance

    @property
    def name(self) -> str:
        """The base's name, and what was done to it."""
        done = [step["method"]["name"] for step in self.provenance.steps]
        return self.provenance.base + (f" after {', '.join(done)}" if done else "")

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights as they were when first asked for."""
        return checkpoint.hash_weights(self.decoder.model)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ModelError: the model came without one.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"the model {self.provenance.base!r} has no tokenizer, and text cannot be read without one"
            )
        return self.tokenizer

    def with_step(self, step: dict[str, Any]) -> Model:
        """Return this model with a step added to its provenance."""
        provenance = replace(self.provenance, steps=(*self.provenance.steps, step))
        return Model(self.decoder, self.tokenizer, provenance)

    def copy(self) -> Model:
        """Return a model whose decoder can be edited while this one stays."""
        return Model(self.decoder.copy(), self.tokenizer, self.provenance)

    def save(self, directory: Path | str, *, format: checkpoint.Format = "dense", overwrite: bool = False) -> None:
        """Write a checkpoint; see `checkpoint.save`."""
        checkpoint.save(
            self.decoder, self.tokenizer, Path(directory), self.provenance.to_json(), format=format, overwrite=overwrite
        )


def load(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Model:
    """Load a causal language model in float32.

    Args:
        name: ``pocket``, a checkpoint folder (transformers' or either of layerfold's forms), a ``.gguf`` file, or an
            id on the Hub.
        revision: a branch, tag or commit on the Hub.
        trust_remote_code: run code that the checkpoint brings along.

    Raises:
        ModelError: an unsupported architecture; missing, damaged or non-finite weights.
        OfflineError: a Hub id that is neither cached nor reachable.
        MissingExtraError: a GGUF file without the package that reads it.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"model {str(name)[:60]!r}: {error}") from error
    options = {"trust_remote_code": trust_remote_code}
    with checkpoint.quiet():
        if str(name) == POCKET:
            model = _load_folder(POCKET, _POCKET_FOLDER, options)
        elif path.is_dir():
            model = _load_folder(str(name), path, options)
        elif path.suffix == ".gguf":
            model = _load_gguf(path, options)
        elif path.exists() or not _HUB_ID.fullmatch(str(name)):
            raise InputError(f"model {str(name)!r}; accepted: {POCKET}, an existing folder, a .gguf file, a Hub id")
        else:
            model = _load_hub(str(name), options | {"revision": revision})
    model.decoder.check_finite()
    return replace(
        model, provenance=replace(model.provenance, base_sha256=model.provenance.base_sha256 or model.sha256)
    )


def is_pocket(model: Model) -> bool:
    """Whether a model is the embedded one, or was made from it."""
    return model.provenance.base == POCKET


def default_corpus(model: Model) -> str:
    """Return the corpus that fits a model: pocket's own, or the one that GPT-2 studies use."""
    return "imdb" if is_pocket(model) else "wikitext/wikitext-2-raw-v1"


def _load_folder(name: str, folder: Path, options: dict[str, Any]) -> Model:
    manifest = checkpoint.read_manifest(folder)
    provenance = Provenance(name)
    if manifest is not None:
        known = manifest["provenance"]
        try:
            provenance = Provenance(**{**known, "steps": tuple(known["steps"])})
        except (TypeError, KeyError) as error:
            raise ModelError(f"{str(folder / structure.MANIFEST)!r} is damaged: {error}") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"the folder {str(folder)!r} holds no config.json: not a checkpoint")
    tokenizer = _tokenizer(str(folder), options) if _has_tokenizer(folder) else None
    if manifest is not None and manifest["format"] == "compact":
        with _as_model_errors(str(folder)):
            return Model(Decoder(compact.load(folder, manifest)), tokenizer, provenance)
    if not any(folder.glob("*.safetensors")):
        kinds = ", ".join(sorted({file.suffix for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".h5"}}))
        raise ModelError(
            f"the folder {str(folder)!r} holds no .safetensors weights{f' (only {kinds}, not loaded)' if kinds else ''}"
        )
    decoder = _from_pretrained(str(folder), options)
    if manifest is not None:
        checkpoint.restore_(decoder, manifest, folder)
    return Model(decoder, tokenizer, provenance)


def _load_gguf(path: Path, options: dict[str, Any]) -> Model:
    if not path.is_file():
        raise ModelError(f"no file at {str(path)!r}")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    options = options | {"gguf_file": path.name}
    folder = str(path.parent)
    decoder = _from_pretrained(folder, options)
    # The weights are plain float32 now, but transformers still refuses to save what came from a quantised file.
    quantizer = getattr(decoder.model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(decoder.model)
    return Model(decoder, _tokenizer(folder, options), Provenance(str(path)))


def _load_hub(name: str, options: dict[str, Any]) -> Model:
    options = options | {"local_files_only": not hub_reachable()}
    decoder = _from_pretrained(name, options)
    revision = getattr(decoder.model.config, "_commit_hash", None)
    return Model(decoder, _tokenizer(name, options), Provenance(name, revision=revision))


def _from_pretrained(source: str, options: dict[str, Any]) -> Decoder:
    from transformers import AutoConfig, AutoModelForCausalLM

    with _as_model_errors(source, offline=options.get("local_files_only", False)):
        # The architecture first: an encoder's weights need not be read to say that it is none of ours.
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type == compact.MODEL_TYPE:
            raise ModelError(f"{source!r} holds a compact checkpoint, and has no {structure.MANIFEST} that says so")
        family_of(config.model_type)
        quantised = {} if "gguf_file" in options else {"use_safetensors": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **quantised, **options
        )
    model, info = loaded
    # A constant that older GPT-2 checkpoints stored.
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
    return Decoder(model)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _as_model_errors(source, offline=options.get("local_files_only", False)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    return tokenizer


@contextlib.contextmanager
def _as_model_errors(source: str, offline: bool = False) -> Iterator[None]:
    """Say in one line what the libraries raise, in many kinds, for a checkpoint that cannot be read."""
    try:
        yield
    except LayerfoldError:
        raise
    except Exception as error:
        line = first_line(error)
        if offline:
            missing = f"the Hub cannot be reached, and {source!r} is neither a folder nor in the Hub's local cache"
            raise OfflineError(f"{missing}. {nearest(source, [POCKET])}".rstrip(". ")) from error
        known = f" (architectures: {', '.join(FAMILIES)})" if "model_type" in line else ""
        raise ModelError(f"the model {source!r} cannot be loaded: {line}{known}") from error
