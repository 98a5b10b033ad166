"""What was written is read back before it is reported, or takes the place of anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Saved, made
from safetensors.torch import load_file, save_file
from tiny import assert_masks_equal, refused, tiny
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from layerfold.checkpoint import compact, readback, save
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import FORMATS
from layerfold.errors import InputError, OutputError
from layerfold.model.masks import held

Fault = Callable[[Path], None]


def weights_of(folder: Path) -> Path:
    return next(path for path in (folder / COMPACT_WEIGHTS, folder / "model.safetensors") if path.exists())


def changed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Fault:
    def fault(folder: Path) -> None:
        file = weights_of(folder)
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return fault


def one_value_changed(folder: Path) -> None:
    content = bytearray(weights_of(folder).read_bytes())
    content[-3] ^= 1
    weights_of(folder).write_bytes(content)


def config_changed(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 0.5'))


FAULTS: list[tuple[Fault, str]] = [
    (changed(lambda held: {name: held[name] for name in sorted(held)[:-1]}), "read back without"),
    (one_value_changed, "other values of"),
    (changed(lambda held: held | {"stray": torch.zeros(1)}), "'stray', which the model does not have"),
    (changed(lambda held: held | {max(held): torch.zeros(3)}), r"\(3,\) torch.float32, not"),
    (changed(lambda held: {name: each.half() for name, each in held.items()}), r"torch.float16, not .* torch.float32"),
    (config_changed, "reads back with layer_norm_epsilon 0.5, not 1e-05"),
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_fault_between_memory_and_disk_leaves_what_was_there(
    fault: Fault, said: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made("tied", "gpt2")
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
    with refused(OutputError, said):
        made("plain", "gpt2").save(tmp_path / "saved", format=form, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_masks_that_reach_the_disk_changed_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("masked", "gpt2")
    monkeypatch.setattr(
        save, "save_file", lambda packed, path: save_file({name: ~each for name, each in packed.items()}, path)
    )
    with pytest.raises(OutputError, match=r"'layerfold_masks\.bits' reads back with other values"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "{", "the tokenizer cannot be read back"),
        (lambda text: text.replace('"the"', '"thy"'), "the tokenizer"),
    ],
    ids=["damaged", "other words"],
)
def test_a_tokenizer_that_cannot_be_read_back_is_not_written(
    damage: Callable[[str], str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PreTrainedTokenizerFast.save_pretrained

    def save(tokenizer: Any, folder: Path) -> None:
        original(tokenizer, folder)
        (folder / "tokenizer.json").write_text(damage((folder / "tokenizer.json").read_text()))

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    with pytest.raises(OutputError, match=said):
        tiny("gpt2").save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_configuration_that_builds_another_model_is_found(tmp_path: Path) -> None:
    model = tiny("gpt2").decoder.model
    state = save.write_dense(model, tmp_path)
    readback.check_config(tmp_path, model, state)
    state["transformer.ln_f.weight"] = torch.zeros(3)
    with pytest.raises(OutputError, match=r"'transformer.ln_f.weight' as \(32,\), not \(3,\)"):
        readback.check_config(tmp_path, model, state)


def test_one_folder_holds_one_file_of_weights(saved: Saved) -> None:
    """Some readers take every .safetensors file of a folder for weights."""
    for form in FORMATS:
        assert len(list(saved("masked", "gpt2", form).glob("*.safetensors"))) == 1


def test_masks_under_the_name_that_earlier_versions_gave_them_are_read(copied: Saved) -> None:
    folder = copied("masked", "gpt2", "dense")
    (folder / save.MASKS).rename(folder / "layerfold_masks.safetensors")
    assert_masks_equal(held(load(folder).decoder), held(made("masked", "gpt2").decoder))


def test_the_compact_form_of_a_model_with_code_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr(readback, "is_remote", lambda loaded: True)
    with pytest.raises(InputError, match=r"which cannot hold the code of .* accepted: the dense form"):
        model.save(tmp_path / "saved", format="compact")
    assert not (tmp_path / "saved").exists()
