"""Model cards: a checkpoint's README.md, which people and the Hub read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from layerfold.checkpoint.ggml_architectures import architecture
from layerfold.checkpoint.provenance import Provenance
from layerfold.checkpoint.weighing import weigh
from layerfold.errors import InputError
from layerfold.maths.intervals import Interval
from layerfold.model.decoder import Decoder

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ANY_ID = re.compile(r"(?!pocket(@|$))[\w-][\w.-]*(/[\w.-]+)?")
"""Of a base: some of the oldest have no owner."""
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """What was measured of a checkpoint.

    Attributes:
        name: what it is, as ``perplexity``.
        value: with its 95 % interval.
        protocol: by which it was measured, as ``perplexity-2``.
        text: what was read.
    """

    name: str
    value: Interval
    protocol: str
    text: str


def card(
    decoder: Decoder,
    made: Provenance,
    licence: str | None,
    form: str,
    dtype: torch.dtype,
    figures: Sequence[Figure] = (),
) -> str:
    """Write the card of a checkpoint.

    Args:
        licence: the base's; None where it is not known.
        form: ``dense`` or ``compact``.
        dtype: of its weights.
    """
    return f"---\n{yaml.safe_dump(_metadata(made, licence, form), sort_keys=True)}---\n\n" + "\n".join(
        [
            f"# {_base(made)}, smaller",
            "",
            *_made(decoder, made, dtype),
            "",
            "## What it costs",
            "",
            *_costs(figures),
            "",
            "## How to load it",
            "",
            *_LOADING[form],
            "",
            "## What reads it",
            "",
            *_readers(decoder, form),
            "",
        ]
    )


def licence_of(folder: Path) -> str | None:
    """Return the licence that a folder's card names; None where it names none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    licence = metadata_of(text).get("license")
    return licence if isinstance(licence, str) else None


def metadata_of(text: str) -> dict[str, Any]:
    """Return a card's metadata; nothing where they are damaged."""
    head = _HEAD.match(text)
    try:
        found = yaml.load(head[1], yaml.BaseLoader) if head else None  # texts and lists alone
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def with_licence(text: str, licence: str) -> str:
    """Return a card that names a licence."""
    head = _HEAD.match(text)
    metadata = metadata_of(text) | {"license": licence}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n" + (text[head.end() :] if head else f"\n{text}")


def _metadata(made: Provenance, licence: str | None, form: str) -> dict[str, Any]:
    methods = [name for name, _ in _steps(made)]
    found: dict[str, Any] = {
        "library_name": "transformers" if form == "dense" else "layerfold",
        "pipeline_tag": "text-generation",
        "tags": ["layerfold", "compressed", *dict.fromkeys(methods)],
    }
    if made.location is None and _ANY_ID.fullmatch(made.base):
        found["base_model"] = made.base
    return found if licence is None else found | {"license": licence}


def _steps(made: Provenance) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each step's method, and its settings."""
    for step in made.steps:
        method = step.get("method", step)
        yield str(method.get("name", "a step")), {key: value for key, value in method.items() if key != "name"}


def _base(made: Provenance) -> str:
    return _plain(made.base if made.location is None else Path(made.base).name)


def _made(decoder: Decoder, made: Provenance, dtype: torch.dtype) -> Iterator[str]:
    weighed = weigh(decoder, dtype)
    sizes = f"{weighed.dense / 1e6:,.2f} MB of weights"
    if not weighed.as_small:
        sizes = f"{sizes} in dense form, {weighed.compact / 1e6:,.2f} MB in compact form"
    yield (
        f"`{_base(made)}`, made smaller by layerfold {made.versions.get('layerfold', '')}: "
        f"{decoder.size().parameters:,} distinct parameters in {decoder.n_blocks} blocks, {sizes}."
    )
    if made.steps:
        yield ""
    for name, settings in _steps(made):
        yield f"- {_plain(name)}: `{_plain(json.dumps(settings))}`"
    yield ""
    yield "`layerfold.json` has every step with its settings, its calibration text, its seed and the versions."


def _costs(figures: Sequence[Figure]) -> Iterator[str]:
    if not figures:
        yield "Nothing was measured when this was written. `layerfold eval FOLDER` measures it beside the base."
        return
    yield "| | value | 95 % interval | protocol | text |"
    yield "|---|---|---|---|---|"
    for each in figures:
        value = each.value
        interval = f"{value.low:,.4g} ... {value.high:,.4g}"
        yield f"| {each.name} | {value.value:,.4g} | {interval} | {each.protocol} | {_plain(each.text)} |"


_LOADING = {
    "dense": [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")',
        "```",
    ],
    "compact": [
        "It is in layerfold's compact form, which plain transformers does not read:",
        "",
        "```python",
        "import layerfold",
        "",
        'model = layerfold.load("FOLDER_OR_ID")',
        "```",
        "",
        "`layerfold export FOLDER --to dense --output-dir NEW` writes what plain transformers reads.",
    ],
}


def _readers(decoder: Decoder, form: str) -> Iterator[str]:
    """Say which programs read it: see `check`."""
    try:
        arch = architecture(decoder)
        llama = f"`layerfold export FOLDER --to gguf` writes what it reads ({arch.name})"
    except InputError as error:
        llama = f"no: {_plain(str(error))}"
    plain = "yes" if form == "dense" else "after `layerfold export --to dense`"
    yield f"- transformers: {plain}"
    yield f"- vLLM: {plain}, if it knows {decoder.model.config.model_type}; not run"
    yield f"- llama.cpp: {llama}"
    yield ""
    yield "`layerfold check FOLDER` loads it in a process without layerfold and compares the logits."


def _plain(text: str) -> str:
    """Return a text without what Markdown would read as code, a table, a tag or a new line."""
    return re.sub(r"[`|<>\r\n]+", " ", text)
