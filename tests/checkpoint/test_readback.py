"""What was written is read back before it is reported, or takes the place of anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import halve_, logits, shared, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from layerfold.checkpoint import compact, readback, save
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import FORMATS
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import InputError, OutputError

Fault = Callable[[Path], None]


def weights_of(folder: Path) -> Path:
    return next(path for path in (folder / COMPACT_WEIGHTS, folder / "model.safetensors") if path.exists())


def without_one(folder: Path) -> None:
    file = weights_of(folder)
    tensors = load_file(file)
    del tensors[max(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


def one_value_changed(folder: Path) -> None:
    file = weights_of(folder)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def one_more(folder: Path) -> None:
    file = weights_of(folder)
    save_file(load_file(file) | {"stray": torch.zeros(1)}, file, metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    file = weights_of(folder)
    tensors = load_file(file)
    tensors[max(tensors)] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})


def other_dtype(folder: Path) -> None:
    file = weights_of(folder)
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def config_changed(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 0.5'))


FAULTS: list[tuple[Fault, str]] = [
    (without_one, "read back without"),
    (one_value_changed, "other values of"),
    (one_more, "'stray', which is no tensor of the model"),
    (other_shape, r"\(3,\) torch.float32, not"),
    (other_dtype, r"torch.float16, not .* torch.float32"),
    (config_changed, "reads back with layer_norm_epsilon 0.5, not 1e-05"),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_fault_between_memory_and_disk_leaves_what_was_there(
    fault: Fault, said: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny("gpt2", seed=1)
    before.save(tmp_path / "saved")
    old = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    original = PreTrainedModel.save_pretrained, compact.save_file

    def save_pretrained(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
        original[0](model, folder, **settings)
        fault(folder)

    def save(tensors: Any, path: Path, **settings: Any) -> None:
        original[1](tensors, path, **settings)
        fault(path.parent)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    monkeypatch.setattr(compact, "save_file", save)
    with pytest.raises(OutputError, match=said) as caught:
        tiny("gpt2").save(tmp_path / "saved", format=form, overwrite=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_masks_that_reach_the_disk_changed_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    halve_(model.decoder)
    monkeypatch.setattr(
        save, "save_file", lambda packed, path: save_file({name: ~each for name, each in packed.items()}, path)
    )
    with pytest.raises(OutputError, match=r"'layerfold_masks\.bits' reads back with other values"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read back"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace('"the"', '"thy"')
            ),
            "the tokenizer",
        ),
    ],
    ids=["damaged", "other words"],
)
def test_a_tokenizer_that_cannot_be_read_back_is_not_written(
    damage: Fault, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PreTrainedTokenizerFast.save_pretrained

    def save(tokenizer: Any, folder: Path) -> None:
        original(tokenizer, folder)
        damage(folder)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    with pytest.raises(OutputError, match=said):
        tiny("gpt2").save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_sound_reads_back_in_every_family(family: str, form: Any, tmp_path: Path) -> None:
    model = shared(tiny(family)) if form == "compact" else tiny(family)
    halve_(model.decoder)
    assert model.save(tmp_path / "saved", format=form) == f"{form}, float32"
    assert torch.equal(logits(load(tmp_path / "saved").decoder), logits(model.decoder))


def test_a_configuration_that_builds_another_model_is_found(tmp_path: Path) -> None:
    model = tiny("gpt2").decoder.model
    state = save.write_dense(model, tmp_path)
    readback.check_config(tmp_path, model, state)
    state["transformer.ln_f.weight"] = torch.zeros(3)
    with pytest.raises(OutputError, match=r"'transformer.ln_f.weight' as \(32,\), not \(3,\)"):
        readback.check_config(tmp_path, model, state)


def test_one_folder_holds_one_file_of_weights(tmp_path: Path) -> None:
    """Some readers take every .safetensors file of a folder for weights."""
    model = tiny("gpt2")
    halve_(model.decoder)
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        assert len(list((tmp_path / form).glob("*.safetensors"))) == 1


def test_masks_under_the_name_that_earlier_versions_gave_them_are_read(tmp_path: Path) -> None:
    model = tiny("gpt2")
    kept = halve_(model.decoder)
    model.save(tmp_path / "saved")
    (tmp_path / "saved" / "layerfold_masks.bits").rename(tmp_path / "saved" / "layerfold_masks.safetensors")
    loaded = load(tmp_path / "saved")
    assert {name: mask.sum().item() for name, mask in save.masks.held(loaded.decoder).items()} == {
        name: mask.sum().item() for name, mask in kept.items()
    }


def test_the_manifest_names_the_three_dtypes(tmp_path: Path) -> None:
    tiny("gpt2").save(tmp_path / "saved", dtype=torch.bfloat16)
    manifest = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    assert manifest["dtype"] == {"loaded": "float32", "computed": "float32", "saved": "bfloat16"}


def test_the_compact_form_of_a_model_with_code_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr(readback, "is_remote", lambda loaded: True)
    with pytest.raises(InputError, match=r"whose code its checkpoint brought along .* accepted: the dense form"):
        model.save(tmp_path / "saved", format="compact")
    assert not (tmp_path / "saved").exists()
