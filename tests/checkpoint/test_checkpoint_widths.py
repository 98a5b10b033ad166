"""A configuration holds one width for all FFNs: both forms of a checkpoint tell the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BLOCKS, assert_masks_equal, chosen, continued, halve_, logits, tiny, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS, bytes_on_disk, hash_weights, read_training_, write_dense
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import ModelError
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

FORMAT = pytest.mark.parametrize("form", FORMATS)
FEW = pytest.mark.parametrize("family", ["gpt2", "qwen3"])
WIDTHS = (30, 7, 48, 1)


def narrow(family: str, *widths: int) -> Model:
    """A model of which the FFNs have these widths; without a tokenizer, which takes most of the time of a load."""
    model = tiny(family)
    kept = {index: chosen(model.decoder, index, width) for index, width in enumerate(widths)}
    model.decoder.keep_neurons_(kept)
    assert model.decoder.d_ffn == widths
    return Model(model.decoder, None, model.provenance)


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-5, atol=1e-5)


def config_width(decoder: Decoder) -> int:
    width: int = getattr(decoder.model.config, decoder.family.d_ffn)
    return width


def plain(folder: Path) -> Any:
    """What transformers makes of a folder by itself."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


def test_ffns_of_one_width_are_what_the_configuration_says(family: str, tmp_path: Path) -> None:
    model = narrow(family, 12, 12, 12, 12)
    assert config_width(model.decoder) == 12
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        loaded = load(tmp_path / form)
        assert loaded.sha256 == model.sha256
        assert json.loads((tmp_path / form / MANIFEST).read_text())["d_ffn"] == {}
    reloaded = plain(tmp_path / "dense")
    assert Decoder(reloaded).d_ffn == (12,) * BLOCKS
    assert torch.equal(reloaded(token_ids()).logits, logits(model.decoder))
    smaller = tiny(family).decoder.size().parameters - model.decoder.size().parameters
    assert bytes_on_disk(tiny(family).decoder, "dense") - bytes_on_disk(model.decoder, "dense") >= 4 * smaller > 10_000


def test_ffns_of_many_widths_are_filled_up_to_the_widest_and_cut_again(family: str, tmp_path: Path) -> None:
    model = narrow(family, *WIDTHS)
    assert config_width(model.decoder) == 48
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        loaded = load(tmp_path / form)
        assert loaded.decoder.d_ffn == WIDTHS
        assert loaded.sha256 == model.sha256
        assert torch.equal(logits(loaded.decoder), logits(model.decoder))
        assert continued(loaded.decoder) == continued(model.decoder, use_cache=False)
        assert json.loads((tmp_path / form / MANIFEST).read_text())["d_ffn"] == {"0": 30, "1": 7, "3": 1}
    reloaded = plain(tmp_path / "dense")
    assert Decoder(reloaded).d_ffn == (48,) * BLOCKS
    assert close(reloaded(token_ids()).logits, logits(model.decoder))
    stored = load_file(tmp_path / "compact" / COMPACT_WEIGHTS)
    size = model.decoder.size()
    assert (
        sum(tensor.numel() for tensor in stored.values())
        == size.parameters
        == load(tmp_path / "dense").decoder.size().parameters
    )
    load(tmp_path / "dense").save(tmp_path / "again", format="compact")
    assert (tmp_path / "again" / COMPACT_WEIGHTS).read_bytes() == (tmp_path / "compact" / COMPACT_WEIGHTS).read_bytes()


@FEW
def test_dropping_the_widest_leaves_the_width_of_the_next(family: str, tmp_path: Path) -> None:
    for dropped in ("block", "ffn"):
        model = narrow(family, *WIDTHS)
        if dropped == "block":
            model.decoder.keep_([0, 1, 3])
            widths = (30, 7, 1)
        else:
            model.decoder.remove_("ffn", [2])
            widths = (30, 7, 0, 1)  # type: ignore[assignment]
        assert model.decoder.d_ffn == widths
        assert config_width(model.decoder) == 30
        for form in FORMATS:
            folder = tmp_path / f"{dropped}-{form}"
            model.save(folder, format=form)
            loaded = load(folder)
            assert loaded.decoder.d_ffn == widths
            assert loaded.sha256 == model.sha256
        assert close(plain(tmp_path / f"{dropped}-dense")(token_ids()).logits, logits(model.decoder))


@FORMAT
def test_widths_masks_and_what_is_removed_come_back_together(form: Any, family: str, tmp_path: Path) -> None:
    model = tiny(family)
    halve_(model.decoder)
    model.decoder.keep_neurons_({index: chosen(model.decoder, index, width) for index, width in enumerate(WIDTHS)})
    model.decoder.remove_("attention", [0, 3])
    model.decoder.remove_("ffn", [0])
    model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert loaded.decoder.d_ffn == (0, *WIDTHS[1:])
    assert loaded.decoder.removed_parts == model.decoder.removed_parts
    assert_masks_equal(held(loaded.decoder), held(model.decoder))
    assert loaded.sha256 == model.sha256
    if form == "dense":
        assert close(plain(tmp_path / "saved")(token_ids()).logits, logits(model.decoder))


@FEW
def test_without_any_ffn_the_configuration_keeps_its_width(family: str, tmp_path: Path) -> None:
    model = narrow(family, *WIDTHS)
    model.decoder.remove_("ffn", range(BLOCKS))
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        assert load(tmp_path / form).sha256 == model.sha256
    assert close(plain(tmp_path / "dense")(token_ids()).logits, logits(model.decoder))


@FEW
def test_weights_are_read_into_another_of_the_same_widths(family: str, tmp_path: Path) -> None:
    model, other = (narrow(family, *WIDTHS).decoder.model for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    write_dense(model, tmp_path / "weights")
    read_training_(other, tmp_path / "weights")
    assert hash_weights(other) == hash_weights(model)
    for widths, said in (((30, 7, 47, 1), r"48.* not .*47"), ((29, 7, 48, 1), "not zero where the model has nothing$")):
        with pytest.raises(ModelError, match=said):
            read_training_(narrow(family, *widths).decoder.model, tmp_path / "weights")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several widths in both forms."""
    folder = tmp_path_factory.mktemp("widths")
    for form in FORMATS:
        narrow("llama", *WIDTHS).save(folder / form, format=form)
    return folder


DAMAGED: list[Any] = [
    {"4": 3},
    {"-1": 3},
    {"0": 0},
    {"0": -3},
    {"0": 48},
    {"0": 99},
    {"0": 7.0},
    {"0": True},
    {"0": None},
    {"0": "7"},
    {"0": [7]},
    {"x": 7},
    {"0": 30, "1": 7, "2": 30, "3": 1},
    {"0": 7, "1": 7, "2": 7, "3": 7},
    [30, 7],
    "narrow",
    None,
    3,
]


@FORMAT
@pytest.mark.parametrize("damaged", DAMAGED, ids=str)
def test_damaged_widths_are_one_line(form: str, damaged: Any, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / form, tmp_path / "saved")
    path = tmp_path / "saved" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_ffn": damaged}))
    with pytest.raises(ModelError, match=r"layerfold\.json' is damaged: .") as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "damaged", "said"),
    [
        ("dense", {"0": 29, "1": 7, "3": 1}, r"'model\.layers\.0\.mlp\..*' is not zero where the model has nothing"),
        ("dense", {"0": 30, "1": 7, "2": 47}, r"'model\.layers\.2\.mlp\..*' is not zero where the model has nothing"),
        ("compact", {"0": 29, "1": 7, "3": 1}, r"cannot be read: .*size mismatch for model\.layers\.0\.mlp\."),
        ("compact", {}, r"cannot be read: .*size mismatch for model\.layers\.0\.mlp\."),
    ],
)
def test_widths_of_other_weights_are_one_line(form: str, damaged: Any, said: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / form, tmp_path / "saved")
    path = tmp_path / "saved" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_ffn": damaged}))
    with pytest.raises(ModelError, match=said) as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_weights_where_a_narrow_ffn_has_none_are_one_line(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "dense", tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    found["model.layers.1.mlp.up_proj.bias"][7] = 1e-9
    save_file(found, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.bias' is not zero where the model has noth"
    ):
        load(tmp_path / "saved")
