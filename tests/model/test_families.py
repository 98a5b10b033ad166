"""Every family, on tiny random models: the view of it, every method, what is saved, and what other programs read."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BLOCKS, CONTEXT, SETTINGS, continued, corpus, logits, prose, refused, tiny, tiny_model, token_ids
from tiny import tokenizer as byte_tokenizer

import layerfold
from layerfold.calibration import Calibration
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.inference.scoring import Expectation, log_partition, nats_slope, token_nats
from layerfold.inference.stepping import Stepper
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share, Steps
from layerfold.model.decoder import Decoder
from layerfold.model.families import FAMILIES
from layerfold.pipeline import apply
from layerfold.planning import Plan
from layerfold.recovery import Finetune
from layerfold.repair.repair import Level, Repair
from layerfold.search.drop import DropSearch
from layerfold.text.windows import TokenWindows, cut_windows

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "opt, norms after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "falcon, one key": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, in sequence": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
    ),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, one norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "gpt_bigcode, keys of each": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm, in parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "phi, queries normed": ("phi", {"qk_layernorm": True}),
    "cohere, queries normed": ("cohere", {"use_qk_norm": True}),
    "bloom, norms of the stream": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}
"""By name, a family and settings beside those of `tiny`."""

JOINED = {
    "bloom": "ALiBi",
    "bloom, norms of the stream": "ALiBi",
    "mpt": "ALiBi",
    "falcon, alibi": "ALiBi",
    "olmo2": "q_norm spans all heads",
    "olmo3": "q_norm spans all heads",
    "cohere, queries normed": "q_norm spans all heads",
    "stablelm, in parallel": "has a part for each head",
}
"""Whose heads can only go together, and why."""

METHODS: list[tuple[Method, Level]] = [
    (Merge(n=2), "none"),
    (Merge(n=2, tie=True), "refit+attention"),
    (Collapse(n=2), "rescale"),
    (Drop(every=2), "refit+attention"),
    (Drop(part="attention", blocks="1,2"), "refit"),
    (Drop(part="ffn", blocks="0,3"), "none"),
    (Prune(sparsity=0.3), "none"),
    (Prune(sparsity=0.3, criterion="wanda"), "none"),
    (Prune(structure="2:4", criterion="sparsegpt"), "none"),
    (Prune(sparsity=0.4, structure="neurons"), "none"),
    (Prune(sparsity=0.4, structure="neurons", criterion="wanda"), "refit"),
    (Prune(sparsity=0.4, structure="neurons", criterion="sparsegpt"), "none"),
    (Prune(sparsity=0.4, structure="neurons+heads", criterion="taylor"), "refit+attention"),
    (Share(window="1:2", rank=2), "none"),
    (Steps((Drop(blocks="3"), Prune(sparsity=0.3, structure="neurons", criterion="taylor"))), "refit"),
]
NAMES = list(VARIANTS)
PARTS = 5 if os.environ.get("LAYERFOLD_EVERY_METHOD") else 1
EVERY = pytest.mark.parametrize("name", NAMES)


def model(name: str) -> Model:
    family, settings = VARIANTS[name]
    return tiny(family, **settings)


@functools.cache
def text() -> TokenWindows:
    documents = [prose(60, seed) for seed in range(8)]
    return cut_windows(corpus(*documents), byte_tokenizer(), context=CONTEXT)


@pytest.fixture(autouse=True)
def _one_of_each() -> None:
    assert set(FAMILIES) == set(SETTINGS)


def without(decoder: Decoder, part: str, index: int) -> Decoder:
    """A copy in which a block's part writes zeros."""
    found = decoder.copy()
    output = found.blocks[index].output(part)
    assert output is not None
    for tensor in output.tensors:
        tensor.zero_()
    return found


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether logits are the same but for the order of sums."""
    return torch.allclose(one, two, atol=2e-4, rtol=1e-4)


@EVERY
def test_blocks_stepped_by_hand_and_scored_are_the_forward_pass(name: str) -> None:
    decoder, ids = model(name).decoder, token_ids()
    stepper = Stepper(decoder)
    hidden = stepper.embed(ids)
    for index in range(decoder.n_blocks):
        hidden = stepper.step(index, hidden)
    states = decoder.readout(hidden)[:, :-1].flatten(0, 1)
    expected = torch.log_softmax(logits(decoder, ids)[:, :-1].flatten(0, 1).double(), dim=-1)
    targets = ids[:, 1:].flatten()
    assert torch.allclose(token_nats(decoder, states, targets).double(), -expected[range(len(targets)), targets])


@EVERY
def test_the_gradient_and_the_divergence_are_those_of_the_logits(name: str) -> None:
    decoder = model(name).decoder
    width = decoder.model.get_output_embeddings().weight.shape[1]
    states, others = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    targets = token_ids(1, 9)[0]
    cap, head = decoder.configured.logit_cap, decoder.model.get_output_embeddings()

    def log_probabilities(states: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.linear(states, head.weight.detach(), None if head.bias is None else head.bias.detach())
        return torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), dim=-1)

    states.requires_grad_()
    nats = -log_probabilities(states)[range(9), targets]
    (expected,) = torch.autograd.grad(nats.sum(), states)
    found = states.detach()
    assert torch.allclose(nats_slope(decoder, found, log_partition(decoder, found), targets), expected, atol=1e-5)
    mine, theirs = log_probabilities(found), log_probabilities(others)
    reference = Expectation.of(decoder, found)
    divergence = reference.divergence(decoder, others, log_partition(decoder, others))
    assert torch.allclose(divergence, (mine.exp() * (mine - theirs)).sum(1), atol=1e-4)
    pieces = Expectation.joined(reference.split([4, 5]))
    assert torch.equal(pieces.divergence(decoder, others, log_partition(decoder, others)), divergence)


@EVERY
def test_permuting_and_flipping_neurons_changes_nothing(name: str) -> None:
    decoder = model(name).decoder
    expected, ffn, drawn = logits(decoder), decoder.blocks[1].ffn, torch.Generator().manual_seed(1)
    order = torch.randperm(ffn.d_ffn, generator=drawn)
    signs = torch.where(torch.rand(ffn.d_ffn, generator=drawn) < 0.5, -1.0, 1.0) if decoder.family.gated else None
    inputs = torch.randn(2, 5, decoder.d_model, generator=drawn)
    before = ffn.neurons(inputs)[..., order] * (1.0 if signs is None else signs)
    ffn.permute_(order, signs)
    assert close(logits(decoder), expected)
    assert torch.allclose(ffn.neurons(inputs), before)


@EVERY
def test_removing_is_writing_zeros(name: str) -> None:
    decoder = model(name).decoder
    gone = torch.arange(decoder.d_ffn[1]) % 3 == 0
    for part, index in itertools.product(("attention", "ffn"), (0, 1)):
        cut = decoder.copy()
        cut.remove_(part, [index])
        assert close(logits(cut), logits(without(decoder, part, index)))
        assert cut.size().parameters < decoder.size().parameters
        if index:
            assert continued(cut) == continued(cut, use_cache=False)
    zeroed, cut = decoder.copy(), decoder.copy()
    zeroed.blocks[1].ffn.down.weight[:, gone] = 0
    cut.keep_neurons_({1: (~gone).nonzero()[:, 0]})
    assert close(logits(cut), logits(zeroed))
    assert sum(unit.numel() for unit in cut.blocks[1].ffn.units) < sum(u.numel() for u in decoder.blocks[1].ffn.units)


@EVERY
def test_heads_go_in_groups_or_together(name: str) -> None:
    decoder = model(name).decoder
    assert JOINED.get(name, "") in decoder.joined_heads
    assert bool(decoder.joined_heads) == (name in JOINED)
    index = next(block.index for block in decoder.blocks if block.heads)
    groups = decoder.heads[index]
    if groups == 1:
        assert name in JOINED or decoder.family.one_group
        return
    zeroed, cut = decoder.copy(), decoder.copy()
    kept = torch.arange(1, groups)
    zeroed.blocks[index].attention.output.weight[:, : zeroed.blocks[index].attention.channels] = 0
    cut.keep_heads_({index: kept})
    assert close(logits(cut), logits(zeroed))
    assert continued(cut) == continued(cut, use_cache=False)
    with torch.no_grad():
        units, fewer = (sum(unit.numel() for unit in each.blocks[index].attention.units) for each in (decoder, cut))
    assert units - fewer == decoder.size().parameters - cut.size().parameters == units // groups


@EVERY
def test_blocks_that_are_left_go_on_as_they_did(name: str) -> None:
    decoder, ids = model(name).decoder, token_ids()
    stepper = Stepper(decoder)
    hidden = stepper.embed(ids)
    for index in (0, 2, 3):
        hidden = stepper.step(index, hidden)
    cut = decoder.copy()
    cut.keep_([0, 2, 3])
    head = decoder.model.get_output_embeddings()
    with torch.no_grad():
        expected = head(decoder.readout(hidden))
    cap = decoder.configured.logit_cap
    assert close(logits(cut, ids), expected if cap is None else cap * torch.tanh(expected / cap))
    assert continued(cut) == continued(cut, use_cache=False)


def made(name: str, method: Method, level: Level) -> Model:
    base = model(name)
    calibration = Calibration(base.decoder, text()) if method.needs_calibration else None
    repair = None if level == "none" else Repair(level, text())
    return apply(base, method, calibration, 0, None, repair=repair)[0]


def admits(name: str, level: Level) -> bool:
    """Whether a repair can be solved for."""
    return not (model(name).decoder.family.stream_norms and level.startswith("refit"))


@EVERY
@pytest.mark.parametrize("part", range(PARTS))
def test_every_method_and_what_is_saved_of_it(name: str, part: int, tmp_path: Path) -> None:
    """A fifth of the methods is applied, by turns, all where asked for; of each fifth about one is saved."""
    for number, (method, level) in enumerate(METHODS[(part + NAMES.index(name)) % 5 :: 5]):
        if not admits(name, level):
            with refused(InputError, says="norms are of the residual stream"):
                made(name, method, level)
            continue
        found = made(name, method, level)
        expected = logits(found.decoder)
        assert expected.isfinite().all()
        for note in found.provenance.steps[-1]["notes"].get("repaired", []):
            assert note["repaired"] <= note["error"]
        if (number + NAMES.index(name)) % 3:
            continue
        form = ("dense", "compact")[(number + NAMES.index(name)) // 3 % 2]
        folder = tmp_path / str(number)
        found.save(folder, format=form)  # type: ignore[arg-type]
        back = load(folder).decoder
        assert torch.equal(logits(back), expected) if form == "compact" else close(logits(back), expected)
        assert back.heads == found.decoder.heads
        assert back.d_ffn == found.decoder.d_ffn
        assert continued(back) == continued(found.decoder, use_cache=False)


def cut(decoder: Decoder) -> None:
    """Do what a checkpoint has to carry: fewer blocks, neurons, heads, and a block without attention."""
    decoder.keep_([0, 1, 3])
    decoder.keep_neurons_({1: torch.arange(0, decoder.d_ffn[1], 2)})
    index = next(block.index for block in decoder.blocks if block.heads)
    if decoder.heads[index] > 1:
        decoder.keep_heads_({index: torch.tensor([0])})
    decoder.remove_("attention", [2])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense checkpoint of every variant, cut, and the logits that a process without layerfold gets."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for number, name in enumerate(NAMES):
        found = model(name)
        cut(found.decoder)
        found.save(folder / str(number), format="dense")
    save_file({"ids": token_ids()}, folder / "ids.safetensors")
    process = fresh.start(READ, folder / "said.txt", folder)
    assert fresh.finish(process) == 0, (folder / "said.txt").read_text()[-2000:]
    return folder


READ = f"""
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ids = load_file("ids.safetensors")["ids"]
for number in range({len(NAMES)}):
    model, info = AutoModelForCausalLM.from_pretrained(str(number), output_loading_info=True)
    assert not any(info.values()), (number, info)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        options = dict(do_sample=False, min_new_tokens=5, max_new_tokens=5, pad_token_id=0)
        prompt = ids[:1, :9]
        options["attention_mask"] = torch.ones_like(prompt)
        both = [model.generate(prompt, use_cache=each, **options) for each in (True, False)]
    assert both[0].tolist() == both[1].tolist(), number
    save_file({{"logits": logits.contiguous()}}, f"{{number}}.safetensors")
assert "layerfold" not in sys.modules
"""


@EVERY
def test_a_fresh_process_without_layerfold_computes_the_same(name: str, elsewhere: Path) -> None:
    found = model(name).decoder
    cut(found)
    assert close(load_file(elsewhere / f"{NAMES.index(name)}.safetensors")["logits"], logits(found))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "study.txt"
    path.write_text("\n\n".join(prose(30, seed) for seed in range(60)))
    return str(path)


@pytest.mark.parametrize("name", NAMES[::6])
def test_ten_steps_of_training_change_what_was_cut_and_not_its_shape(name: str, documents: str) -> None:
    student = model(name)
    cut(student.decoder)
    before = logits(student.decoder)
    few = {"context": 16, "batch_size": 4, "learning_rate": 1e-3, "validation_tokens": 64, "evaluations": 2}
    trained = layerfold.recover(student, Finetune(tokens=640, corpus=documents, **few))
    assert trained.decoder.d_ffn == student.decoder.d_ffn
    assert trained.decoder.heads == student.decoder.heads
    assert not torch.equal(logits(trained.decoder), before)


@pytest.mark.parametrize("name", NAMES[3::6])
def test_a_search_ranks_by_both_objectives(name: str, documents: str) -> None:
    search = DropSearch(remove=(1, 1), corpus=documents, tokens=200, test_tokens=100, rounds=0, objective="kl")
    found = search(model(name))
    assert found.best


@pytest.mark.parametrize("name", ["phi3", "gemma2", "mpt", "qwen3_5_text"])
def test_a_plan_is_made_and_is_small_enough(name: str, documents: str, tmp_path: Path) -> None:
    few = {"calibration_tokens": 300, "repair_tokens": 600, "tokens": 200, "test_tokens": 150, "rounds": 0, "points": 1}
    base = model(name)
    _, found = Plan(corpus=documents, finalists=1, parameters="80%", **few)(base)
    assert found.decoder.size().parameters <= 0.8 * base.decoder.size().parameters


def test_a_hybrid_keeps_a_block_whose_cache_counts_tokens() -> None:
    decoder = model("qwen3_5_text").decoder
    assert decoder.heads == (2, 0, 2, 0)
    with refused(InputError, says="the cache of a qwen3_5_text counts tokens there"):
        decoder.keep_([1, 3])
    decoder.remove_("attention", range(BLOCKS))
    assert continued(decoder) == continued(decoder, use_cache=False)


def test_what_a_configuration_says_of_each_block_goes_with_the_block() -> None:
    neo, smol, exaone = (Decoder(tiny_model(name)) for name in ("gpt_neo", "smollm3", "exaone4"))
    for decoder in (neo, smol, exaone):
        decoder.keep_([0, 2, 3])
    assert neo.model.config.attention_layers == ["global", "global", "local"]
    assert neo.model.config.attention_types == [[["global"], 1], [["global"], 1], [["local"], 1]]
    assert smol.model.config.no_rope_layers == [1, 1, 0]
    assert exaone.model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
