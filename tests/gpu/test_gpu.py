"""On a GPU: pocket computes what it computes on the processor, in float32 and in half precision."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILY_NAMES, tiny, token_ids

import layerfold
from layerfold import Calibration
from layerfold.calibration import calibration_windows
from layerfold.checkpoint.load import load
from layerfold.evaluators import Latency
from layerfold.inference import fused
from layerfold.inference.captured import Captured
from layerfold.inference.decoding import greedy
from layerfold.inference.scoring import log_partition, window_nats
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.recovery import Distill
from layerfold.repair.refit import refit_
from layerfold.text.corpora import load_corpus
from layerfold.text.windows import TokenWindows, cut_windows

METHODS: dict[str, Method] = {
    "merge": Merge(n=2),
    "collapse": Collapse(n=2),
    "drop": Drop(every=2),
    "magnitude": Prune(sparsity=0.3),
    "wanda": Prune(sparsity=0.3, criterion="wanda"),
    "sparsegpt": Prune(sparsity=0.3, criterion="sparsegpt"),
    "two-of-four": Prune(structure="2:4", criterion="wanda"),
    "neurons": Prune(sparsity=0.3, criterion="sparsegpt", structure="neurons"),
    "neurons+heads": Prune(sparsity=0.3, criterion="taylor", structure="neurons+heads"),
    "share": Share(window="3:4"),
}
EDGE = ("collapse", "merge")
"""Rows whose perplexity is many times the base's: in half precision other neurons are matched, which moves it."""


@functools.cache
def texts() -> tuple[TokenWindows, TokenWindows]:
    model = load("pocket", device="cpu")
    corpus, context = load_corpus("imdb", "test"), model.decoder.context
    scored = cut_windows(corpus, model.require_tokenizer(), context=context, limit_tokens=16_384)
    return scored, calibration_windows(model, "imdb", 8_192, 0)


@functools.cache
def perplexities(name: str, device: str, dtype: str, offload: str = "never") -> tuple[float, float]:
    """Perplexity of a method's pocket, and of what a repair makes of it."""
    scored, calibration = texts()
    original = load("pocket", device=device, dtype=dtype, offload=offload).decoder
    decoder = original.copy()

    def perplexity() -> float:
        return math.exp(float(window_nats(decoder, scored).sum()) / scored.tokens)

    METHODS[name].apply(decoder, Calibration(decoder, calibration))
    before = perplexity()
    if name not in ("drop", "neurons+heads"):
        return before, before
    cuts = [2 * index for index in range(1, 6)] if name == "drop" else [*range(1, 12)]
    refit_(decoder, original, [*cuts, original.n_blocks], calibration, attention=True)
    return before, perplexity()


@pytest.mark.parametrize("name", METHODS)
def test_float32_is_the_processor_s(name: str) -> None:
    here, there = perplexities(name, "cpu", "float32"), perplexities(name, "cuda", "float32")
    assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_wait_on_the_processor_give_the_same(name: str) -> None:
    here, there = (perplexities(name, "cuda", "float32", offload) for offload in ("never", "always"))
    assert there == pytest.approx(here, rel=1e-5)


def test_of_weights_that_wait_a_few_blocks_are_on_the_gpu() -> None:
    scored, _ = texts()
    decoder = load("pocket", device="cuda", dtype="float32", offload="always").decoder
    block = sum(each.nbytes for each in decoder.blocks[0].module.parameters())
    resting = torch.cuda.memory_allocated()
    window_nats(decoder, scored)
    assert {each.device.type for each in decoder.blocks[3].module.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated() - resting <= 2 * block


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_within_a_hundredth(name: str, dtype: str) -> None:
    found = perplexities(name, "cuda", dtype)
    assert found == pytest.approx(perplexities(name, "cuda", "float32"), rel=0.15 if name in EDGE else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(1, 300, 32), (513, 50_257, 768), (130, 1_000, 100)])
def test_the_fused_kernel_is_the_sum_over_all_logits(
    dtype: torch.dtype, tokens: int, vocabulary: int, width: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, device="cuda").to(dtype)
    bias = torch.randn(vocabulary, generator=generator, device="cuda").to(dtype)
    assert fused.available(weight)
    for offset in (None, bias):
        logits = hidden.double() @ weight.double().T + (0 if offset is None else offset.double())
        found = fused.log_partition(hidden, weight, offset)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-4)


def test_half_precision_scores_without_the_kernel_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load("pocket", device="cuda", dtype="bfloat16").decoder
    hidden = torch.randn(700, decoder.d_model, device="cuda", dtype=torch.bfloat16)
    kernel = log_partition(decoder, hidden)
    monkeypatch.setattr(fused, "available", lambda weight: False)
    torch.testing.assert_close(log_partition(decoder, hidden), kernel, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_captured_step_writes_what_generate_writes(family: str) -> None:
    decoder = tiny(family).decoder
    decoder.model.generation_config.eos_token_id = None
    decoder.model.cuda()
    if family == "mistral":
        with pytest.raises(RuntimeError, match="a sliding window"):
            Captured(decoder, token_ids(1, 5), 12)
        return
    captured = Captured(decoder, token_ids(1, 5), 12)
    for _ in range(2):
        assert captured().tolist() == greedy(decoder, token_ids(1, 5), 12).tolist()


def test_latency_reports_both(tmp_path: Path) -> None:
    base = load("pocket", device="cuda")
    smaller = layerfold.compress(base, Drop(every=2), corpus="imdb")
    scores = Latency(rounds=3).compare({"base": base, "half": smaller})
    assert scores["half"].details["speedup"]["value"] > 1.2
    assert scores["half"].details["captured_speedup"]["value"] > 1.2
    assert scores["half"].details["captured"]["value"] < scores["half"].value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recovery_learns_and_keeps_the_precision(dtype: str) -> None:
    base = load("pocket", device="cuda", dtype=dtype)
    smaller = layerfold.compress(base, Drop(every=2), corpus="imdb")
    recovered = layerfold.recover(smaller, Distill(tokens=16_384, learning_rate=1e-3), teacher=base)
    assert {str(each.dtype) for each in recovered.decoder.model.parameters()} == {f"torch.{dtype}"}
    scored, _ = texts()
    assert window_nats(recovered.decoder, scored).sum() < window_nats(smaller.decoder, scored).sum()


@pytest.mark.parametrize("format", ["dense", "compact"])
def test_a_checkpoint_written_from_a_gpu_is_read_anywhere(format: Any, tmp_path: Path) -> None:
    model = load("pocket", device="cuda")
    smaller = layerfold.compress(model, Merge(n=2, tie=True), corpus="imdb", tokens=2_048)
    smaller.save(tmp_path / "smaller", format=format)
    assert load(tmp_path / "smaller", device="cpu").sha256 == load(tmp_path / "smaller", device="cuda").sha256
