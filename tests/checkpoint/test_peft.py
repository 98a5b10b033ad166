"""A model that shares FFNs as peft loads it: a plain base and a LoRA adapter."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny import logits, refused, shared, tiny, token_ids, unequal
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.peft import ADAPTER, BASE, save_adapter
from layerfold.checkpoint.save import hash_weights
from layerfold.errors import InputError, MissingExtraError, OutputError
from layerfold.model import deltas


def biases_of_their_own(model: Model) -> Model:
    """Give each block's FFN biases that no other has."""
    for number, module in enumerate(deltas.factored(model.decoder).values()):
        if module.bias is not None:
            module.bias.detach().add_(number)
    return model


def sharing(family: str = "gpt2", **changes: Any) -> Model:
    """Four blocks, the second and third of which share with deltas of ranks 0, 1 and 2."""
    return biases_of_their_own(unequal(shared(tiny(family, **changes), window="1:2", rank=3)))


def by_peft(base: Any, folder: Path) -> Any:
    """What peft makes of an adapter and a model, or of an adapter alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_activation_checkpointing", FutureWarning)  # peft's, of transformers
        return (
            AutoPeftModelForCausalLM.from_pretrained(folder)
            if base is None
            else PeftModel.from_pretrained(base, folder)
        )


@torch.no_grad()
def given(model: Any) -> Tensor:
    return model(input_ids=token_ids()).logits  # type: ignore[no-any-return]


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def image(model: Model) -> list[Any]:
    """All of a model that a caller could notice a change in."""
    own = model.decoder.model
    flags = [(name, each.requires_grad, id(each)) for name, each in own.named_parameters()]
    modes = [each.training for each in own.modules()]
    return [hash_weights(own), flags, own.name_or_path, own.config.to_dict(), modes]


def assert_base(plain: Any, model: Model, folder: Path) -> None:
    """The shared weights with biases of each block, and beside them nothing but A and B."""
    state = plain.state_dict()
    for path, module in deltas.factored(model.decoder).items():
        stored = state[f"{path}.weight"]
        assert torch.equal(stored if issubclass(module.stock, torch.nn.Linear) else stored.T, module.weight)
        assert module.bias is None or torch.equal(state[f"{path}.bias"], module.bias)
    steps = load(folder / BASE).provenance.steps
    assert [step["method"]["name"] for step in steps] == ["without deltas"]
    own = sum(tensor.numel() for tensor in load_file(folder / ADAPTER / "adapter_model.safetensors").values())
    factors = [(each.a, each.b) for each in deltas.factored(model.decoder).values()]
    assert own == sum(tensor.numel() for pair in factors for tensor in pair)


def test_peft_computes_what_the_model_does(family: str, tmp_path: Path) -> None:
    model = sharing(family)
    model.decoder.model.train()
    next(model.decoder.model.parameters()).requires_grad_(False)
    assert {0, 1, 2} == set(deltas.ranks(model.decoder).values())
    before = image(model)
    save_adapter(model, tmp_path)
    assert image(model) == before, "the model is left as it was"
    model.decoder.model.eval()
    expected = logits(model.decoder)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / BASE, output_loading_info=True)
    assert not any(info.values())
    assert_base(plain, model, tmp_path)
    assert apart(given(plain), expected) > 1e-3, "the deltas are the adapter's"
    loaded = by_peft(plain, tmp_path / ADAPTER)
    assert apart(given(loaded), expected) < 1e-5
    assert apart(given(by_peft(None, tmp_path / ADAPTER)), expected) < 1e-5
    model.save(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert apart(given(loaded.merge_and_unload()), given(dense)) < 1e-5


def test_windows_of_many_matrices_and_several_windows(tmp_path: Path) -> None:
    """More matrices than peft lists one by one, of numbers of which one begins as another: 1 and 11."""
    model = tiny("llama", num_hidden_layers=12)
    for window in ("0:5", "6:6"):
        shared(model, window=window, rank=2)
    biases_of_their_own(unequal(model))
    save_adapter(model, tmp_path)
    loaded = by_peft(None, tmp_path / ADAPTER)
    assert apart(given(loaded), logits(model.decoder)) < 1e-5
    adapted = {name.split(".lora_A")[0] for name, _ in loaded.named_parameters() if ".lora_A" in name}
    assert len(adapted) == sum(rank > 0 for rank in deltas.ranks(model.decoder).values()) == 22


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_what_is_gone_or_narrower_is_so_in_the_base(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.decoder.keep_neurons_({index: torch.arange(40) for index in (1, 2)})
    model.decoder.remove_("attention", [2])
    model = biases_of_their_own(unequal(shared(model, window="1:2", rank=3)))
    save_adapter(model, tmp_path)
    assert apart(given(AutoModelForCausalLM.from_pretrained(tmp_path / BASE)), logits(model.decoder)) > 1e-3
    loaded = by_peft(None, tmp_path / ADAPTER)
    assert apart(given(loaded), logits(model.decoder)) < 1e-5


@pytest.mark.parametrize("make", [tiny, lambda name: shared(tiny(name), rank=0)], ids=["plain", "of rank 0"])
def test_a_model_without_deltas_is_refused(make: Any, tmp_path: Path) -> None:
    with refused(InputError, r"the model has none; accepted: .* in the compact form"):
        save_adapter(make("gpt2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_plain_tools_read_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = sharing()
    model.decoder.model.name_or_path = "/elsewhere/model"
    save_adapter(model, Path("out"))
    written = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    assert {name for name in written if name.startswith(ADAPTER)} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert all(name.endswith((".json", ".safetensors", ".jinja", "base/README.md")) for name in written), (
        "nothing pickled"
    )
    for path in Path("out").rglob("*.json"):
        for stranger in (str(tmp_path), "/elsewhere", ".tmp", str(Path.home())):
            assert path.name == "tokenizer.json" or stranger not in path.read_text(), path
    assert json.loads(Path("out/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "out/base"
    modes = {path: path.stat().st_mode & 0o777 for path in Path("out").rglob("*")}
    assert len({mode for path, mode in modes.items() if path.is_file()}) == 1


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [BASE, ADAPTER])
def test_a_folder_that_holds_something_is_left_alone_unless_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "notes.txt").write_text("mine")
    (tmp_path / "out" / "beside.txt").write_text("mine too")
    before = content(tmp_path)
    with refused(OutputError, f"{name}' is not empty; --overwrite replaces it whole"):
        save_adapter(sharing(), tmp_path / "out")
    assert content(tmp_path) == before, "neither of the two is written"
    save_adapter(sharing(), tmp_path / "out", overwrite=True)
    after = content(tmp_path)
    assert f"out/{name}/notes.txt" not in after
    assert after["out/beside.txt"] == b"mine too"
    save_adapter(sharing(), tmp_path / "out", overwrite=True)


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with refused(OutputError, "out"):
        save_adapter(sharing(), tmp_path / "out", overwrite=True)
    assert content(tmp_path) == {"out": b"mine"}


def test_without_peft_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else original(name, *rest)
    )
    with pytest.raises(
        MissingExtraError, match=r"the package 'peft' is not installed: pip install 'layerfold\[peft\]'$"
    ):
        save_adapter(sharing(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_half_way_leaves_no_half_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_pretrained(self: Any, folder: str, **_: Any) -> None:
        (Path(folder) / "adapter_config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", save_pretrained)
    with refused(OutputError, r"cannot write .* No space left"):
        save_adapter(sharing(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [BASE]


# As typed


def test_export_writes_both_and_says_so(layerfold: Any, tmp_path: Path) -> None:
    model = sharing()
    model.save(tmp_path / "model", format="compact")
    words = ("export", tmp_path / "model", "--to", "peft", "--output-dir", tmp_path / "out")
    done = layerfold(*words)
    assert (done.code, done.out) == (0, f"wrote {tmp_path / 'out'} (peft)\n"), done.err
    assert "Warning" not in done.err
    assert apart(given(by_peft(None, tmp_path / "out" / ADAPTER)), logits(model.decoder)) < 1e-5
    before = content(tmp_path)
    refused = layerfold(*words)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "base' is not empty; --overwrite replaces it whole" in refused.err
    assert content(tmp_path) == before
    assert layerfold(*words, "--overwrite").code == 0


def test_export_of_a_dense_form_is_refused(layerfold: Any, tmp_path: Path) -> None:
    sharing().save(tmp_path / "model")
    done = layerfold("export", tmp_path / "model", "--to", "peft", "--output-dir", tmp_path / "out")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "the dense form has them multiplied out" in done.err
    assert not (tmp_path / "out").exists()
