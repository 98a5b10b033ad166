"""Damaged checkpoints are refused in one line, and writing that is refused or interrupted leaves what was there."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Saved, change_manifest, configure, made, manifest
from safetensors.torch import load_file, save_file
from tiny import logits, refused, tiny
from torch import Tensor

from layerfold.checkpoint import compact, save
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS, MASKS
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import ModelError, OutputError
from layerfold.files import check_folder, hash_file

Damage = Callable[[Path], object]
FORMAT = pytest.mark.parametrize("form", FORMATS)
ZEROS = r".*' is not zero where the model has nothing$"
SHA = "is damaged: SHA-256"
UP = "model.layers.1.mlp.up_proj"


def told(**changes: Any) -> Damage:
    """Change keys of the manifest."""
    return lambda folder: change_manifest(folder, **changes)


def untold(key: str) -> Damage:
    return lambda folder: (folder / MANIFEST).write_text(
        json.dumps({name: value for name, value in manifest(folder).items() if name != key})
    )


def within(key: str, change: Callable[[Any], Any]) -> Damage:
    return lambda folder: change_manifest(folder, **{key: change(manifest(folder)[key])})


def alias_of(target: Any) -> Damage:
    return within("aliases", lambda aliases: dict.fromkeys(aliases, target))


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncated(name: str, less: int = 1000) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - less)


def flipped(folder: Path) -> None:
    content = bytearray((folder / COMPACT_WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / COMPACT_WEIGHTS).write_bytes(content)


def weighing(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Change the weights of a dense checkpoint."""

    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def nonzero(name: str, place: Any = None) -> Damage:
    """Put something into the place of a zero."""

    def change(found: dict[str, Tensor]) -> None:
        at = tuple(torch.nonzero(found[name] == 0)[0]) if place is None else place
        assert not found[name][at]
        found[name][at] = 1e-9

    return weighing(change)


def valued(name: str, value: float) -> Damage:
    return weighing(lambda found: found[name].view(-1)[5:6].fill_(value))


def renamed(name: str, other: str) -> Damage:
    return weighing(lambda found: found.update({other: found.pop(name)}))


def without_factor(folder: Path) -> None:
    """Weights that lack one of a delta's factors, under a hash that is right."""
    found = load_file(folder / COMPACT_WEIGHTS)
    del found[f"{UP}.b"]
    save_file(found, folder / COMPACT_WEIGHTS)
    with refused(ModelError, SHA):
        load(folder)
    aliases = json.dumps(manifest(folder)["aliases"], sort_keys=True)
    change_manifest(folder, sha256=hash_file(folder / COMPACT_WEIGHTS, aliases))


def configured(**changes: Any) -> Damage:
    return lambda folder: configure(folder, **changes)


GENERAL: list[tuple[Damage, str]] = [
    (flipped, SHA),
    (truncated(COMPACT_WEIGHTS), SHA),
    (told(sha256="0" * 64), "recorded 000000000000"),
    (untold("sha256"), SHA),
    (gone(COMPACT_WEIGHTS), "lacks its weights or its structure"),
    (untold("aliases"), "lacks its weights or its structure"),
    (told(aliases=["lm_head.weight"]), "lacks its weights or its structure"),
    (told(aliases={}), SHA),
    (alias_of("transformer.h.9.mlp.c_fc.weight"), SHA),
    (alias_of("transformer.ln_f.bias"), SHA),
    (alias_of(["no name"]), SHA),
    (told(format="dense"), r"holds a compact checkpoint without its layerfold\.json"),
    (told(format="folded"), "is of format 'folded' version 1"),
    (told(format_version=99), "version 99; accepted: version 1"),
    (untold("format"), "is damaged: KeyError"),
    (told(provenance=[]), "accepted"),
    (told(provenance={"base": "x", "color": "red", "steps": []}), "is damaged"),
    (told(provenance={"steps": []}), "is damaged"),
    (written(MANIFEST, b"{"), "is damaged: JSONDecodeError"),
    (written(MANIFEST, b"[]"), "is damaged: TypeError"),
    (written(MANIFEST, b"\xff\xfe"), "is damaged: UnicodeDecodeError"),
    (gone("config.json"), r"holds no config\.json"),
    (written("config.json", b"{"), "cannot be"),
    (written("config.json", b"null"), "cannot be"),
    *((configured(decoder=each), "cannot be") for each in (None, {}, {"model_type": "none"})),
]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
POINTER = "is a git-lfs pointer, not the file itself; run `git lfs pull`"
PLAIN: list[tuple[Damage, str]] = [
    (gone("config.json"), "no config.json"),
    *((written("config.json", content), "cannot be loaded") for content in (b"{", b"")),
    (configured(model_type="gpt9"), "gpt9"),
    (gone("model.safetensors"), "no .safetensors weights"),
    *((written("model.safetensors", content), "cannot be loaded") for content in (b"", bytes(64))),
    (truncated("model.safetensors"), "cannot be loaded"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"only \.bin, not loaded"),
    (written(MANIFEST, b"[]"), "damaged"),
    *((written(name, LFS), f"{name}' {POINTER}") for name in ("model.safetensors", "tokenizer.json", "config.json")),
    (
        renamed("transformer.h.3.mlp.c_fc.weight", "stray"),
        r"missing keys: transformer\.h\.3\.mlp\.c_fc\.weight.*unexpected keys: stray",
    ),
    *(
        (valued("transformer.h.1.mlp.c_proj.weight", bad), r"'.*1\.mlp\.c_proj\.weight' holds 1 values that are not fi")
        for bad in (float("nan"), float("inf"))
    ),
]

# What a manifest says of a structure

REMOVED: list[Any] = [
    *({"attention": wrong} for wrong in ([4], [-1], [0, 0], 0, "03", [0.0], [[0]], None)),
    *({"atention": [0]}, ["attention"], "attention", None, 1),
]
WIDTHS: list[Any] = [
    *({"0": wrong} for wrong in (0, -3, 48, 99, 7.0, True, None, "7", [7])),
    *({"4": 3}, {"-1": 3}, {"x": 7}, {"0": 30, "1": 7, "2": 30, "3": 1}, {"0": 7, "1": 7, "2": 7, "3": 7}),
    *([30, 7], "narrow", None, 3),
]
HEADS: list[Any] = [
    *({"0": wrong} for wrong in (0, -1, 2, 99, 1.0, True, None, "1", [1])),
    *({wrong: 1} for wrong in ("2", "4", "-1", "x")),
    *([1, 1], "few", None, 3),
]
STRUCTURE = [
    (kind, key, wrong)
    for kind, key, some in (("lacking", "removed", REMOVED), ("widths", "d_ffn", WIDTHS), ("heads", "heads", HEADS))
    for wrong in some
]


@pytest.mark.parametrize(("kind", "key", "wrong"), STRUCTURE, ids=str)
def test_a_manifest_that_says_nothing_that_can_be(kind: str, key: str, wrong: Any, saved: Saved) -> None:
    """Said of the form at hand: the structure is restored before any weight is looked at."""
    for form in FORMATS:
        folder = saved(kind, "llama", form)
        before = (folder / MANIFEST).read_text()
        try:
            change_manifest(folder, **{key: wrong})
            with refused(ModelError, r"layerfold\.json' is damaged: ."):
                load(folder)
        finally:
            (folder / MANIFEST).write_text(before)


@FORMAT
def test_a_manifest_of_before_there_was_anything_to_remove_is_read(form: str, copied: Saved) -> None:
    folder = copied("plain", "gpt2", form)
    untold("removed")(folder)
    assert load(folder).sha256 == made("plain", "gpt2").sha256


def no_heads(name: str, place: Any) -> tuple[str, str, str, Damage, str]:
    family = "gpt2" if "transformer" in name else "llama"
    return "heads", family, "dense", nonzero(name, place), name + ZEROS


def ranks(change: Callable[[Any], Any], said: str) -> tuple[str, str, str, Damage, str]:
    return "shared", "llama", "compact", within("ranks", change), said


OTHERS: list[tuple[str, str, str, Damage, str]] = [
    ("lacking", "gpt2", "dense", told(removed={"attention": [0, 1]}), r"transformer\.h\.1\.ln_1\.weight" + ZEROS),
    ("lacking", "gpt2", "dense", told(removed={"ffn": [0]}), r"transformer\.h\.0\.ln_2\.weight" + ZEROS),
    ("lacking", "gpt2", "compact", told(removed={"attention": [0]}), "cannot be read"),
    ("lacking", "gpt2", "compact", told(removed={"attention": [0, 1, 3], "ffn": [1, 3]}), "cannot be read"),
    ("lacking", "gpt2", "compact", told(removed={"attention": [1, 3], "ffn": [1, 3]}), "cannot be read"),
    ("widths", "llama", "dense", told(d_ffn={"0": 29, "1": 7, "3": 1}), r"model\.layers\.0\.mlp\." + ZEROS),
    ("widths", "llama", "dense", told(d_ffn={"0": 30, "1": 7, "2": 47}), r"model\.layers\.2\.mlp\." + ZEROS),
    ("widths", "llama", "dense", nonzero("model.layers.1.mlp.up_proj.bias", 7), r"layers\.1\.mlp\.up_proj" + ZEROS),
    ("widths", "llama", "compact", told(d_ffn={"0": 29, "1": 7, "3": 1}), r"read: .*size mismatch for .*0\.mlp\."),
    ("widths", "llama", "compact", told(d_ffn={}), r"cannot be read: .*size mismatch for model\.layers\.0\.mlp\."),
    ("heads", "llama", "dense", told(heads={"0": 1, "1": 1, "3": 1}), r"layers\.1\.self_attn\." + ZEROS),
    ("heads", "gpt2", "dense", told(heads={"0": 1, "1": 3, "3": 1}), r"h\.1\.attn\.c_" + ZEROS),
    ("heads", "llama", "compact", told(heads={}), r"cannot be read: .*size mismatch for model\.layers\.0\.self_attn\."),
    ("heads", "gpt2", "compact", told(heads={"0": 1, "3": 2}), r"read: .*size mismatch for transformer\.h\.3\.attn\."),
    no_heads("model.layers.0.self_attn.q_proj.weight", (16, 0)),
    no_heads("model.layers.0.self_attn.k_proj.bias", (8,)),
    no_heads("model.layers.0.self_attn.o_proj.weight", (0, 16)),
    no_heads("transformer.h.0.attn.c_attn.weight", (0, 8)),
    no_heads("transformer.h.0.attn.c_attn.bias", (32 + 31,)),
    no_heads("transformer.h.0.attn.c_proj.weight", (8, 0)),
    no_heads("transformer.h.2.attn.c_attn.weight", (0, 0)),
    ranks(lambda known: known | {"model.layers.9.mlp.up_proj": 4}, r"is damaged: .*the model has no such matrix"),
    ranks(lambda known: known | {"": 4}, r"is damaged: .*no such matrix"),
    ranks(lambda known: known | {UP: 33}, r"is damaged: a delta of rank 33 .*accepted: 0 \.\.\. 32"),
    *(
        ranks(lambda known, rank=rank: known | {UP: rank}, rf"is damaged: a delta of rank {rank!r} ")  # type: ignore[misc]
        for rank in (-1, 4.0, True, None, "4")
    ),
    *(ranks(lambda _, wrong=wrong: wrong, "is damaged: .") for wrong in (None, 4, "4", [UP], [[UP, 4]])),  # type: ignore[misc]
    ranks(lambda known: known | {UP: 5}, r"cannot be read: .*size mismatch for model\.layers\.1\.mlp\.up_proj\.[ab]"),
    ranks(lambda known: {}, r"cannot be read: .*Unexpected key"),
    ranks(lambda known: known | {"model.layers.0.mlp.up_proj": 4}, r"cannot be read: .*Missing key"),
    ranks(lambda known: {name: rank for name, rank in known.items() if name != UP}, r"Unexpected key.*up_proj\.a"),
    ("shared", "llama", "compact", without_factor, r"cannot be read: .*Missing key.*up_proj\.b"),
    ("plain", "llama", "dense", told(ranks={UP: 4}), r"is damaged: low-rank deltas in a dense checkpoint"),
    # A whole reason, and not its first line.
    (
        *("plain", "qwen2", "dense", configured(layer_types=["full_attention"] * 3)),
        r"cannot be loaded: .*`num_hidden_layers` \(4\) .*`layer_types` \(3\)",
    ),
]

# Masks

MASKED = "transformer.h.2.mlp.c_fc.weight"
BOTH: list[tuple[Damage, str]] = [
    *(
        (within("masks", lambda masks, shape=shape: masks | {MASKED: shape}), said)  # type: ignore[misc]
        for shape, said in (
            ([128, 32], "c_fc.weight"),
            ([32, 127], r"512 bytes of bits for a mask of shape \(32, 127\); accepted: 508"),
            ([-32, -128], "-32"),
            (["32", 128], "masks|read"),
            (4096, "masks|read"),
            (None, "masks|read"),
        )
    ),
    (told(masks={"transformer.h.9.x.weight": [2]}), r"transformer\.h\.9\.x\.weight"),
    *((told(masks=value), "the masks|masks in") for value in ([MASKED], [], None, 0, "masks")),
]
DENSE: list[tuple[Damage, str]] = [
    (gone(MASKS), "masks.*No such file.*layerfold_masks"),
    (lambda folder: os.truncate(folder / MASKS, 900), rf"layerfold_masks\.bits' {SHA}"),
    (written(MASKS, b""), rf"layerfold_masks\.bits' {SHA}"),
    (told(masks_sha256="0" * 64), r"layerfold_masks\.bits' is damaged: .*recorded 000000000000"),
    (told(masks_sha256=None), rf"layerfold_masks\.bits' {SHA}"),
    (nonzero(MASKED), r"the masks in .* do not fit: the weight '.*2\.mlp.c_fc.weight' is not zero everywhere"),
    (gone("model.safetensors"), "no .safetensors weights"),
]


DAMAGED = [
    *(("tied", "gpt2", "compact", *each) for each in GENERAL),
    *(("plain", "gpt2", "dense", *each) for each in PLAIN),
    *OTHERS,
    *(("masked", "gpt2", "dense", *each) for each in BOTH + DENSE),
    *(("masked", "gpt2", "compact", *each) for each in BOTH),
]


@pytest.mark.parametrize(("kind", "family", "form", "damage", "said"), DAMAGED)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    kind: str, family: str, form: str, damage: Damage, said: str, copied: Saved
) -> None:
    folder = copied(kind, family, form)
    damage(folder)
    with refused(ModelError, said):
        load(folder)


# The weights alone, as training reads them


@pytest.mark.parametrize("damage", ["short", "empty", "none", "missing", "stray", "shape"])
def test_weights_that_do_not_fit_are_one_line(damage: str, copied: Saved) -> None:
    folder = copied("plain", "gpt2", "dense")
    path = folder / "model.safetensors"
    found, name = load_file(path), "transformer.h.1.mlp.c_fc.weight"
    if damage == "short":
        truncated(path.name, 100)(folder)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "none":
        path.unlink()
    else:
        tensor = found.pop(name)
        added = {"missing": {}, "stray": {name: tensor, "stray": tensor.clone()}, "shape": {name: tensor[:1].clone()}}
        save_file(found | added[damage], path, metadata={"format": "pt"})
    with refused(ModelError, "^the weights in.*stray" if damage == "stray" else "^the weights in((?!stray).)*$"):
        save.read_training_(made("plain", "gpt2").decoder.model, folder)


# Writing


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("kind", "form", "modules"),
    [("plain", "dense", ()), ("masked", "dense", (save,)), ("plain", "compact", (compact,))],
)
def test_an_interrupted_save_leaves_what_was_there(
    kind: str, form: Any, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made("plain", "llama")
    before.save(tmp_path / "old")
    model = made(kind, "gpt2")
    if not modules:
        monkeypatch.setattr(type(model.decoder.model), "save_pretrained", full)
    for module in modules:
        monkeypatch.setattr(module, "save_file", full)
    for name in ("new", "old"):
        with refused(OutputError, r"cannot write .*No space left on device"):
            model.save(tmp_path / name, format=form, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert torch.equal(logits(load(tmp_path / "old").decoder), logits(before.decoder))


def test_an_interrupt_from_the_keyboard_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compact, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        made("plain", "gpt2").save(tmp_path / "saved", format="compact")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model() -> Model:
    return made("plain", "gpt2")


def test_a_folder_that_holds_something_is_refused_and_left_untouched(model: Model, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty; --overwrite replaces it whole"):
        model.save(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_overwrite_replaces_the_folder_whole(model: Model, tmp_path: Path) -> None:
    folder, other = tmp_path / "saved", tiny("llama")
    model.save(folder, format="compact")
    other.save(folder, overwrite=True)
    assert not (folder / COMPACT_WEIGHTS).exists()
    assert torch.equal(logits(load(folder).decoder), logits(other.decoder))
    assert list(tmp_path.iterdir()) == [folder]


def test_an_empty_folder_and_missing_parents_are_accepted(model: Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        model.save(folder)
        assert load(folder).sha256 == model.sha256


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_a_folder_is_refused(overwrite: bool, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_text("mine")
    with pytest.raises(OutputError, match="is a file; accepted: a folder that is empty or new"):
        model.save(path, overwrite=overwrite)
    with refused(OutputError):
        model.save(path / "inner", overwrite=overwrite)
    assert path.read_text() == "mine"


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(OutputError, match="holds the current folder"):
        check_folder(tmp_path, overwrite=True)


def test_files_are_as_readable_as_a_plain_write_makes_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tiny("gpt2").save(tmp_path / "saved", format="compact")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "saved").iterdir()} == {0o640}
