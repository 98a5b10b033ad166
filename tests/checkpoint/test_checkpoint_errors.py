"""Damaged checkpoints, and writing that is refused or interrupted."""

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
from tiny import logits, tiny

from layerfold.checkpoint import compact
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import FORMATS
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import LayerfoldError, ModelError, OutputError
from layerfold.files import check_folder
from layerfold.methods import Merge

Damage = Callable[[Path], object]


def edited(**changes: Any) -> Damage:
    """Change keys of the manifest; a key changed to None is left out."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text()) | changes
        kept = {key: value for key, value in manifest.items() if value is not None}
        (folder / MANIFEST).write_text(json.dumps(kept))

    return edit


def alias_of(target: Any) -> Damage:
    def edit(folder: Path) -> None:
        aliases = json.loads((folder / MANIFEST).read_text())["aliases"]
        edited(aliases=dict.fromkeys(aliases, target))(folder)

    return edit


def flipped(folder: Path) -> None:
    path = folder / COMPACT_WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncated(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1000)


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "is damaged: SHA-256"),
        (truncated(COMPACT_WEIGHTS), "is damaged: SHA-256"),
        (edited(sha256="0" * 64), "recorded 000000000000"),
        (edited(sha256=None), "is damaged: SHA-256"),
        (lambda folder: (folder / COMPACT_WEIGHTS).unlink(), "lacks its weights or its structure"),
        (edited(aliases=None), "lacks its weights or its structure"),
        (edited(aliases=["lm_head.weight"]), "lacks its weights or its structure"),
        (edited(aliases={}), "is damaged: SHA-256"),
        (alias_of("transformer.h.9.mlp.c_fc.weight"), "is damaged: SHA-256"),
        (alias_of("transformer.ln_f.bias"), "is damaged: SHA-256"),
        (alias_of(["no name"]), "is damaged: SHA-256"),
        (edited(format="dense"), "holds a compact checkpoint, and has no layerfold.json that says so"),
        (edited(format="folded"), "is of format 'folded' version 1"),
        (edited(format_version=99), "version 99; accepted: version 1"),
        (edited(format=None), "is damaged: KeyError"),
        (edited(provenance=[]), "accepted"),
        (edited(provenance={"base": "x", "color": "red", "steps": []}), "is damaged"),
        (edited(provenance={"steps": []}), "is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is damaged: JSONDecodeError"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged: TypeError"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "is damaged: UnicodeDecodeError"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be"),
    ],
)
def test_a_damaged_compact_checkpoint_is_refused(damage: Damage, said: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    Merge(n=2, align="none", tie=True).apply(model.decoder, None)
    model.save(tmp_path / "saved", format="compact")
    damage(tmp_path / "saved")
    assert said in refused(tmp_path / "saved")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated("model.safetensors"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors weights"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "only .bin, not loaded"),
    ],
)
def test_a_damaged_dense_checkpoint_is_refused(damage: Damage, said: str, tmp_path: Path) -> None:
    tiny("llama").save(tmp_path / "saved")
    damage(tmp_path / "saved")
    assert said in refused(tmp_path / "saved")


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_save_leaves_nothing(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compact, "save_file", full)
    monkeypatch.setattr(type(model.decoder.model), "save_pretrained", full)
    with pytest.raises(OutputError, match=r"cannot write .*No space left on device") as raised:
        model.save(tmp_path / "saved", format=form)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_from_the_keyboard_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compact, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny("gpt2").save(tmp_path / "saved", format="compact")
    assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    model.save(tmp_path / "saved")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compact, "save_file", full)
    with pytest.raises(OutputError):
        tiny("gpt2", seed=1).save(tmp_path / "saved", format="compact", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(logits(load(tmp_path / "saved").decoder), logits(model.decoder))


def test_a_folder_that_holds_something_is_refused_and_left_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty; --overwrite replaces it whole"):
        tiny("gpt2").save(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_overwrite_replaces_the_folder_whole(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    tiny("gpt2").save(folder, format="compact")
    model = tiny("llama")
    model.save(folder, overwrite=True)
    assert not (folder / COMPACT_WEIGHTS).exists()
    assert torch.equal(logits(load(folder).decoder), logits(model.decoder))
    assert list(tmp_path.iterdir()) == [folder]


def test_an_empty_folder_and_missing_parents_are_accepted(tmp_path: Path) -> None:
    model = tiny("gpt2")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        model.save(folder)
        assert torch.equal(logits(load(folder).decoder), logits(model.decoder))


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_file_is_refused(overwrite: bool, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_text("mine")
    with pytest.raises(OutputError, match="is a file; accepted: a folder that is empty or new"):
        tiny("gpt2").save(path, overwrite=overwrite)
    assert path.read_text() == "mine"


def test_a_parent_that_is_a_file_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LayerfoldError) as raised:
        tiny("gpt2").save(tmp_path / "file" / "saved")
    assert isinstance(raised.value, OutputError)
    assert "\n" not in str(raised.value)


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
