"""Loading: the embedded model, folders, GGUF files and the Hub, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Saved, configure
from tiny import logits, refused, tiny, tiny_model
from transformers import BertConfig, BertModel

import layerfold as package
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import default_corpus
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError, LayerfoldError, MissingExtraError, ModelError, OfflineError
from layerfold.methods import Collapse
from layerfold.model.decoder import Decoder


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("plain", "gpt2", "dense"), tmp_path / "model"))


def configured(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_pocket_is_what_its_description_says() -> None:
    pocket = load("pocket")
    assert (pocket.decoder.n_blocks, pocket.decoder.d_model, pocket.decoder.context) == (12, 192, 256)
    assert pocket.decoder.size().parameters == 6_960_768
    assert pocket.decoder.model.dtype == torch.float32
    assert pocket.require_tokenizer().eos_token_id == 0
    assert default_corpus(pocket) == "imdb"


def test_a_plain_folder_and_its_provenance(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    assert model.tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer"):
        model.require_tokenizer()
    assert torch.equal(logits(model.decoder), logits(tiny("llama").decoder))
    assert model.provenance.base_sha256 == model.sha256


def test_provenance_survives_saving_and_grows(tmp_path: Path, folder: Path) -> None:
    base = load(folder)
    once = package.compress(base, Collapse(n=2, align="none"))
    once.save(tmp_path / "once")
    twice = package.compress(load(tmp_path / "once"), Collapse(n=2, align="none"))
    assert [step["method"]["groups"] for step in twice.provenance.steps] == ["0-1,2-3", "0-1"]
    assert twice.provenance.base_sha256 == base.sha256
    assert twice.provenance.base == base.provenance.base
    assert base.decoder.n_blocks == 4, "compress edits a copy"


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ModelError, match=r"unsupported architecture 'bert'.*gpt2"):
        load(tmp_path / "bert")


@pytest.mark.parametrize("alone", [False, True], ids=["beside weights", "alone"])
def test_an_adapter_is_refused_and_stays(alone: bool, folder: Path, layerfold: Any) -> None:
    """transformers would put it on where peft is installed, and write nothing else when it saves."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["c_attn"]}))
    if alone:
        (folder / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    drop = ("compress", "drop", "--model", folder, "--blocks", "1", "--output-dir")
    for words in ((*drop, folder.parent / "small"), (*drop, folder, "--overwrite"), ("eval", folder)):
        done = layerfold(*words)
        assert done.code == 2
        assert done.err.startswith(f"layerfold: {str(folder)!r} holds an adapter (adapter_config.json)")
        assert done.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (folder.parent / "small").exists()


def test_a_pointer_that_nothing_reads_is_no_reason_to_refuse(folder: Path) -> None:
    """As a Mistral folder has beside its shards where only those were fetched."""
    (folder / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert load(folder).decoder.n_blocks == 4


def test_two_tensors_that_a_configuration_calls_tied_stay_two(tmp_path: Path) -> None:
    """transformers 5 keeps both; 4.x, and what is saved here, goes by the configuration."""
    model = tiny_model("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    configure(tmp_path / "model", tie_word_embeddings=True)
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded.decoder), logits(Decoder(model)))
    loaded.save(tmp_path / "saved")
    assert configured(tmp_path / "saved")["tie_word_embeddings"] is False


def test_a_base_on_another_drive_keeps_its_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("layerfold.checkpoint.load.os.path.relpath", refuse)
    kept = Provenance("base", location="D:/base").to_json(tmp_path)
    assert kept["location"] == "D:/base"


def test_code_that_is_named_and_not_there_is_not_named_again(folder: Path, tmp_path: Path) -> None:
    configure(folder, auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"})
    load(folder).save(tmp_path / "saved")
    assert "auto_map" not in configured(tmp_path / "saved")


def test_the_hub_unreachable_is_one_line_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerfold.checkpoint.load.hub_reachable", lambda: False)
    with pytest.raises(OfflineError, match=r"cannot be reached.*'gpt2'"):
        load("gpt2")
    with pytest.raises(OfflineError, match=r"'pokcet'.*did you mean 'pocket'\?"):
        load("pokcet")


def test_what_is_neither_a_folder_nor_an_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    for name in (tmp_path / "file.txt", "a/b/c", "no such/model", ""):
        with pytest.raises(LayerfoldError):
            load(name)
    with pytest.raises(InputError, match="accepted: pocket, an existing folder"):
        load("a/b/c")


@pytest.mark.parametrize("name", ["./mymodell", "../mymodell", "~/mymodell", "/mymodell", "./a/b"])
def test_a_path_is_never_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerfold.checkpoint.load.hub_reachable", lambda: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^no folder at "):
        load(name)


def test_the_folder_that_was_meant_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerfold.checkpoint.load.hub_reachable", lambda: False)
    monkeypatch.chdir(folder.parent)
    for name in ("./modell", "modell"):
        with pytest.raises(LayerfoldError, match=r"; did you mean 'model'\?$"):
            load(name)


def test_gguf_needs_its_package_and_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no file"):
        load(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path / "bad.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"layerfold\[gguf\]"):
        load(tmp_path / "bad.gguf")


def test_code_that_a_checkpoint_brings_is_not_run(folder: Path) -> None:
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    configure(folder, model_type="mine", auto_map=auto_map)
    (folder / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError):
        load(folder)


def test_a_moved_folder_loads(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "moved")
    assert load(tmp_path / "moved").provenance.base == Provenance("tiny").base


def test_code_that_a_checkpoint_brings_is_not_run_and_the_flag_is_named(tmp_path: Path) -> None:
    places = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": places}))
    (tmp_path / "configuration_mine.py").write_text("raise SystemExit('it was run')")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(ModelError, says="brings code of its own, which is not run; accepted: --trust-remote-code "):
        load(tmp_path)
