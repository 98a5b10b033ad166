"""A configuration holds one number of heads for all blocks: both forms of a checkpoint tell the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_masks_equal, chosen, continued, halve_, logits, shared, tiny, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS, read_training_, write_dense
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import ModelError
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

FORMAT = pytest.mark.parametrize("form", FORMATS)


def cut(model: Model) -> Model:
    """The same model of fewer heads in blocks 0 and 3, fewer neurons in 0 and 1, and without attention in 2."""
    decoder = model.decoder
    decoder.keep_heads_({0: torch.tensor([1]), 3: torch.tensor([0])})
    decoder.keep_neurons_({0: chosen(decoder, 0, 30), 1: chosen(decoder, 1, 7)})
    decoder.remove_("attention", [2])
    return Model(decoder, None, model.provenance)


@FORMAT
def test_heads_widths_and_what_is_removed_come_back_together(form: Any, family: str, tmp_path: Path) -> None:
    model = cut(tiny(family))
    whole, wide = (4, 128) if family == "gpt2" else (2, 48)
    assert model.decoder.heads == (1, whole, 0, 1)
    model.save(tmp_path / "saved", format=form)
    assert json.loads((tmp_path / "saved" / MANIFEST).read_text())["heads"] == {"0": 1, "3": 1}
    loaded = load(tmp_path / "saved")
    assert loaded.decoder.heads == model.decoder.heads
    assert loaded.decoder.d_ffn == model.decoder.d_ffn == (30, 7, wide, wide)
    assert loaded.decoder.removed_parts == model.decoder.removed_parts
    assert loaded.sha256 == model.sha256
    assert loaded.decoder.size() == model.decoder.size()
    assert torch.equal(logits(loaded.decoder), logits(model.decoder))
    assert continued(loaded.decoder) == continued(model.decoder, use_cache=False)


def test_plain_transformers_computes_the_same_from_the_dense_form(family: str, tmp_path: Path) -> None:
    model = cut(tiny(family))
    model.save(tmp_path / "dense")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert len(set(Decoder(plain).heads)) == 1
    assert torch.allclose(plain(token_ids()).logits, logits(model.decoder), rtol=1e-5, atol=1e-5)


def test_the_compact_form_holds_the_parameters_that_there_are(family: str, tmp_path: Path) -> None:
    model = cut(tiny(family))
    model.save(tmp_path / "one", format="compact")
    stored = load_file(tmp_path / "one" / COMPACT_WEIGHTS)
    assert sum(tensor.numel() for tensor in stored.values()) == model.decoder.size().parameters
    model.save(tmp_path / "dense")
    load(tmp_path / "dense").save(tmp_path / "two", format="compact")
    assert (tmp_path / "two" / COMPACT_WEIGHTS).read_bytes() == (tmp_path / "one" / COMPACT_WEIGHTS).read_bytes()


@FORMAT
def test_masks_come_back_as_they_were_cut(form: Any, family: str, tmp_path: Path) -> None:
    model = tiny(family)
    halve_(model.decoder)
    cut(model).save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert_masks_equal(held(loaded.decoder), held(model.decoder))
    assert torch.equal(logits(loaded.decoder), logits(model.decoder))


@FORMAT
def test_heads_and_shared_ffns_come_back_together(form: Any, family: str, tmp_path: Path) -> None:
    model = shared(tiny(family))
    model.decoder.keep_heads_({0: torch.tensor([1])})
    model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert loaded.decoder.heads == model.decoder.heads
    assert torch.allclose(logits(loaded.decoder), logits(model.decoder), rtol=1e-5, atol=1e-5)


@FORMAT
def test_all_blocks_may_have_fewer_heads(form: Any, family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.decoder.keep_heads_(dict.fromkeys(range(4), torch.tensor([1])))
    model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert loaded.decoder.heads == (1,) * 4
    assert loaded.sha256 == model.sha256


def test_weights_are_read_into_another_of_the_same_heads_alone(family: str, tmp_path: Path) -> None:
    model, other = cut(tiny(family)), cut(tiny(family, seed=1))
    write_dense(model.decoder.model, tmp_path / "weights")
    read_training_(other.decoder.model, tmp_path / "weights")
    assert torch.equal(logits(other.decoder), logits(model.decoder))
    other.decoder.keep_heads_({1: torch.tensor([0])})
    with pytest.raises(ModelError, match=r"not zero where the model has nothing$"):
        read_training_(other.decoder.model, tmp_path / "weights")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several numbers of heads in both forms."""
    folder = tmp_path_factory.mktemp("heads")
    for name in ("gpt2", "llama"):
        for form in FORMATS:
            cut(tiny(name)).save(folder / name / form, format=form)
    return folder


def damaged(folder: Path, heads: Any, to: Path) -> Path:
    shutil.copytree(folder, to)
    manifest = json.loads((to / MANIFEST).read_text())
    (to / MANIFEST).write_text(json.dumps(manifest | {"heads": heads}))
    return to


DAMAGED: list[Any] = [
    *({"0": wrong} for wrong in (0, -1, 2, 99, 1.0, True, None, "1", [1])),
    *({wrong: 1} for wrong in ("2", "4", "-1", "x")),
    [1, 1],
    "few",
    None,
    3,
]


@FORMAT
@pytest.mark.parametrize("heads", DAMAGED, ids=str)
def test_damaged_heads_are_one_line(form: str, heads: Any, saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved / "llama" / form, heads, tmp_path / "saved")
    with pytest.raises(ModelError, match=r"layerfold\.json' is damaged: .") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "form", "heads", "said"),
    [
        ("llama", "dense", {"0": 1, "1": 1, "3": 1}, r"layers\.1\.self_attn\..*' is not zero where the model has noth"),
        ("gpt2", "dense", {"0": 1, "1": 3, "3": 1}, r"h\.1\.attn\.c_.*' is not zero where the model has nothing$"),
        ("llama", "compact", {}, r"cannot be read: .*size mismatch for model\.layers\.0\.self_attn\."),
        ("gpt2", "compact", {"0": 1, "3": 2}, r"cannot be read: .*size mismatch for transformer\.h\.3\.attn\."),
    ],
)
def test_heads_of_other_weights_are_one_line(
    name: str, form: str, heads: Any, said: str, saved: Path, tmp_path: Path
) -> None:
    folder = damaged(saved / name / form, heads, tmp_path / "saved")
    with pytest.raises(ModelError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "place"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.weight", (16, 0)),
        ("llama", "model.layers.0.self_attn.k_proj.bias", (8,)),
        ("llama", "model.layers.0.self_attn.o_proj.weight", (0, 16)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (0, 8)),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", (32 + 31,)),
        ("gpt2", "transformer.h.0.attn.c_proj.weight", (8, 0)),
        ("gpt2", "transformer.h.2.attn.c_attn.weight", (0, 0)),
    ],
)
def test_weights_where_there_are_no_heads_are_one_line(
    name: str, tensor: str, place: Any, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / name / "dense", tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert not found[tensor][place]
    found[tensor][place] = 1e-9
    save_file(found, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"'{tensor}' is not zero where the model has nothing$"):
        load(tmp_path / "saved")
