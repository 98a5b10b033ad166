from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tiny import CONTEXT, VOCABULARY, tiny, tokenizer

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.evaluators import Generation
from layerfold.evaluators.generation import PROMPTS, repeated_fraction
from layerfold.inference.decoding import greedy, sampled

SHORT = Generation(prompts=("the river", "café 🎬"), new_tokens=9)


def wanting_to_stop(family: str) -> Model:
    """A model whose likeliest next token is always end-of-text."""
    model = tiny(family)
    network = model.decoder.model
    with torch.no_grad():
        if family == "gpt2":
            network.transformer.ln_f.weight.zero_()
            network.transformer.ln_f.bias.copy_(10 * network.transformer.wte.weight[VOCABULARY - 1])
        else:
            head = torch.nn.Linear(32, VOCABULARY)
            head.weight.zero_()
            head.bias.zero_()
            head.bias[VOCABULARY - 1] = 5
            network.set_output_embeddings(head)
    return model


@pytest.mark.parametrize(
    ("tokens", "n", "fraction"),
    [
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1, 1, 1, 1, 1, 1], 4, 2 / 3),  # three 4-grams, all alike
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 3, 4], 4, 0.0),
        ([1, 1, 1], 4, 0.0),
        ([], 4, 0.0),
        ([1, 2, 1, 2, 1], 2, 1 / 2),
        ([7, 7, 7, 8], 1, 1 / 2),
    ],
)
def test_the_repeated_fraction_by_hand(tokens: list[int], n: int, fraction: float) -> None:
    assert repeated_fraction(tokens, n=n) == pytest.approx(fraction)
    assert n != 4 or repeated_fraction(tokens) == pytest.approx(fraction)


def test_samples_are_greedy_continuations(family: str) -> None:
    model = tiny(family)
    score = SHORT(model)
    for sample, prompt in zip(score.details["samples"], SHORT.prompts, strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        start = len(ids)
        for _ in range(9):
            with torch.no_grad():
                likely = model.decoder.model(input_ids=torch.tensor([ids])).logits[0, -1]
            likely[VOCABULARY - 1] = -torch.inf  # end-of-text is suppressed
            ids.append(int(likely.argmax()))
        assert sample["prompt"] == prompt
        assert sample["text"] == tokenizer().decode(ids[start:])
        assert sample["repeated_fraction"] == repeated_fraction(ids[start:])
    assert score.value == pytest.approx(sum(s["repeated_fraction"] for s in score.details["samples"]) / 2)
    assert score.low <= score.value <= score.high


def test_generation_is_deterministic() -> None:
    model = tiny("llama")
    model.decoder.model.generation_config.do_sample = True  # as some published checkpoints set it
    assert SHORT(model) == SHORT(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exactly_as_many_tokens_even_where_the_model_wants_to_stop(family: str) -> None:
    model = wanting_to_stop(family)
    prompt = torch.tensor([tokenizer()("the")["input_ids"]])
    stopped = model.decoder.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=9, pad_token_id=0
    )
    assert stopped[0, prompt.shape[1] :].tolist() == [VOCABULARY - 1]  # it does want to
    prompt = torch.tensor([tokenizer()("the river")["input_ids"]])
    for tokens in (greedy(model.decoder, prompt, 9), sampled(model.decoder, prompt, 9, 0.8, 0.9, seed=0)):
        assert len(tokens) == 9
        assert VOCABULARY - 1 not in tokens


def test_a_prompt_may_fill_the_context_but_not_exceed_it() -> None:
    model, tokens = tiny("gpt2"), len(tokenizer()("the river")["input_ids"])
    assert len(Generation(("the river",), CONTEXT - tokens)(model).details["samples"]) == 1
    message = rf"prompt of {tokens} tokens and {CONTEXT - tokens + 1} new ones; accepted: {CONTEXT} in all"
    with pytest.raises(InputError, match=message):
        Generation(("the river",), CONTEXT - tokens + 1)(model)


def test_settings_hold_what_determines_the_text() -> None:
    model = tiny("gpt2")
    settings = Generation().settings(model)
    assert settings["new_tokens"] == 40
    # The tokens too: another tokenizer would have the model continue something else.
    assert settings["prompts"] == {prompt: model.require_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS}


def test_samples_are_drawn_by_the_seed_and_leave_other_random_numbers_alone(family: str) -> None:
    model = tiny(family)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = SHORT(model), SHORT(model), replace(SHORT, seed=1)(model)
    assert torch.equal(torch.rand(3), expected)
    assert first == again
    texts = [[sample["sampled"]["text"] for sample in score.details["samples"]] for score in (first, other)]
    assert texts[0] != texts[1]
    assert first.value == other.value, "the figure is that of the greedy texts"
    assert replace(SHORT, seed=0) == SHORT


def test_a_token_is_drawn_from_the_nucleus_by_its_probability_at_the_temperature() -> None:
    model = tiny("gpt2")
    prompt = torch.tensor([tokenizer()("the river")["input_ids"]])
    with torch.no_grad():
        logits = model.decoder.model(input_ids=prompt).logits[0, -1].double()
    logits[VOCABULARY - 1] = -torch.inf
    probability = (logits / 0.5).softmax(0)
    ordered = probability.sort(descending=True)
    kept = int((ordered.values.cumsum(0) < 0.4).sum()) + 1
    nucleus = set(ordered.indices[:kept].tolist())
    drawn = [int(sampled(model.decoder, prompt, 1, 0.5, 0.4, seed)[0]) for seed in range(300)]
    assert set(drawn) <= nucleus
    assert len(set(drawn)) > min(kept, 5) // 2
    likeliest = int(ordered.indices[0])
    assert int(sampled(model.decoder, prompt, 1, 0.5, 1e-6, seed=3)[0]) == likeliest, "the likeliest alone"
    share = float(probability[likeliest] / ordered.values[:kept].sum())
    assert abs(drawn.count(likeliest) / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "generation temperature 0.0; accepted: 0.01 ... 100"),
        ({"temperature": float("nan")}, "generation temperature nan; accepted: 0.01 ... 100"),
        ({"top_p": 0.0}, "generation top_p 0.0; accepted: above 0, at most 1"),
        ({"top_p": 1.5}, "generation top_p 1.5; accepted: above 0, at most 1"),
        ({"seed": -1}, "generation seed -1; accepted: 0 or more"),
        ({"seed": 2**32}, "generation seed 4294967296; accepted: 0 ... 4294967295"),
    ],
)
def test_how_texts_are_drawn_is_checked(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Generation(**settings)  # type: ignore[arg-type]
