"""Which programs read a checkpoint: transformers by running it, others by what they build from a configuration."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerfold.checkpoint.ggml_architectures import architecture
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import quiet, read_manifest
from layerfold.checkpoint.structure import lacking
from layerfold.errors import InputError, last_line
from layerfold.model.deltas import ranks

Answer = Literal["loads", "loads padded", "should load", "should load padded", "does not load", "differs"]
_TOKENS, _NEW = 8, 5
_CLOSE = 1e-4
"""Largest difference of logits, as a share of the largest, that another order of sums makes."""
_PROCESS = f"""
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, place = sys.argv[1:]
ids = load_file(place + "/ids.safetensors")["ids"]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
options = dict(do_sample=False, min_new_tokens={_NEW}, max_new_tokens={_NEW}, pad_token_id=0)
options["attention_mask"] = torch.ones_like(ids)
with torch.no_grad():
    logits = model(input_ids=ids).logits.contiguous()
    texts = [model.generate(ids, use_cache=cached, **options).tolist() for cached in (True, False)]
save_file(dict(logits=logits), place + "/logits.safetensors")
wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info.get(kind) or ()]
same = texts[0] == texts[1]
found = dict(parameters=model.num_parameters(), same_text=same, wrong=sorted(map(str, wrong)))
assert "layerfold" not in sys.modules
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Reader:
    """What a program makes of a checkpoint.

    Attributes:
        name: the program's.
        answer: whether it loads it; ``should`` where it was not run.
        why: in a sentence.
    """

    name: str
    answer: Answer
    why: str


@dataclass(frozen=True)
class Checked:
    """A checkpoint, and what reads it.

    Attributes:
        format: ``dense`` or ``compact``.
        parameters: number of distinct ones.
        stored: number of those in the files.
        bytes: of the files of weights.
        readers: by program.
        warnings: what does not fit together.
    """

    format: str
    parameters: int
    stored: int
    bytes: int
    readers: tuple[Reader, ...]
    warnings: tuple[str, ...]


def check(folder: Path) -> Checked:
    """Say which programs read a checkpoint.

    Raises:
        InputError: no folder.
        LayerfoldError: what `load` raises.
    """
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder at {str(folder)!r}")
    model, manifest = load(folder, device="cpu", dtype="float32"), read_manifest(folder)
    form = (manifest or {}).get("format", "dense")
    files = sorted(folder.glob("*.safetensors"))
    stored = sum(_numbers(file) for file in files)
    parameters = model.decoder.size().parameters
    readers = (_transformers(model, folder, form, parameters), *_others(model, form, stored, parameters))
    size = sum(file.stat().st_size for file in files)
    return Checked(form, parameters, stored, size, readers, tuple(_warnings(model)))


def _numbers(file: Path) -> int:
    """Count the numbers in a file of weights."""
    total = 0
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118, it is no dict
            total += math.prod(opened.get_slice(name).get_shape())
    return total


def _transformers(model: Model, folder: Path, form: str, parameters: int) -> Reader:
    name = "transformers"
    if form != "dense":
        return Reader(name, "does not load", "it is compact: `layerfold export --to dense` writes what it reads")
    vocabulary = int(model.decoder.model.config.vocab_size)
    ids = torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place:
        save_file({"ids": ids}, Path(place) / "ids.safetensors")
        words = [sys.executable, "-c", _PROCESS, str(folder.resolve()), place]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            return Reader(name, "does not load", last_line(done.stderr))
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        theirs = load_file(Path(place) / "logits.safetensors")["logits"]
    with torch.no_grad(), quiet():
        mine = model.decoder.model(input_ids=ids).logits
    gap = float((mine - theirs).abs().max() / mine.abs().max())
    if found["wrong"]:
        return Reader(name, "differs", f"{len(found['wrong'])} tensors do not fit, as {found['wrong'][0]!r}")
    if gap > _CLOSE:
        return Reader(name, "differs", f"its logits differ by {gap:.2g} of the largest")
    if not found["same_text"]:
        return Reader(name, "differs", "it writes another text with its cache than without")
    same = f"logits differ by at most {gap:.1g} of the largest, and text with the cache is text without"
    if found["parameters"] > parameters:
        return Reader(name, "loads padded", f"{_padded(found['parameters'], parameters)}; {same}")
    return Reader(name, "loads", same)


def _padded(read: int, own: int) -> str:
    return f"{read:,} parameters where the model has {own:,}, {read / own:.2f} times"


def _others(model: Model, form: str, stored: int, parameters: int) -> list[Reader]:
    """What programs that are not run here should make of it: most build each block from one configuration."""
    if form != "dense":
        why = "it is compact: `layerfold export --to dense` writes what it reads"
        return [Reader("vLLM", "does not load", why), _llama_cpp(model), Reader("PEFT", "does not load", why)]
    padded = stored > parameters
    answer: Answer = "should load padded" if padded else "should load"
    each = _padded(stored, parameters) if padded else "every block is what the configuration says"
    deltas = "; `layerfold export --to peft` writes deltas as an adapter" if ranks(model.decoder) else ""
    return [
        Reader("vLLM", answer, f"{each}, if it knows {model.decoder.model.config.model_type}; not run"),
        _llama_cpp(model),
        Reader("PEFT", answer, f"as a base of adapters: {each}; not run{deltas}"),
    ]


def _llama_cpp(model: Model) -> Reader:
    """What llama.cpp should make of the file that layerfold writes for it."""
    name, writes = "llama.cpp", "`layerfold export --to gguf` writes what it reads"
    try:
        arch = architecture(model.decoder)
    except InputError as error:
        return Reader(name, "does not load", str(error))
    if arch.by_block:
        return Reader(name, "should load", f"{writes}, each block with sizes of its own ({arch.name}); not run")
    if lacking(model.decoder):
        return Reader(name, "should load padded", f"{writes}, with zeros where blocks lack something; not run")
    return Reader(name, "should load", f"{writes} ({arch.name}); not run")


def _warnings(model: Model) -> list[str]:
    """Say what of a checkpoint does not fit together."""
    config, found = model.decoder.model.config, []
    rows = int(model.decoder.model.get_input_embeddings().weight.shape[0])
    if model.tokenizer is None:
        found.append("it has no tokenizer")
    elif len(model.tokenizer) > rows:
        found.append(f"its tokenizer has {len(model.tokenizer):,} entries, and its embedding {rows:,} rows")
    if (kinds := getattr(config, "layer_types", None)) is not None and len(kinds) != model.decoder.n_blocks:
        found.append(f"its configuration lists {len(kinds)} kinds of blocks for {model.decoder.n_blocks}")
    ends = model.decoder.model.generation_config.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and not 0 <= end < rows:
            found.append(f"its end of text is token {end}, and its vocabulary has {rows:,}")
    return found
