"""Every method, repair, search and measure on another device, and in every precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Elsewhere, elsewhere, moved
from safetensors.torch import load_file
from tiny import FAMILY_NAMES, tiny, token_ids, windows
from transformers import AutoModelForCausalLM

from layerfold import (
    Calibration,
    DropSearch,
    Finetune,
    InputError,
    LayerfoldError,
    Model,
    Plan,
    WindowSearch,
    compress,
    evaluate,
    recover,
)
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import hash_weights
from layerfold.checkpoint.structure import MANIFEST
from layerfold.checkpoint.weights import cast_, in_dtype
from layerfold.environment import DEVICE_VARIABLE, DTYPE_VARIABLE, device_name, device_of, dtype_of
from layerfold.inference.decoding import continue_each, greedy
from layerfold.inference.scoring import window_nats
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.model.decoder import Decoder, check_precision
from layerfold.recovery import Distill
from layerfold.recovery.teacher import counterparts, default_teacher
from layerfold.repair.refit import refit_
from layerfold.repair.rescale import rescale_
from layerfold.repair.spans import spanning
from layerfold.search.scores import Scores
from layerfold.search.stages import Lacking

METHODS: dict[str, Method] = {
    "merge": Merge(n=2),
    "merge-tied": Merge(n=2, tie=True),
    "collapse": Collapse(n=2, anchor="last"),
    "drop": Drop(blocks="1"),
    "magnitude": Prune(sparsity=0.3),
    "wanda": Prune(sparsity=0.3, criterion="wanda"),
    "wanda-global": Prune(sparsity=0.3, criterion="wanda", scope="global"),
    "sparsegpt": Prune(sparsity=0.3, criterion="sparsegpt"),
    "two-of-four": Prune(structure="2:4", criterion="sparsegpt"),
    "neurons": Prune(sparsity=0.3, criterion="magnitude", structure="neurons"),
    "neurons-wanda": Prune(sparsity=0.3, criterion="wanda", structure="neurons"),
    "neurons-sparsegpt": Prune(sparsity=0.3, criterion="sparsegpt", structure="neurons"),
    "neurons+heads": Prune(sparsity=0.3, criterion="taylor", structure="neurons+heads"),
    "share": Share(window="0:2", rank=2),
    "share-zero": Share(window="0:2", rank=2, init="zero"),
    "share-allotted": Share(window="0:2", rank=2, ranks="allotted", base="mean"),
}
REPAIRED = ("drop", "collapse", "neurons", "share", "merge-tied")
HALF = {torch.bfloat16: 0.02, torch.float16: 0.02, torch.float64: 1e-4}
"""Precisions, and how far nats may be from float32's, as a share: rounding makes some methods choose otherwise."""
PRECISIONS = [(name, torch.bfloat16) for name in FAMILY_NAMES] + [
    ("llama", torch.float16),
    ("gpt2", torch.float16),
    ("gpt2", torch.float64),
]


@dataclass
class Made:
    nats: float
    repaired: float
    zeros: dict[str, torch.Tensor]


def made(decoder: Decoder, name: str) -> Made:
    """Compress, score, repair and score again."""
    cut, original = windows(), decoder.copy()
    notes = METHODS[name].apply(decoder, Calibration(decoder, cut))
    assert notes is not None
    zeros = {key: (each == 0).cpu() for key, each in decoder.model.state_dict().items()}
    nats = float(window_nats(decoder, cut).sum())
    if name not in REPAIRED:
        return Made(nats, nats, zeros)
    kept = {"drop": [0, 2, 3], "collapse": [1, 3]}.get(name, [*range(original.n_blocks)])
    refit_(decoder, original, [*kept[1:], original.n_blocks], cut, attention=True)
    return Made(nats, float(window_nats(decoder, cut).sum()), zeros)


@pytest.fixture
def there() -> Iterator[None]:
    with elsewhere():
        yield


@pytest.mark.parametrize(
    ("family", "name"), [*(("gpt2", name) for name in METHODS), ("qwen3", "share"), ("llama", "neurons+heads")]
)
def test_another_device_computes_the_same(family: str, name: str, there: None) -> None:
    here, apart = tiny(family).decoder, tiny(family).decoder
    moved(apart.model)
    assert apart.device == DEVICE
    one, two = made(here, name), made(apart, name)
    assert two.nats == pytest.approx(one.nats, rel=1e-6)
    assert two.repaired == pytest.approx(one.repaired, rel=1e-5)
    assert one.zeros.keys() == two.zeros.keys()
    assert all(torch.equal(one.zeros[key], two.zeros[key]) for key in one.zeros)
    assert all(isinstance(each, Elsewhere) for each in apart.model.parameters())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "dtype"), PRECISIONS, ids=str)
def test_every_method_and_repair_works_in_every_precision(family: str, name: str, dtype: torch.dtype) -> None:
    other = tiny(family).decoder
    cast_(other.model, dtype)
    exact = other.copy()
    cast_(exact.model, torch.float32)  # the same rounded weights, computed exactly
    one, two = made(exact, name), made(other, name)
    assert {each.dtype for each in other.model.parameters()} == {dtype}
    assert two.nats == pytest.approx(one.nats, rel=HALF[dtype])
    assert two.repaired == pytest.approx(one.repaired, rel=HALF[dtype])


def test_what_else_reads_a_model_works_on_another_device(there: None) -> None:
    here, apart = tiny("llama").decoder, tiny("llama").decoder
    moved(apart.model)
    cut = windows()
    assert hash_weights(here.model) == hash_weights(apart.model)
    for decoder in (here, apart):
        decoder.model.generation_config.eos_token_id = None
    assert greedy(apart, token_ids(1, 4), 6).tolist() == greedy(here, token_ids(1, 4), 6).tolist()
    assert continue_each(apart, [[1, 2], [3]], 4, None) == continue_each(here, [[1, 2], [3]], 4, None)
    found = []
    for decoder in (here, apart):
        scores = Scores(Lacking(decoder), cut)
        scores.measure([(), (0,), (1, 2)])
        found.append([scores.values(lacking, kind) for lacking in ((0,), (1, 2)) for kind in ("perplexity", "kl")])
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
    spans = [spanning(decoder, cut, [2]) for decoder in (here, apart)]
    nats = [float(window_nats(each[2], cut).sum()) for each in spans]
    assert nats[1] == pytest.approx(nats[0], rel=1e-5)
    rescaled = [tiny("llama").decoder, tiny("llama", seed=1).decoder]
    moved(rescaled[0].model)
    moved(rescaled[1].model)
    (done,) = rescale_(rescaled[0], rescaled[1], {1: [(1, None)]}, cut)
    assert math.isfinite(done.shrunk)


def searched(kind: str, model: Model, text: str) -> float:
    """Perplexity of the first candidate of a search, or of what a method that searches, or a plan, makes."""
    few = {"corpus": text, "tokens": 600, "test_tokens": 300, "calibration_tokens": 600}
    if kind == "drop":
        return DropSearch(**few, rounds=0, objective="repaired")(model).candidates[0].perplexity
    if kind == "window":
        return WindowSearch(**few, k=(2, 2), share=Share(rank=2))(model).candidates[0].perplexity
    if kind == "plan":
        plan = Plan(**few, parameters="70%", rounds=0, points=0, finalists=1, rivals=False, repair_tokens=600)
        return plan(model)[0].winner.trial.perplexity
    made = compress(model, Merge(groups="auto"), corpus=text, tokens=600, repair="rescale", repair_tokens=600)
    return evaluate(made, ["perplexity"], corpus=text, split="test")["perplexity"].value


@pytest.mark.parametrize("kind", ["drop", "window", "groups", "plan"])
def test_searches_and_plans_find_the_same_on_another_device(kind: str, study_corpus: str, there: None) -> None:
    here, apart = tiny("llama"), tiny("llama")
    moved(apart.decoder.model)
    assert searched(kind, apart, study_corpus) == pytest.approx(searched(kind, here, study_corpus), rel=1e-4)


def test_where_devices_meet_is_an_error(there: None) -> None:
    apart = torch.ones(2).to(DEVICE)
    assert apart.device == DEVICE
    with pytest.raises(RuntimeError, match="cpu and cuda"):
        apart + torch.ones(2)
    with pytest.raises((TypeError, RuntimeError)):
        apart.numpy()
    with pytest.raises(RuntimeError, match="cpu and cuda"):
        apart[torch.tensor([0, 1])] = torch.ones(2)
    apart[torch.tensor([0])] = 1.0
    assert (apart + 1).tolist() == [2, 2]
    assert type(apart.cpu()) is torch.Tensor


def test_weights_of_two_precisions_are_refused() -> None:
    decoder = tiny("gpt2").decoder
    decoder.blocks[1].ffn.up.module.half()
    with pytest.raises(InputError, match=r"float32 and .*float16; accepted: one dtype"):
        check_precision(decoder)


class TestChoice:
    def test_the_processor_is_taken_where_there_is_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
        assert device_of().type == device_of("auto").type == device_of("cpu").type == "cpu"
        assert device_name(device_of()) == "cpu"
        with pytest.raises(InputError, match="'cuda:1', and of such GPUs torch finds none; accepted"):
            device_of("cuda:1")
        with pytest.raises(InputError, match="no Apple GPU; accepted: auto, cpu"):
            device_of("mps")

    def test_a_gpu_is_taken_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        assert device_of("auto") == device_of("cuda") == torch.device("cuda", 0)
        assert device_of("cuda:1") == torch.device("cuda", 1)
        assert device_name(device_of("cuda:1")) == "Some GPU"
        with pytest.raises(InputError, match=r"'cuda:2', and of such GPUs torch finds 2 \(cuda:0 ... cuda:1\)"):
            device_of("cuda:2")
        monkeypatch.setenv(DEVICE_VARIABLE, "cuda:1")
        assert device_of() == torch.device("cuda", 1)
        assert device_of("cpu").type == "cpu"
        assert dtype_of("auto", device_of(), torch.float16) == torch.float16
        assert dtype_of("auto", device_of(), torch.bfloat16) == torch.float32
        with pytest.raises(InputError, match="'bfloat16', which Some GPU cannot compute in"):
            dtype_of("bfloat16", device_of(), torch.float32)

    @pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", "cuda:", ""])
    def test_an_unknown_device_is_one_line(self, name: str) -> None:
        with pytest.raises(InputError, match=r"device .*(accepted|did you mean)"):
            device_of(name)

    def test_the_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = torch.device("cpu")
        assert dtype_of(None, cpu, torch.bfloat16) == dtype_of("auto", cpu, torch.float16) == torch.float32
        assert dtype_of("bfloat16", cpu, torch.float32) == torch.bfloat16
        monkeypatch.setenv(DTYPE_VARIABLE, "float16")
        assert dtype_of(None, cpu, torch.float32) == torch.float16
        with pytest.raises(InputError, match=r"dtype .*bfloat16"):
            dtype_of("bfloat61", cpu, torch.float32)


def test_a_model_is_loaded_in_the_precision_asked_for_and_saved_in_its_own(tmp_path: Path) -> None:
    plain, half = load("pocket"), load("pocket", dtype="bfloat16")
    assert (half.decoder.dtype, half.decoder.device.type) == (torch.bfloat16, "cpu")
    assert half.decoder.computed == {"device": "cpu", "dtype": "bfloat16"}
    assert plain.decoder.computed == {}
    assert half.save(tmp_path / "half") == plain.save(tmp_path / "plain") == "dense, float16"
    assert half.sha256 == plain.sha256 == half.provenance.base_sha256, "a model is known by what its checkpoint holds"
    with pytest.raises(InputError, match="device"):
        load("pocket", device="gpu")
    with pytest.raises(InputError, match="dtype"):
        load("pocket", dtype="int8")


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_teacher_is_found_whatever_the_precision(form: Any, tmp_path: Path) -> None:
    tiny("gpt2").save(tmp_path / "base")
    (tmp_path / "base" / MANIFEST).unlink()  # anybody's checkpoint
    base = load(tmp_path / "base", dtype="bfloat16")
    Drop(blocks="1").apply(base.decoder, None)
    base.with_step({"method": {"name": "drop"}, "kept_blocks": [0, 2, 3]}).save(tmp_path / "small", format=form)
    small = load(tmp_path / "small")
    assert small.decoder.dtype == torch.float32
    teacher = default_teacher(small)
    assert teacher.decoder.n_blocks == 4
    assert counterparts(small, teacher, Distill(tokens=64)) == (1, 2, 3)


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_half_precision_checkpoint_is_read_as_it_is_where_that_is_computed_in(form: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.decoder.model.bfloat16()
    model.save(tmp_path / "half", format=form)
    exact, half = load(tmp_path / "half"), load(tmp_path / "half", dtype="bfloat16")
    assert (exact.decoder.dtype, half.decoder.dtype) == (torch.float32, torch.bfloat16)
    assert exact.saved_dtype == half.saved_dtype == torch.bfloat16
    assert exact.sha256 == half.sha256
    for one, two in zip(exact.decoder.model.parameters(), half.decoder.model.parameters(), strict=True):
        assert torch.equal(one, two.float())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_computes_what_transformers_does_far_into_a_text(family: str, tmp_path: Path) -> None:
    """Positions come from frequencies that half precision would blur."""
    tiny(family, max_position_embeddings=2048).save(tmp_path / "model")
    ids = token_ids(1, 1500)
    found = load(tmp_path / "model", dtype="bfloat16").decoder
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(found.model(ids).logits, expected(ids).logits)


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.decoder.blocks[1].ffn.up.weight[0, 0] = 1e6
    model.save(tmp_path / "model")
    with pytest.raises(InputError, match=r"c_fc.weight' holds 1e\+06, too large for float16; accepted: bfloat16"):
        load(tmp_path / "model", dtype="float16")
    assert load(tmp_path / "model", dtype="bfloat16").decoder.dtype == torch.bfloat16


def test_an_overflow_beside_a_nan_is_refused_too() -> None:
    with pytest.raises(InputError, match="too large for float16"):
        in_dtype("weight", torch.tensor([torch.nan, 1e6]), torch.float16)
    assert in_dtype("weight", torch.tensor([torch.nan, torch.inf]), torch.float16).isinf().any()
    assert in_dtype("weight", torch.zeros(0), torch.float16).dtype == torch.float16


def test_shared_ffns_are_multiplied_out_before_they_are_rounded(tmp_path: Path) -> None:
    tiny("llama").save(tmp_path / "base")
    model = load(tmp_path / "base", dtype="bfloat16")
    Share(window="0:2", rank=2, align="none", init="svd").apply(model.decoder, None)
    for form in ("dense", "compact"):
        model.save(tmp_path / form, format=form)  # type: ignore[arg-type]
    load(tmp_path / "compact").save(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_training_folder_of_another_dtype_is_not_resumed(study_corpus: str, tmp_path: Path) -> None:
    tiny("gpt2").save(tmp_path / "base")
    recovery = Finetune(tokens=64, context=16, learning_rate=1e-3, corpus=study_corpus, validation_tokens=64)
    folder = tmp_path / "run"
    recover(load(tmp_path / "base"), recovery, training_dir=folder)
    with pytest.raises(LayerfoldError, match="other settings"):
        recover(load(tmp_path / "base", dtype="bfloat16"), recovery, training_dir=folder)
