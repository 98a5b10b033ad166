"""Greedy generation of many prompts at once: the same as of each alone, by the settings given and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CONTEXT, FAMILY_NAMES, VOCABULARY, shared, tiny

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.inference.decoding import continue_each, greedy
from layerfold.methods import Drop, Merge
from layerfold.model.decoder import Decoder

END = VOCABULARY - 1
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [90], [60, 61, 62], [100, 3, 200, 7, 80]]
NEW = 8


def plain(family: str) -> Decoder:
    return tiny(family).decoder


BUILDS: dict[str, Callable[[Model], object]] = {
    "plain": lambda model: None,
    "dropped": lambda model: Drop(blocks=(0, 2)).apply(model.decoder, None),
    "lacking": lambda model: (model.decoder.remove_("attention", [0, 3]), model.decoder.remove_("ffn", [1])),
    "tied": lambda model: Merge(groups="1-3", align="none", tie=True).apply(model.decoder, None),
    "factored": shared,
}


@torch.no_grad()
def by_hand(decoder: Decoder, prompt: list[int], new_tokens: int, end: int | None = None) -> list[int]:
    """The likeliest token again and again, without padding and without a cache."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(decoder.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("build", "family"),
    [("plain", family) for family in FAMILY_NAMES]
    + [(build, family) for build in list(BUILDS)[1:] for family in ("gpt2", "mistral")],
)
def test_prompts_together_continue_as_each_alone(build: str, family: str) -> None:
    model = tiny(family)
    BUILDS[build](model)
    decoder = model.decoder
    alone = [by_hand(decoder, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(each) for each in alone}) == len(PROMPTS), "different texts, or this says nothing"
    assert continue_each(decoder, PROMPTS, NEW, None) == alone
    assert [continue_each(decoder, [prompt], NEW, None)[0] for prompt in PROMPTS] == alone


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_is_over_at_the_end_token_which_is_not_of_it(family: str) -> None:
    decoder = plain(family)
    whole = [by_hand(decoder, prompt, NEW) for prompt in PROMPTS]
    stops = set()
    for end in {token for row in whole for token in row}:
        found = continue_each(decoder, PROMPTS, NEW, end)
        assert found == [row[: row.index(end)] if end in row else row for row in whole]
        assert not any(end in row for row in found)
        stops |= {len(row) for row in found}
    assert {0, NEW} < stops, "at once, in the midst, never"


def test_no_more_is_generated_once_all_texts_are_over() -> None:
    decoder = plain("gpt2")
    end = by_hand(decoder, PROMPTS[0], 1)[0]
    calls: list[int] = []
    decoder.model.register_forward_hook(lambda *_: calls.append(1))
    assert continue_each(decoder, [PROMPTS[0]], NEW, end) == [[]]
    assert len(calls) == 1


def test_a_prompt_may_hold_the_end_token() -> None:
    decoder, prompts = plain("gpt2"), [[END, 40, END, 41], [50, END]]
    assert continue_each(decoder, prompts, NEW, END) == [by_hand(decoder, prompt, NEW, END) for prompt in prompts]


likeliest = by_hand(plain("gpt2"), PROMPTS[0], NEW)
OWN: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 5.0, "top_k": 50},
    {"num_beams": 4},
    {"num_return_sequences": 2, "num_beams": 2},
    {"repetition_penalty": 3.0},
    {"encoder_repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"max_length": 2, "max_new_tokens": 1},
    {"min_length": 30},
    {"min_new_tokens": NEW},
    {"forced_eos_token_id": END},
    {"forced_bos_token_id": 5},
    {"suppress_tokens": likeliest},
    {"begin_suppress_tokens": likeliest[:1]},
    {"bad_words_ids": [likeliest[:1]]},
    {"sequence_bias": [[likeliest[:1], -50.0]]},
    {"exponential_decay_length_penalty": (1, 100.0)},
    {"eos_token_id": [END, *likeliest[2:4]]},
    {"eos_token_id": None, "pad_token_id": None},
    {"guidance_scale": 4.0},
    {"return_dict_in_generate": True, "output_scores": True},
    {"use_cache": False},
    {"max_time": 1e-9},
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: ",".join(own))
def test_what_a_checkpoint_says_of_generation_changes_nothing(own: dict[str, Any]) -> None:
    decoder, prompt, end = plain("gpt2"), torch.tensor(PROMPTS[:1]), likeliest[4]
    wanted = [by_hand(decoder, prompt, NEW, end) for prompt in PROMPTS]
    fixed = greedy(decoder, prompt, NEW).tolist()
    settings = decoder.model.generation_config
    for name, value in own.items():
        setattr(settings, name, value)
    before = settings.to_dict()
    assert continue_each(decoder, PROMPTS, NEW, end) == wanted
    assert "eos_token_id" in own or greedy(decoder, prompt, NEW).tolist() == fixed, "nor a text of a fixed length"
    assert decoder.model.generation_config is settings, "and it keeps what it says"
    assert settings.to_dict() == before


def test_a_checkpoint_gets_its_settings_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = plain("gpt2")
    settings = decoder.model.generation_config

    def generate(*_: Any, **__: Any) -> None:
        assert decoder.model.generation_config is not settings
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder.model, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        continue_each(decoder, PROMPTS, NEW, END)
    assert decoder.model.generation_config is settings


def test_other_than_greedy_where_that_is_asked_for() -> None:
    decoder = plain("gpt2")
    beams = {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2}
    found = continue_each(decoder, PROMPTS, NEW, END, **beams)
    assert found != continue_each(decoder, PROMPTS, NEW, END)
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        alone = decoder.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=END,
            pad_token_id=END,
            **beams,
        )[0, len(prompt) :].tolist()
        assert row == (alone[: alone.index(END)] if END in alone else alone)
        pairs = list(zip([*prompt, *row], [*prompt, *row][1:], strict=False))
        assert len(set(pairs)) == len(pairs)


def test_prompt_and_new_tokens_may_fill_the_context_but_not_exceed_it() -> None:
    decoder = plain("gpt2")
    prompts = [list(range(CONTEXT - 5)), [7]]
    assert [len(row) for row in continue_each(decoder, prompts, 5, None)] == [5, 5]
    message = f"^prompt of {CONTEXT - 5} tokens and 6 new ones; accepted: {CONTEXT} in all, the context$"
    with pytest.raises(InputError, match=message):
        continue_each(decoder, prompts, 6, None)


def test_prompts_that_are_none_empty_or_of_another_tokenizer() -> None:
    decoder = plain("gpt2")
    assert continue_each(decoder, [], 5, END) == []
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    for act in (lambda: continue_each(decoder, [[1], []], 5, END), lambda: greedy(decoder, nothing, 5)):
        with pytest.raises(InputError, match=r"^a prompt of no tokens; accepted: at least one$"):
            act()
    with pytest.raises(InputError, match=f"token id {VOCABULARY} for a vocabulary of {VOCABULARY}"):
        continue_each(decoder, [[1], [VOCABULARY]], 5, END)
