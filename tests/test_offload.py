"""Weights that wait in files, or on the processor while another device computes: the same results, in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, adopted, elsewhere, moved, put_
from safetensors.torch import load_file
from test_devices import METHODS, made, searched
from tiny import FAMILY_NAMES, halve_, tiny, windows
from torch import Tensor

from layerfold import Distill, InputError, Latency, Recipe, Study, recover
from layerfold.checkpoint.load import load, load_beside
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import hash_weights
from layerfold.errors import OutputError
from layerfold.inference.scoring import window_nats
from layerfold.inference.spool import Apart
from layerfold.memory import mapped as files
from layerfold.memory.mapped import is_mapped, mapped
from layerfold.model import masks, offload
from layerfold.model.decoder import Decoder


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LEAST_BYTES", 0)


class Inline:
    """Copies at once, in the thread that asks: the modes of torch that the simulated device needs are a thread's."""

    def submit(self, work: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(offload, "put_", put_)
    monkeypatch.setattr(offload, "_copier", Inline)
    tensors = offload._tensors
    monkeypatch.setattr(offload, "_tensors", lambda module: tensors(adopted(module)))
    with elsewhere():
        yield
    assert not offload._HERE, "what was on the device has left it"
    assert not offload._HOLDS
    assert len({each.device.type for each in offload._AHEAD}) <= 1


def waiting(decoder: Decoder) -> Decoder:
    """Move a decoder to the simulated device, its blocks' weights waiting on the processor."""
    moved(decoder.model)
    for tensor in (*decoder.model.parameters(), *decoder.model.buffers()):
        assert isinstance(tensor, Elsewhere)
        put_(tensor, tensor.held)
    offload.offload_(decoder.model, [block.module for block in decoder.blocks], DEVICE)
    return decoder


def in_files(decoder: Decoder) -> Decoder:
    offload.map_(decoder.model)
    return decoder


class TestMapped:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
    def test_a_copy_is_equal_and_laid_out_alike(self, dtype: torch.dtype) -> None:
        tensor = torch.arange(24).view(4, 6).remainder(5).to(dtype).T
        copied = mapped(tensor)
        assert is_mapped(copied)
        assert is_mapped(copied[2:])
        assert copied.stride() == tensor.stride()
        assert torch.equal(copied, tensor)
        copied[0] = 1
        assert not torch.equal(copied, tensor)
        assert not is_mapped(tensor)

    def test_another_dtype_rounds_once(self) -> None:
        tensor = torch.randn(7, 5)
        assert torch.equal(mapped(tensor, torch.bfloat16), tensor.bfloat16())

    def test_empty_and_small_ones_stay_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not is_mapped(mapped(torch.zeros(0, 3)))
        monkeypatch.setattr(files, "LEAST_BYTES", 1 << 20)
        assert not is_mapped(mapped(torch.zeros(1000)))

    def test_an_address_is_forgotten_with_the_tensor(self) -> None:
        before = set(files._ADDRESSES)
        tensor = mapped(torch.zeros(5000))
        assert before < files._ADDRESSES
        del tensor
        assert before == files._ADDRESSES

    def test_a_full_disk_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="No space left") as caught:
            mapped(torch.zeros(5000))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "name"), [*(("gpt2", name) for name in METHODS), *((name, "wanda") for name in FAMILY_NAMES)]
)
def test_weights_in_files_compute_the_same(family: str, name: str) -> None:
    here, apart = tiny(family).decoder, in_files(tiny(family).decoder)
    assert apart.offloaded
    assert not here.offloaded
    one, two = made(here, name), made(apart, name)
    assert two.nats == pytest.approx(one.nats, rel=1e-7)
    assert two.repaired == pytest.approx(one.repaired, rel=1e-6)
    assert all(torch.equal(one.zeros[key], two.zeros[key]) for key in one.zeros)
    weights = {name: each for name, each in apart.model.named_parameters() if each.dim() == 2 and "weight" in name}
    assert all(map(is_mapped, weights.values())), "also those that the method or the repair made"
    copied = dict(apart.copy().model.named_parameters())
    assert all(is_mapped(copied[name]) for name in weights)


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("gpt2", name) for name in METHODS), ("qwen3", "share"), ("llama", "neurons+heads"), ("qwen3", "wanda")],
)
def test_weights_that_wait_compute_the_same_on_another_device(family: str, name: str, there: None) -> None:
    here, apart = tiny(family).decoder, waiting(tiny(family).decoder)
    assert apart.device == DEVICE
    one, two = made(here, name), made(apart, name)
    assert two.nats == pytest.approx(one.nats, rel=1e-6)
    assert two.repaired == pytest.approx(one.repaired, rel=1e-5)
    assert all(torch.equal(one.zeros[key], two.zeros[key]) for key in one.zeros)
    waits = {tensor.device.type for block in apart.blocks for tensor in block.module.parameters()}
    assert waits == {"cpu"}, "all of them wait again"


@pytest.mark.parametrize("kind", ["drop", "window", "groups", "plan"])
def test_searches_and_plans_find_the_same(kind: str, study_corpus: str, there: None) -> None:
    here, apart = tiny("llama"), tiny("llama")
    waiting(apart.decoder)
    assert searched(kind, apart, study_corpus) == pytest.approx(searched(kind, here, study_corpus), rel=1e-4)


def test_a_whole_forward_pass_brings_each_block(there: None) -> None:
    here, apart = tiny("llama").decoder, waiting(tiny("llama").decoder)
    assert hash_weights(here.model) == hash_weights(apart.model)
    ids = windows().input_ids
    logits = apart.model(input_ids=ids.to(DEVICE)).logits
    assert isinstance(logits, Elsewhere)
    assert torch.allclose(logits.held, here.model(input_ids=ids).logits, atol=1e-5)
    assert {block.module.mlp.up_proj.weight.device.type for block in apart.blocks} == {"cpu"}  # type: ignore[union-attr]


def test_what_is_edited_is_given_back_and_what_is_only_read_is_not(there: None) -> None:
    decoder = waiting(tiny("llama").decoder)
    weight = decoder.blocks[1].ffn.up
    before: Tensor = weight.weight.clone()
    with decoder.resident([1]):
        weight.weight.add_(1)
    assert torch.equal(weight.weight, before)
    with decoder.resident([1], edited=True), decoder.resident([1, 2]):
        assert weight.weight.device == DEVICE
        weight.weight.add_(1)
    assert torch.equal(weight.weight, before + 1)


def test_what_was_copied_ahead_and_edited_since_is_not_used(there: None) -> None:
    decoder = waiting(tiny("llama").decoder)
    decoder.blocks[1].ffn.tie_(decoder.blocks[0].ffn)
    with decoder.resident([0], edited=True):
        decoder.ahead(1)
        decoder.blocks[0].ffn.up.weight.fill_(2)
    with decoder.resident([1]):
        weight = decoder.blocks[1].ffn.up.weight
        assert weight.device == DEVICE
        assert weight.unique().tolist() == [2]


def test_what_was_written_into_where_it_waits_is_copied_again() -> None:
    device = torch.device("meta")
    linear = torch.nn.Linear(3, 2)
    setattr(linear, offload._DEVICE, device)
    for writes in (False, True):
        offload.ahead(linear)
        offload.ahead(linear)
        begun = offload._AHEAD[linear.weight].values.result()
        if writes:
            linear.weight.detach().add_(1)
        assert (offload._taken(linear.weight, device) is begun) is not writes
    offload.ahead(linear)
    assert len(offload._AHEAD) == 2
    del linear
    assert not len(offload._AHEAD), "a copy that nothing took goes with the weights"


def test_a_block_that_does_not_fit_on_the_device_is_asked_for_again(
    there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = waiting(tiny("llama").decoder)
    before = float(window_nats(decoder, windows()).sum())
    taken, came = offload._taken, []

    def full(tensor: Tensor, device: torch.device) -> Tensor:
        came.append(tensor)
        if len(came) == 4:
            raise torch.OutOfMemoryError
        return taken(tensor, device)

    monkeypatch.setattr(offload, "_taken", full)
    with pytest.raises(torch.OutOfMemoryError), decoder.resident([0, 1]):
        pass
    assert not offload._HERE
    assert {each.device.type for each in decoder.blocks[0].module.parameters()} == {"cpu"}
    assert float(window_nats(decoder, windows()).sum()) == before


def test_masks_of_a_checkpoint_are_in_files_too(tmp_path: Path) -> None:
    model = tiny("llama")
    halve_(model.decoder)
    model.save(tmp_path / "model")
    found = load(tmp_path / "model", offload="always").decoder
    kept = masks.held(found)
    assert len(kept) == 7 * found.n_blocks
    assert all(map(is_mapped, kept.values()))


def test_mapped_weights_stay_so_while_they_are_stowed() -> None:
    decoder = in_files(tiny("gpt2").decoder)
    other = decoder.copy()
    apart = Apart(other, decoder)
    apart.own.stow()
    apart.own.fetch()
    assert all(map(is_mapped, other.model.parameters()))
    assert float(window_nats(other, windows()).sum()) == float(window_nats(decoder, windows()).sum())


def test_what_is_loaded_beside_a_model_waits_too_and_so_does_the_base_of_a_study(
    tmp_path: Path, study_corpus: str
) -> None:
    tiny("llama").save(tmp_path / "model")
    model = load(tmp_path / "model", offload="always")
    assert load_beside(model, tmp_path / "model").decoder.offloaded
    recipe = {"base": str(tmp_path / "model"), "variants": [], "calibration": {"corpus": study_corpus}}
    study = Study(Recipe(**recipe, offload="always"), tmp_path / "run")
    assert study.base.decoder.offloaded
    with pytest.raises(InputError, match="offload 'some'"):
        Study(Recipe(**recipe, offload="some"), tmp_path / "other")


def test_times_of_weights_that_wait_are_not_those_of_others(tmp_path: Path) -> None:
    here, apart = tiny("llama"), tiny("llama")
    in_files(apart.decoder)
    assert Latency().settings(apart) == Latency().settings(here) | {"offloaded": True}


def test_a_teacher_may_wait(study_corpus: str) -> None:
    student, settings = tiny("llama", seed=1), {"tokens": 128, "context": 32, "corpus": study_corpus}
    trained = []
    for teacher in (tiny("llama"), tiny("llama")):
        if trained:
            in_files(teacher.decoder)
        distill = Distill(**settings, learning_rate=1e-3, validation_tokens=64, evaluations=1)
        trained.append(recover(student, distill, teacher=teacher).sha256)
    assert trained[0] == trained[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_loaded_edited_and_saved_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny("llama").save(tmp_path / "model", dtype=dtype)
    file = tmp_path / "model" / "model.safetensors"
    bytes_before = file.read_bytes()
    made: list[Model] = []
    for name in ("never", "always"):
        model = load(tmp_path / "model", offload=name)
        assert model.decoder.offloaded == (name == "always")
        assert model.decoder.dtype == torch.float32
        for block in model.decoder.blocks:
            block.ffn.down.weight.mul_(0.5)
        model.save(tmp_path / name)
        model.save(tmp_path / f"{name}-compact", format="compact")
        made.append(model)
    assert file.read_bytes() == bytes_before
    assert made[0].sha256 == made[1].sha256
    assert (
        load_file(tmp_path / "never" / "model.safetensors").keys()
        == load_file(tmp_path / "always" / "model.safetensors").keys()
    )
    for form, saved in (("", "model.safetensors"), ("-compact", "layerfold.safetensors")):
        one, two = ((tmp_path / f"{name}{form}" / saved).read_bytes() for name in ("never", "always"))
        assert one == two


def test_weights_wait_by_themselves_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("gpt2").save(tmp_path / "model")
    weights = sum(each.nbytes for each in load(tmp_path / "model").decoder.model.parameters())
    for free, waits in ((2 * weights - 1, True), (2 * weights, False)):
        monkeypatch.setattr("layerfold.memory.room.available", lambda free=free: free)
        model = load(tmp_path / "model")
        assert model.decoder.offloaded is waits
    decoders = [load(tmp_path / "model", offload=each).decoder for each in ("always", "never")]
    nats = [float(window_nats(each, windows()).sum()) for each in decoders]
    assert nats[0] == pytest.approx(nats[1], rel=1e-7)


def test_weights_that_have_no_room_in_files_stay_in_memory_unless_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("gpt2").save(tmp_path / "model")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    monkeypatch.setattr("layerfold.memory.room.available", lambda: 0)
    assert not load(tmp_path / "model").decoder.offloaded
    with pytest.raises(OutputError, match="No space left"):
        load(tmp_path / "model", offload="always")


def test_what_is_no_way_to_wait_is_one_line() -> None:
    with pytest.raises(InputError, match="offload 'allways'; did you mean 'always'"):
        load("pocket", offload="allways")
