"""Tiny seeded models of every family, a byte-level tokenizer and text, all made in code: no network, no files."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.inference.stepping import Stepper
from layerfold.methods import Share
from layerfold.model import deltas
from layerfold.model.decoder import Decoder
from layerfold.model.factored import Factored
from layerfold.model.masks import hold_
from layerfold.text.corpora import Corpus
from layerfold.text.windows import TokenWindows, cut_windows

Write = Callable[..., Path]
"""The `write` fixture: a name and content in, the path of the file out."""

CONTEXT = 32
BLOCKS = 4
END_OF_TEXT = "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("Ġ", "a")]
MERGED = ["".join(merge) for merge in MERGES]
VOCABULARY = 256 + len(MERGES) + 1
WORDS = ["the", "a", "river", "film", "in", "her", "other", "winter", "anthem", "café", "naïve", "映画", "🎬", "storm"]

_GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
# Between them: Conv1D and Linear, tied and untied embeddings, FFNs and attention with and without biases, a window.
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": BLOCKS, "n_positions": CONTEXT}
_SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2)}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": _GATED | {"mlp_bias": True, "attention_bias": True},
    "mistral": _GATED | {"sliding_window": 12},
    "qwen2": _GATED | {"tie_word_embeddings": True},
    "qwen3": _GATED | {"head_dim": 16},
    "gpt_bigcode": _GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": BLOCKS,
        "num_heads": 4,
        "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local"], BLOCKS // 2]],
        "window_size": 12,
    },
    "gptj": _GPT2 | {"rotary_dim": 4},
    "gpt_neox": _GATED,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
    "bloom": {"hidden_size": 32, "n_layer": BLOCKS, "n_head": 4},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "ffn_hidden_size": 48,
        "max_position_embeddings": CONTEXT,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": CONTEXT},
    "phi": _GATED,
    "phi3": _GATED | {"pad_token_id": 0},
    "stablelm": _GATED,
    "starcoder2": _GATED,
    "ministral": _GATED | _SLIDING | {"head_dim": 8},
    "qwen3_5_text": _GATED
    | {
        "head_dim": 8,
        "layer_types": ["full_attention", "linear_attention"] * (BLOCKS // 2),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "smollm3": _GATED | {"no_rope_layers": [1, 0] * (BLOCKS // 2), "pad_token_id": 0},
    "olmo": _GATED,
    "olmo2": _GATED,
    "olmo3": _GATED | _SLIDING,
    "exaone4": _GATED | _SLIDING,
    "gemma": _GATED | {"head_dim": 16},
    "gemma2": _GATED | _SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": _GATED | _SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "granite": _GATED | {"residual_multiplier": 0.7, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": _GATED | {"logit_scale": 0.3},
    "glm4": _GATED | {"head_dim": 8, "pad_token_id": 0},
    "nemotron": _GATED | {"head_dim": 8},
    "nanochat": _GATED,
}
FAMILY_NAMES = ["gpt2", "llama", "qwen2", "qwen3"]
"""Families that most tests run on; `tests/model/test_families.py` has all of them."""


_models: dict[tuple[str, int, str], PreTrainedModel] = {}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A transformers model of which every tensor, norms and biases included, holds random values."""
    key = family, seed, repr(overrides)
    if key not in _models:
        _models[key] = _made(family, seed, overrides)
    return copy.deepcopy(_models[key])  # in half the time of making it


def _made(family: str, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    settings = {"vocab_size": VOCABULARY, "bos_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 1}
    config = AutoConfig.for_model(family, **settings | SETTINGS[family] | overrides)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or "ln_" in name
            centre = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    return model


def tiny(family: str, seed: int = 0, **overrides: Any) -> Model:
    return Model(Decoder(tiny_model(family, seed, **overrides)), tokenizer(), Provenance("tiny"))


def sparsify(weight: Tensor, seed: int = 1) -> Tensor:
    """Set a random half of a weight to zero; return where it is kept."""
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    weight.detach().masked_fill_(~kept, 0)
    return kept


def halve_(decoder: Decoder) -> dict[str, Tensor]:
    """Hold a random half of all weights of the blocks' matrices at zero; return the masks."""
    names = {each.name for each in decoder.projections if each.block is not None}
    weights = [(name, weight) for name, weight in decoder.model.named_parameters() if name in names]
    kept = {name: sparsify(weight, seed) for seed, (name, weight) in enumerate(weights)}
    hold_(decoder, kept)
    return kept


def shared(model: Model, window: str = "0:2", rank: int = 2, **changes: Any) -> Model:
    """The same model, a window of whose blocks shares its FFNs from now on."""
    Share(window=window, rank=rank, **{"align": "none", "init": "svd"} | changes).apply(model.decoder, None)
    return model


def unequal(model: Model) -> Model:
    """The same model, its deltas cut to ranks of 0, 1, 2, 0, 1, 2 ..."""
    for number, (path, module) in enumerate(deltas.factored(model.decoder).items()):
        a, b = module.a[:, : number % 3], module.b[: number % 3]
        cut = Factored(module.weight, a.detach().clone(), b.detach().clone(), module.bias, module.stock)
        model.decoder.model.set_submodule(path, cut)
    return model


def chosen(decoder: Decoder, index: int, width: int) -> Tensor:
    """So many of a block's neurons, in an order of their own."""
    return torch.randperm(decoder.d_ffn[index], generator=torch.Generator().manual_seed(index))[:width]


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Expect the same names and, bit for bit, tensors."""
    assert one.keys() == two.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, two[name])] == []


@contextlib.contextmanager
def refused(kind: type[Exception], pattern: str | None = None, *, says: str = "", begins: str = "") -> Iterator[None]:
    """Expect an error of one line that matches a pattern, holds a text or begins with one."""
    with pytest.raises(kind, match=pattern) as caught:
        yield
    message = str(caught.value)
    assert says in message
    assert message.startswith(begins)
    assert "\n" not in message


@contextlib.contextmanager
def unchanged(*decoders: Decoder) -> Iterator[None]:
    """Expect the same tensors of decoders afterwards, bit for bit."""
    before = [{name: each.clone() for name, each in decoder.model.state_dict().items()} for decoder in decoders]
    yield
    for decoder, kept in zip(decoders, before, strict=True):
        assert_equal(decoder.model.state_dict(), kept)


def assert_masks_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name, mask in one.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, two[name]), name


@functools.cache
def base(family: str, **settings: Any) -> Decoder:
    """A tiny decoder, to be looked at only."""
    return tiny(family, **settings).decoder


@functools.cache
def deep(n_blocks: int) -> Decoder:
    """A decoder of so many blocks, to be looked at only."""
    return tiny("gpt2", n_layer=n_blocks).decoder


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(sorted(pre_tokenizers.ByteLevel.alphabet()) + MERGED)


def byte_level(symbols: list[str], merges: list[tuple[str, str]] = MERGES) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the places of symbols, with end-of-text behind them."""
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, END_OF_TEXT])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every step that any training begins from now on, those of trials of a learning rate too."""
    from layerfold.recovery import trainer

    taken: list[int] = []
    original = trainer.RecoveryTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(self.state.global_step + 1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(trainer.RecoveryTrainer, "compute_loss", compute_loss)
    return taken


def prose(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def corpus(*documents: str, split: str = "test") -> Corpus:
    return Corpus("tiny", split, documents or tuple(prose(25, seed) for seed in range(3)))


def windows(context: int = CONTEXT, **settings: Any) -> TokenWindows:
    """Windows over generated text, of which the last is shorter than the context."""
    cut = cut_windows(corpus(), tokenizer(), context=context, **settings)
    assert cut.lengths[-1] < context
    return cut


def token_ids(rows: int = 2, tokens: int = CONTEXT, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(decoder: Decoder, ids: Tensor | None = None) -> Tensor:
    return decoder.model(input_ids=token_ids() if ids is None else ids).logits


def continued(decoder: Decoder, use_cache: bool = True) -> list[int]:
    """Greedy tokens after a fixed prompt, beyond the window of those models that have one."""
    prompt = token_ids(1, 9)
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
    return decoder.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **settings
    ).tolist()


def step_through(decoder: Decoder, indices: list[int], ids: Tensor) -> Tensor:
    """Final hidden states after these blocks alone, in this order, run by hand."""
    stepper = Stepper(decoder)
    hidden = stepper.embed(ids)
    for index in indices:
        hidden = stepper.step(index, hidden)
    base = decoder.model.base_model
    with torch.no_grad():
        return (base.ln_f if hasattr(base, "ln_f") else base.norm)(hidden)


@torch.no_grad()
def final(decoder: Decoder, ids: Tensor | None = None) -> Tensor:
    """Final hidden states of a forward pass."""
    ids = token_ids() if ids is None else ids
    return decoder.model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def reads(decoder: Decoder, cut: TokenWindows) -> dict[str, np.ndarray]:
    """What each projection reads, (tokens, inputs), window by window from plain forward passes without any padding."""
    rows: dict[str, list[Tensor]] = {each.name: [] for each in decoder.projections}
    handles = [
        each.matrix.module.register_forward_pre_hook(lambda _, inputs, into=rows[each.name]: into.append(inputs[0][0]))
        for each in decoder.projections
    ]
    for ids, length in zip(cut.input_ids, cut.lengths, strict=True):
        decoder.model(input_ids=ids[None, :length])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each).double().numpy() for name, each in rows.items()}


def neurons(decoder: Decoder, cut: TokenWindows, *indices: int) -> list[np.ndarray]:
    """Blocks' activations, (tokens, d_ffn)."""
    names = {each.matrix.module: each.name for each in decoder.projections}
    found = reads(decoder, cut)
    return [found[names[decoder.blocks[index].ffn.down.module]] for index in indices]


def correlations(decoder: Decoder, cut: TokenWindows, one: int, two: int) -> np.ndarray:
    x, y = neurons(decoder, cut, one, two)
    return np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :]
