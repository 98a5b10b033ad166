"""Repair from Python and from a recipe: what it leaves behind, and what it does not admit."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import FAMILIES
from peft import PeftModel
from tiny import BLOCKS, continued, logits, prose, refused, tiny, token_ids, windows
from transformers import AutoModelForCausalLM

from layerfold.api import compress
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.peft import ADAPTER, BASE, save_adapter
from layerfold.errors import InputError, RecipeError
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.model import deltas
from layerfold.records import BASE_LABEL
from layerfold.repair.repair import LEVELS, Level
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.study import Study

pytestmark = pytest.mark.usefixtures("offline")

METHODS: dict[str, tuple[str, Method]] = {
    "drop": ("gpt2", Drop(blocks="1")),
    "collapse": ("qwen3", Collapse(n=2, anchor="last")),
    "merge": ("llama", Merge(n=2)),
    "tied": ("mistral", Merge(n=2, tie=True)),
    "neurons": ("qwen2", Prune(structure="neurons", sparsity=0.4)),
    "share": ("qwen3", Share(window="1:2", rank=3)),
    "share where it is best": ("gpt2", Share(k=2, rank=3)),
    "ffn": ("llama", Drop(blocks="0,2", part="ffn")),
}
TOLD: dict[str, set[str]] = {
    "rescale": {"block", "shrunk"},
    "refit": {"block", "error", "repaired", "ridges"},
    "refit+attention": {"block", "error", "repaired", "ridges"},
}


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file whose calibration split is of more than a thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "plenty.txt"
    path.write_text("\n\n".join(prose(30, seed) for seed in range(300)))
    return str(path)


def made(corpus: str, name: str = "drop", repair: Level = "refit", family: str | None = None, **changes: Any) -> Model:
    text: dict[str, Any] = {"corpus": corpus, "tokens": 512, "repair_tokens": 512}
    usual, method = METHODS[name]
    return compress(tiny(family or usual), method, repair=repair, **text | changes)


@functools.cache
def unrepaired(corpus: str, method: str) -> Model:
    return made(corpus, method, "none")


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("method", METHODS)
def test_a_repair_is_a_step_of_its_own_and_is_saved_with_the_model(
    method: str, level: Level, plenty: str, tmp_path: Path
) -> None:
    if level == "rescale" and method.startswith(("share", "neurons")):
        with pytest.raises(InputError, match=r"^repair 'rescale' with (share|prune), which averages no neurons;"):
            made(plenty, method, level)
        return
    model = made(plenty, method, level)
    first, second = model.provenance.steps
    assert second["method"] == {"name": "repair", "level": level, "protocol": "repair@3"}
    assert second["seed"] == 0
    assert second["calibration"]["split"] in ("calibration", "calibration+train")
    assert 400 < second["calibration"]["tokens"] <= 512
    assert first["calibration"] is None or first["calibration"]["tokens"] <= 512
    told = second["notes"]["rescaled" if level == "rescale" else "repaired"]
    with_ffn = [index for index, width in enumerate(model.decoder.d_ffn) if width or level != "rescale"]
    assert [each["block"] for each in told] == with_ffn
    assert {key for each in told for key in each} == TOLD[level]
    json.dumps(model.provenance.to_json(tmp_path), allow_nan=False)
    plain = unrepaired(plenty, method)
    assert model.decoder.size().parameters == plain.decoder.size().parameters
    assert not torch.equal(logits(model.decoder), logits(plain.decoder))
    assert plain.provenance.steps[0] == first
    for form in ("dense", "compact") if level != "refit" else ():  # refit+attention changes what refit does and more
        folder = tmp_path / form
        model.save(folder, format=form)  # type: ignore[arg-type]
        loaded = load(folder)
        off = (logits(loaded.decoder) - logits(model.decoder)).abs().max()
        # A dense checkpoint multiplies deltas out, which rounds.
        assert off < 1e-3 if form == "dense" and "share" in method else off == 0
        assert loaded.provenance.steps == model.provenance.steps
        assert continued(loaded.decoder) == continued(loaded.decoder, use_cache=False)


def test_the_given_model_stays_as_it_is(plenty: str) -> None:
    model = tiny("llama")
    before = logits(model.decoder)
    compress(model, Drop(blocks="1"), repair="refit", corpus=plenty, repair_tokens=256)
    assert torch.equal(logits(model.decoder), before)
    assert model.decoder.n_blocks == BLOCKS
    edited = compress(model, Drop(blocks="1"), repair="refit", corpus=plenty, repair_tokens=256, in_place=True)
    assert edited.decoder.model is model.decoder.model


def test_the_same_seed_gives_the_same_weights_and_another_another_text(plenty: str) -> None:
    one, two, other = (made(plenty, seed=seed) for seed in (0, 0, 1))
    assert one.sha256 == two.sha256
    assert one.provenance.steps == two.provenance.steps
    assert one.sha256 != other.sha256


@FAMILIES
def test_a_repair_comes_closer_to_the_original(plenty: str, family: str) -> None:
    ids = windows().input_ids[:-1]
    original = logits(tiny(family).decoder, ids)
    levels: list[Level] = ["none", "refit", "refit+attention"]
    decoders = [made(plenty, "drop", level, family, repair_tokens=2048).decoder for level in levels]
    off = [float((logits(decoder, ids) - original).square().mean()) for decoder in decoders]
    assert off[1] < 0.9 * off[0]
    assert off[2] < 0.9 * off[0]


@FAMILIES
def test_a_compressed_model_is_repaired_against_itself(plenty: str, family: str) -> None:
    merged = compress(tiny(family), Merge(n=2, tie=True, align="none"))
    model = compress(merged, Drop(blocks="1"), repair="refit+attention", corpus=plenty, repair_tokens=512)
    assert [step["method"]["name"] for step in model.provenance.steps] == ["merge", "drop", "repair"]
    blocks = model.decoder.blocks
    assert blocks[1].ffn.down.module.weight is blocks[2].ffn.down.module.weight
    again = compress(model, Collapse(n=3), repair="rescale", corpus=plenty, tokens=512, repair_tokens=512)
    assert again.decoder.n_blocks == 1
    assert logits(again.decoder).isfinite().all()


@FAMILIES
def test_deltas_that_were_repaired_are_an_adapter(plenty: str, tmp_path: Path, family: str) -> None:
    model = made(plenty, "share", "refit+attention", family)
    assert set(deltas.ranks(model.decoder).values()) == {3}
    save_adapter(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / BASE)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".*is_activation_checkpointing", FutureWarning)  # peft's, of transformers
        loaded = PeftModel.from_pretrained(plain, tmp_path / ADAPTER)
        assert (loaded(input_ids=token_ids()).logits - logits(model.decoder)).abs().max() < 1e-4


def test_too_little_text_is_warned_of_or_refused(plenty: str) -> None:
    notes = made(plenty, repair_tokens=96).provenance.steps[1]["notes"]
    assert notes["warning"].startswith("singular statistics, which were regularised, in blocks 0")
    assert notes["warning"].endswith("more text would help")
    assert "warning" not in made(plenty).provenance.steps[1]["notes"]
    for tokens, said in ((32, "calibration text of 1 window"), (1, "limit of 1 tokens; accepted: 2 or more")):
        with pytest.raises(InputError, match=said):
            made(plenty, repair_tokens=tokens)


@pytest.mark.parametrize(
    ("method", "level", "said"),
    [
        (Prune(sparsity=0.5), "refit", "structure 'unstructured', whose zeros it would fill; accepted: neurons"),
        (Prune(structure="2:4"), "rescale", "structure '2:4', whose zeros it would fill; accepted: neurons"),
        (Drop(blocks="1"), "refti", "unknown repair 'refti'; did you mean 'refit'? accepted: none, refit,"),
        (Drop(blocks="1"), 3, "unknown repair '3'; accepted: none, refit, refit+attention, rescale"),
    ],
    ids=str,
)
def test_what_cannot_be_repaired_is_said_before_anything_is_read(method: Method, level: Any, said: str) -> None:
    with refused(InputError, says=said):
        compress(tiny("gpt2"), method, repair=level, corpus="no such folder")


# Recipes and studies


def recipe(corpus: str, *variants: dict[str, Any], **changes: Any) -> Recipe:
    calibration = {"corpus": corpus, "tokens": 512, "repair_tokens": 512}
    evaluate = ["size", {"perplexity": {"corpus": corpus, "limit_tokens": 512}}]
    return read_recipe({"variants": list(variants), "evaluate": evaluate, "calibration": calibration} | changes)


PLAIN: dict[str, Any] = {"label": "dropped", "drop": {"blocks": "1"}}
REPAIRED = PLAIN | {"label": "repaired", "repair": "refit"}


NO_METHOD = "of a row that no method makes; accepted: none"
NO_AVERAGE = "repair 'rescale' with {}, which averages no neurons; accepted: none, refit, refit+attention"
NARROWED = {"sparsity": 0.5, "structure": "neurons"}
DROPPED: dict[str, Any] = {"drop": {"blocks": "1"}}


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"load": "somebody/model", "repair": "refit"}, f"repair 'refit' {NO_METHOD}"),
        ({"student": {}, "repair": "rescale"}, f"repair 'rescale' {NO_METHOD}"),
        ({"share": {}, "repair": "rescale"}, NO_AVERAGE.format("share")),
        ({"prune": {"sparsity": 0.5}, "repair": "refit"}, "structure 'unstructured', whose zeros it would fill"),
        ({"prune": NARROWED, "repair": "rescale"}, NO_AVERAGE.format("prune")),
        (DROPPED | {"repair": "rescal"}, "unknown repair 'rescal'; did you mean 'rescale'?"),
        (DROPPED | {"repair": None}, "unknown repair 'None'"),
        (DROPPED | {"repair": ["refit"]}, "unknown repair \"['refit']\""),
        (DROPPED | {"repair": 1.5}, "unknown repair '1.5'"),
        ({"repair": "refit"}, "keys label, repair; accepted: label, repair, recovery and one of"),
    ],
    ids=str,
)
def test_a_row_that_admits_no_such_repair_is_told_so(variant: dict[str, Any], said: str) -> None:
    with refused(RecipeError, says=said):
        read_recipe({"variants": [{"label": "a", **variant}]})


def test_a_repaired_row_has_records_of_its_own_and_the_others_keep_theirs(plenty: str, tmp_path: Path) -> None:
    base, found = tiny("gpt2"), recipe(plenty, PLAIN, REPAIRED)
    assert [variant.repair for variant in found.variants] == ["none", "refit"]
    written = found.to_json()
    assert [variant.get("repair") for variant in written["variants"]] == [None, "refit"]
    assert written["calibration"]["repair_tokens"] == 512
    assert read_recipe(written) == found, "it comes back as it was written"

    def keys(folder: str, *variants: dict[str, Any], **changes: Any) -> dict[tuple[str, str], str]:
        study = Study(recipe(plenty, *variants, **changes), tmp_path / folder, base=base)
        return {(record.label, record.evaluator): record.key for record in study.run()}

    plain = keys("plain", PLAIN)
    both = keys("both", PLAIN, REPAIRED)
    assert {key: value for key, value in both.items() if key[0] != "repaired"} == plain
    assert both["repaired", "perplexity"] != plain["dropped", "perplexity"]
    assert keys("both", PLAIN, REPAIRED) == {}
    told = {"corpus": plenty, "tokens": 512, "repair_tokens": 1024}
    assert {label for label, _ in keys("both", PLAIN, REPAIRED, calibration=told)} == {"repaired"}
    assert {label for label, _ in keys("both", PLAIN, REPAIRED | {"repair": "refit+attention"})} == {"repaired"}
    assert {label for label, _ in keys("both", PLAIN, REPAIRED, seed=3)} >= {"repaired"}
    results = Study(recipe(plenty, PLAIN, REPAIRED), tmp_path / "both", base=base).results()
    assert len({results.score(label, "perplexity")["value"] for label in (BASE_LABEL, "dropped", "repaired")}) == 3
    document = json.loads(json.dumps(results.to_json(), allow_nan=False))
    notes = {row["label"]: row.get("notes") for row in document["variants"]}
    assert "repaired" in notes["repaired"]
    assert "repaired" not in (notes["dropped"] or {})
