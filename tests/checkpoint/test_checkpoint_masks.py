"""Masks come back from disk, in either form, or a line says what is damaged."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_masks_equal, halve_, logits, sparsify, tiny, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint import compact
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS, MASKS, bytes_on_disk, hash_weights, read_training_, save, write_dense
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import ModelError, OutputError
from layerfold.model.masks import held, hold_

FORMAT = pytest.mark.parametrize("form", FORMATS)
UP = "transformer.h.{}.mlp.c_fc.weight"


def halved(family: str = "gpt2") -> Model:
    model = tiny(family)
    halve_(model.decoder)
    return Model(model.decoder, None, model.provenance)  # a tokenizer takes most of the time of a load


@FORMAT
def test_masks_come_back(form: Any, family: str, tmp_path: Path) -> None:
    model = halved(family)
    other = next(each for each in FORMATS if each != form)
    model.save(tmp_path / "one", format=form)
    load(tmp_path / "one").save(tmp_path / "two", format=other)
    for name in ("one", "two"):
        loaded = load(tmp_path / name)
        assert_masks_equal(held(loaded.decoder), held(model.decoder))
        assert torch.equal(logits(loaded.decoder), logits(model.decoder))
        assert loaded.sha256 == model.sha256
    dense = tmp_path / ("one" if form == "dense" else "two")
    plain, info = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(plain(input_ids=token_ids()).logits, logits(model.decoder))


def test_a_model_without_masks_says_nothing_of_them(tmp_path: Path) -> None:
    tiny("gpt2").save(tmp_path / "dense")
    tiny("gpt2").save(tmp_path / "compact", format="compact")
    assert not (tmp_path / "dense" / MASKS).exists()
    assert "masks" not in json.loads((tmp_path / "dense" / MANIFEST).read_text())
    assert not any("#" in name for name in load_file(tmp_path / "compact" / COMPACT_WEIGHTS))


def payload(path: Path) -> int:
    """Bytes of tensors in a file of safetensors: what follows the header, whose length stands in 8 bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_a_masked_weight_takes_what_is_kept_of_it_and_a_bit_each(family: str, tmp_path: Path) -> None:
    model, plain = halved(family), tiny(family)
    for name, each in (("masked", model), ("plain", plain)):
        each.save(tmp_path / name, format="compact")
    kept = held(model.decoder)
    values, bits = (sum(math.ceil(mask.numel() * part) for mask in kept.values()) for part in (4, 1 / 8))
    saved = values - 4 * sum(int(mask.sum()) for mask in kept.values())
    assert 0.45 < saved / values < 0.55
    sizes = {name: payload(tmp_path / name / COMPACT_WEIGHTS) for name in ("masked", "plain")}
    assert sizes["plain"] - sizes["masked"] == saved - bits
    assert bytes_on_disk(model.decoder, "compact") == (tmp_path / "masked" / COMPACT_WEIGHTS).stat().st_size
    assert bytes_on_disk(model.decoder, "compact") < bytes_on_disk(model.decoder, "dense") - 0.4 * values


@FORMAT
def test_a_negative_zero_and_a_kept_zero_come_back(form: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    weight = model.decoder.model.get_parameter(UP.format(1))
    kept = sparsify(weight)
    with torch.no_grad():
        (row, column), (other, last) = torch.nonzero(kept)[:2].tolist()
        weight[row, column], weight[other, last] = 0.0, -0.0  # by chance, and free to become something else
        weight[tuple(torch.nonzero(~kept)[0])] = -0.0
    hold_(model.decoder, {UP.format(1): kept})
    model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert_masks_equal(held(loaded.decoder), {UP.format(1): kept})
    assert torch.equal(logits(loaded.decoder), logits(model.decoder))
    found = loaded.decoder.model.get_parameter(UP.format(1))
    assert found[row, column].signbit().item() is False
    assert found[other, last].signbit().item() is True
    assert loaded.sha256 == model.sha256


@FORMAT
def test_half_precision_is_kept(form: Any, tmp_path: Path) -> None:
    model = halved("llama")
    model.decoder.model.bfloat16()
    model.save(tmp_path / "saved", format=form)
    assert_masks_equal(held(load(tmp_path / "saved").decoder), held(model.decoder))


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | changes))

    return edit


def shaped(shape: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        masks = json.loads((folder / MANIFEST).read_text())["masks"]
        edited(masks=masks | {UP.format(2): shape})(folder)

    return edit


def not_zero(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    weight = found[UP.format(2)]
    weight[tuple(torch.nonzero(weight == 0)[0])] = 1e-9
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


NOT_A_DICT: list[Any] = [[UP.format(2)], [], None, 0, "masks"]
BOTH: list[Any] = [
    (shaped([128, 32]), "c_fc.weight"),
    (shaped([32, 127]), r"512 bytes of bits for a mask of shape \(32, 127\); accepted: 508"),
    (shaped([-32, -128]), "-32"),
    (shaped(["32", 128]), "masks|read"),
    (shaped(4096), "masks|read"),
    (shaped(None), "masks|read"),
    (edited(masks={"transformer.h.9.x.weight": [2]}), r"transformer\.h\.9\.x\.weight"),
    *((edited(masks=value), "the masks|masks in") for value in NOT_A_DICT),
]
DENSE: list[Any] = [
    (lambda folder: (folder / MASKS).unlink(), "masks.*No such file.*layerfold_masks"),
    (lambda folder: os.truncate(folder / MASKS, 900), "layerfold_masks.bits' is damaged: SHA-256"),
    (lambda folder: (folder / MASKS).write_bytes(b""), "layerfold_masks.bits' is damaged: SHA-256"),
    (edited(masks_sha256="0" * 64), "layerfold_masks.bits' is damaged: .*recorded 000000000000"),
    (edited(masks_sha256=None), "layerfold_masks.bits' is damaged: SHA-256"),
    (not_zero, r"the masks in .* do not fit: the weight '.*2\.mlp.c_fc.weight' is not zero everywhere"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors weights"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked model in both forms."""
    folder = tmp_path_factory.mktemp("masks")
    for form in FORMATS:
        halved().save(folder / form, format=form)
    return folder


@pytest.mark.parametrize(
    ("form", "damage", "said"),
    [("dense", *each) for each in BOTH + DENSE] + [("compact", *each) for each in BOTH],
)
def test_damage_is_one_line(form: str, damage: Callable[[Path], None], said: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / form, tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ModelError, match=said) as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@FORMAT
def test_an_interrupted_save_of_masks_leaves_nothing(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (save, compact):
        monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OutputError, match=r"cannot write .*No space left on device") as caught:
        halved().save(tmp_path / "saved", format=form)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_are_read_under_the_masks_that_a_model_has(family: str, tmp_path: Path) -> None:
    model, other = halved(family).decoder, halved(family).decoder
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(2)
    write_dense(model.model, tmp_path / "weights")
    read_training_(other.model, tmp_path / "weights")
    assert hash_weights(other.model) == hash_weights(model.model)
    write_dense(tiny_model(family), tmp_path / "whole")
    with pytest.raises(ModelError, match=r"cannot be read: the weight '.*' is not zero everywhere that its mask says$"):
        read_training_(other.model, tmp_path / "whole")
