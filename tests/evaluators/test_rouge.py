"""Summaries: what is read, what is scored, and that ROUGE is what its package says."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.special import stdtrit
from tiny import CONTEXT, Write, prose, tiny, tokenizer

from layerfold.checkpoint.model import POCKET, Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError, MissingExtraError
from layerfold.evaluators import Rouge, rouge
from layerfold.model.decoder import Decoder

DOCUMENTS = [
    "The river runs. A storm came! Was it winter? The film ended.",
    "One sentence alone",
    "Two of them. That is all.",
    prose(60, seed=1),
    "Rain fell on the town. People were running home. The storm passed. They sang an anthem. Night came.",
]
SUMMARIES = [
    "A storm on the river",
    "One sentence",
    "All of them, two",
    "the winter film",
    "People ran home in a storm",
]
LONG = 96
"""A context with room for the cue and some of a document."""

Data = Callable[..., str]


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text)["input_ids"]
    return ids


@pytest.fixture
def data(write: Write) -> Data:
    """Write documents with summaries as a test split and name them."""

    def data(
        documents: Sequence[str] = tuple(DOCUMENTS), summaries: Sequence[str] | None = None, folder: str = "summarized"
    ) -> str:
        chosen = SUMMARIES[: len(documents)] if summaries is None else summaries
        rows = [{"document": one, "summary": two} for one, two in zip(documents, chosen, strict=True)]
        return str(write(f"{folder}/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows)).parent)

    return data


@dataclass
class Writer:
    """Stands for a model: writes given texts, and keeps what it was asked."""

    texts: Callable[[list[int]], str]
    prompts: list[list[int]] = field(default_factory=list)
    asked: list[tuple[int, int | None, dict[str, Any]]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def __call__(
        self, _: Decoder, prompts: Sequence[list[int]], new_tokens: int, end: int | None, **options: Any
    ) -> list[list[int]]:
        self.prompts += prompts
        self.batches.append(len(prompts))
        self.asked.append((new_tokens, end, options))
        return [encode(self.texts(prompt)) for prompt in prompts]


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Writer]:
    """Let summaries be what a function of the prompt's tokens says."""

    def writing(texts: Callable[[list[int]], str] | str = "the storm") -> Writer:
        writer = Writer(texts if callable(texts) else lambda _: texts)
        monkeypatch.setattr(rouge, "continue_each", writer)
        return writer

    return writing


def by_package(summaries: Sequence[str], texts: Sequence[str], stemming: bool = True) -> dict[str, list[float]]:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemming)
    rated = [scorer.score(target=summary, prediction=text) for summary, text in zip(summaries, texts, strict=True)]
    return {metric: [one[metric].fmeasure for one in rated] for metric in ("rouge1", "rouge2", "rougeL")}


# What is read


def test_a_document_that_fits_is_read_whole_and_the_cue_follows_it(data: Data, writing: Any) -> None:
    model, writer = tiny("gpt2", n_positions=LONG), writing()
    short = [document for document in DOCUMENTS if len(encode(document)) < 80]
    assert len(short) == 3
    score = Rouge(data(short), new_tokens=8)(model)
    assert sorted(writer.prompts) == sorted(encode(document) + encode("\nTL;DR:") for document in short)
    assert score.details["truncated"] == 0
    assert {(new, end) for new, end, _ in writer.asked} == {(8, tokenizer().eos_token_id)}
    assert writer.asked[0][2] == {}, "greedy"


@pytest.mark.parametrize("cue", [rouge.CUE, " In short, with emphasis:", ""])
def test_a_longer_one_keeps_its_beginning_and_the_cue_is_whole(cue: str, data: Data, writing: Any) -> None:
    model, writer = tiny("gpt2", n_positions=LONG), writing()
    room = LONG - 20 - len(encode(cue))
    exact = "x" * room
    assert len(encode(exact)) == room
    chosen = [DOCUMENTS[3], DOCUMENTS[1], exact, exact + "x"]
    score = Rouge(data(chosen, SUMMARIES[:4]), new_tokens=20, cue=cue)(model)
    assert sorted(writer.prompts) == sorted(encode(document)[:room] + encode(cue) for document in chosen)
    assert max(map(len, writer.prompts)) + 20 == LONG
    assert score.details["truncated"] == 2, "the two that are longer, not the one that just fits"


def test_the_window_is_no_longer_than_studies_take_by_default_and_what_it_holds_scores_nothing(
    data: Data, writing: Any
) -> None:
    writer = writing("qqq")
    name = data([prose(2000)], [f"{prose(2000)[:500]} tl dr"])
    assert Rouge(name, new_tokens=10)(tiny("gpt2", n_positions=3000)).value == 0
    assert len(writer.prompts[0]) == 2048 - 10


def test_room_for_one_token_of_the_document_is_enough_and_none_is_refused(data: Data, writing: Any) -> None:
    model, writer = tiny("gpt2"), writing()
    cue = len(encode(rouge.CUE))
    name = data(DOCUMENTS[:1])
    Rouge(name, new_tokens=CONTEXT - cue - 1)(model)
    assert len(writer.prompts[0]) == 1 + cue
    for new_tokens in (CONTEXT - cue, CONTEXT, 1000):
        with pytest.raises(InputError) as caught:
            Rouge(name, new_tokens=new_tokens)(model)
        assert str(caught.value) == (
            f"rouge new_tokens {new_tokens}; accepted: less than the context, {CONTEXT}, less the cue's {cue} tokens"
        )


def test_as_many_documents_as_are_asked_for_from_the_first(data: Data, writing: Any) -> None:
    model, writer = tiny("gpt2", n_positions=LONG), writing()
    assert Rouge(data(), limit=2, new_tokens=8)(model).details["documents"] == 2
    assert sorted(writer.prompts) == sorted(encode(document + rouge.CUE) for document in DOCUMENTS[:2])
    assert Rouge(data(), limit=None, new_tokens=8)(model).details["documents"] == len(DOCUMENTS)
    assert Rouge(data(), limit=99, new_tokens=8)(model).details["documents"] == len(DOCUMENTS)
    many = [prose(3, seed) + f" {seed}" for seed in range(101)]
    assert Rouge(data(many, many, "many"), new_tokens=8)(model).details["documents"] == 100


# What is scored


def test_a_summary_is_the_new_tokens_alone(data: Data, family: str) -> None:
    model = tiny(family, **{"n_positions" if family == "gpt2" else "max_position_embeddings": LONG})
    score = Rouge(data(), new_tokens=6, batch_size=2)(model)
    texts = []
    for document in DOCUMENTS[:3]:
        cue = encode(rouge.CUE)
        ids = encode(document)[: LONG - 6 - len(cue)] + cue
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                likely = int(model.decoder.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if likely == tokenizer().eos_token_id:
                break
            ids.append(likely)
        texts.append(tokenizer().decode(ids[start:]))
    shown = score.details["summaries"]
    assert [each["text"] for each in shown] == texts
    assert [each["summary"] for each in shown] == SUMMARIES[:3]
    assert [each["document"] for each in shown] == DOCUMENTS[:3]


def test_each_summary_is_compared_with_its_own_document_s(data: Data, writing: Any) -> None:
    model = tiny("gpt2", n_positions=LONG)
    cue = len(encode(rouge.CUE))
    # Each text tells whose it is: batches are made by length.
    writer = writing(lambda prompt: tokenizer().decode(prompt[: min(12, len(prompt) - cue)]))
    score = Rouge(data(), new_tokens=8, batch_size=2)(model)
    assert writer.batches == [2, 2, 1]
    assert [len(prompt) for prompt in writer.prompts] == sorted(len(prompt) for prompt in writer.prompts)
    texts = [tokenizer().decode(encode(document)[:12]) for document in DOCUMENTS]
    assert score.details["each"] == by_package(SUMMARIES, texts)
    assert score.details["each"] != by_package(SUMMARIES, texts[1:] + texts[:1])


def test_figures_are_the_package_s_with_stemming_and_a_score_is_json(data: Data, writing: Any) -> None:
    writing("the storms were running in a river, and people sang")
    model, evaluator = tiny("gpt2", n_positions=LONG), Rouge(data(), new_tokens=8)
    score = evaluator(model)
    texts = ["the storms were running in a river, and people sang"] * len(DOCUMENTS)
    each = by_package(SUMMARIES, texts)
    assert each != by_package(SUMMARIES, texts, stemming=False)
    assert score.details["each"] == each
    for metric, values in each.items():
        half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5
        low, high = max(0.0, np.mean(values) - half), min(1.0, np.mean(values) + half)
        expected = {"value": np.mean(values), "low": low, "high": high}
        assert score.details[metric] == {bound: pytest.approx(value) for bound, value in expected.items()}
    assert {"value": score.value, "low": score.low, "high": score.high} == score.details["rougeL"]
    assert 0 <= score.low < score.value < score.high
    assert (score.unit, score.lower_is_better) == ("ROUGE-L", False)
    for found in (score, *evaluator.baselines(model).values()):
        written = found.to_json()
        assert json.loads(json.dumps(written, allow_nan=False)) == written
        assert len(written["summaries"]) == 3
        assert max(len(each["document"]) for each in written["summaries"]) <= 400


RUSSIAN = "Фильм хороший. Музыка тоже. Конец слабый."
CHINESE = "电影很好。音乐也好。结尾很弱。"


@pytest.mark.parametrize(("reference", "more"), [(RUSSIAN, " Номер {}."), (CHINESE, "这是第{}部。")])
def test_a_perfect_summary_is_perfect_in_any_script(reference: str, more: str, data: Data, writing: Any) -> None:
    documents = [reference + more.format(number) for number in range(5)]
    source = data(documents, [reference] * 5)
    writing(reference)
    perfect = Rouge(source, new_tokens=8)(tiny("gpt2", n_positions=LONG))
    lead = Rouge(source).baselines(tiny("gpt2"))["lead-3"]
    for score in (perfect, lead):
        assert {score.details[metric]["value"] for metric in ("rouge1", "rouge2", "rougeL")} == {1.0}
        assert score.details["stemming"] is False
    writing(reference[: len(reference) // 2])
    half = Rouge(source, new_tokens=8)(tiny("gpt2", n_positions=LONG))
    assert 0.3 < half.value < 1


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_an_empty_summary_scores_zero_and_is_counted(nothing: str, data: Data, writing: Any) -> None:
    first = encode(DOCUMENTS[1])
    writing(lambda prompt: "One sentence" if prompt[: len(first)] == first else nothing)
    score = Rouge(data(), new_tokens=8)(tiny("gpt2", n_positions=LONG))
    assert score.details["each"]["rouge1"] == [0, 1, 0, 0, 0]
    assert score.details["rouge1"]["value"] == score.value == pytest.approx(1 / 5), "of all, not of those with text"
    assert score.details["empty"] == 4
    assert score.details["documents"] == 5


def test_a_model_that_ends_at_once_writes_nothing(data: Data) -> None:
    model = tiny("gpt2", n_positions=LONG)
    network = model.decoder.model.transformer
    with torch.no_grad():
        network.ln_f.weight.zero_()
        network.ln_f.bias.copy_(10 * network.wte.weight[tokenizer().eos_token_id])
    score = Rouge(data(), new_tokens=8)(model)
    assert [each["text"] for each in score.details["summaries"]] == ["", "", ""]
    assert (score.value, score.details["empty"]) == (0, 5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_and_a_checkpoint_s_own_settings_change_nothing(family: str, data: Data) -> None:
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    model, source = tiny(family, **{name: LONG}), data(summaries=["ch d th 1 in"] * 5)
    wanted = Rouge(source, new_tokens=10, batch_size=1)(model)
    assert wanted.details["empty"] < 5
    for size in (2, 3, 16):
        assert Rouge(source, new_tokens=10, batch_size=size)(model) == wanted
    for key, value in {"do_sample": True, "num_beams": 4, "min_new_tokens": 9, "forced_eos_token_id": 5}.items():
        setattr(model.decoder.model.generation_config, key, value)
    assert Rouge(source, new_tokens=10)(model) == wanted


# What it is compared with


def test_the_first_three_sentences_and_three_at_random(data: Data) -> None:
    model, source = tiny("gpt2"), data()
    drawn = {}
    for seed in (0, 1, 2):
        found = Rouge(source, new_tokens=8, seed=seed).baselines(model)
        assert tuple(found) == Rouge.baseline_labels == ("lead-3", "random sentences")
        lead = ["The river runs. A storm came! Was it winter?", *DOCUMENTS[1:4]]
        lead.append("Rain fell on the town. People were running home. The storm passed.")
        assert found["lead-3"].details["each"] == by_package(SUMMARIES, lead), "no model, and no seed"
        assert [each["text"] for each in found["lead-3"].details["summaries"]] == lead[:3]
        texts = [each["text"] for each in found["random sentences"].details["summaries"]]
        for document, text in zip(DOCUMENTS[:3], texts, strict=True):
            sentences = document.replace("! ", "!|").replace(". ", ".|").replace("? ", "?|").split("|")
            chosen = text.replace("! ", "!|").replace(". ", ".|").replace("? ", "?|").split("|")
            assert len(chosen) == min(3, len(sentences)) == len(set(chosen))
            assert set(chosen) <= set(sentences)
        drawn[seed] = texts
        assert Rouge(source, new_tokens=8, seed=seed).baselines(model) == found
    assert len({tuple(texts) for texts in drawn.values()}) > 1
    assert Rouge(source, new_tokens=8).baselines(model) == Rouge(source, new_tokens=8, seed=0).baselines(model)


def test_random_sentences_are_drawn_from_all_of_a_document(data: Data) -> None:
    document = " ".join(f"Sentence {number} stands here." for number in range(20))
    source = data([document], ["none"])
    model = tiny("gpt2")
    seen = set()
    for seed in range(12):
        score = Rouge(source, seed=seed).baselines(model)["random sentences"]
        seen |= set(score.details["summaries"][0]["text"].removesuffix(".").split(". "))
    assert len(seen) > 12
    state = random.getstate()
    Rouge(source, seed=1).baselines(model)
    assert random.getstate() == state


# The published protocol


def test_the_published_protocol(data: Data, writing: Any) -> None:
    model = tiny("gpt2", n_positions=256)
    documents = ["the storms in winter", *(f"{number} {prose(60, number)}" for number in range(104))]
    summaries = ["the storm in winter", *(["the film"] * 104)]
    writer = writing(" and so on")
    source = data(documents, summaries)
    score = Rouge(source, protocol="published", new_tokens=9, limit=3, cue="never", batch_size=7)(model)
    assert sorted(writer.prompts) == sorted(encode(document)[:128] for document in documents[:100]), "no cue"
    assert all(len(encode(document)) > 128 for document in documents[1:])
    options = {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2}
    assert writer.asked == [(60, tokenizer().eos_token_id, options)] * 15
    texts = [tokenizer().decode(encode(document)[:128]) + " and so on" for document in documents[:100]]
    assert [each["text"] for each in score.details["summaries"]] == texts[:3], "the prompt is of it"
    assert score.details["each"] == by_package(summaries[:100], texts, stemming=False)
    assert score.details["each"] != by_package(summaries[:100], texts)
    assert score.details["truncated"] == 99
    assert score.details["protocol"] == "published"
    baseline = Rouge(source, protocol="published").baselines(model)["lead-3"]
    assert baseline.details["each"] == by_package(summaries[:100], documents[:100], stemming=False)
    assert Rouge(source, protocol="published").protocol_id == "summarization-published-2"
    assert Rouge(source).protocol_id == "summarization-2"


def test_the_published_protocol_in_a_short_context_takes_half_of_it(data: Data, writing: Any) -> None:
    writer = writing()
    Rouge(data(), protocol="published")(tiny("gpt2"))
    assert {new for new, _, _ in writer.asked} == {CONTEXT // 2}
    assert max(map(len, writer.prompts)) == CONTEXT - CONTEXT // 2


def test_the_published_protocol_with_a_real_model(data: Data) -> None:
    model = tiny("gpt2", n_positions=LONG, n_layer=1)
    one, many = (Rouge(data(), protocol="published", batch_size=size)(model) for size in (1, 16))
    assert one == many
    for document, each in zip(DOCUMENTS[:3], one.details["summaries"], strict=True):
        assert each["text"].startswith(tokenizer().decode(encode(document)[: LONG - LONG // 2]))


# What determines a figure


def test_settings_hold_what_determines_a_figure_and_no_more(data: Data) -> None:
    model, source = tiny("gpt2"), data()
    settings = Rouge(source).settings(model)
    assert settings == {
        "protocol": "sound",
        "data": source,
        "split": "test",
        "documents": 5,
        "documents_sha256": settings["documents_sha256"],
        "context": CONTEXT,
        "new_tokens": 64,
        "cue": "\nTL;DR:",
        "stemming": True,
    }
    assert Rouge(source).settings(tiny("gpt2", n_positions=LONG)) != settings
    data(summaries=[*SUMMARIES[:4], "Another"])
    assert Rouge(source).settings(model) != settings, "a summary that changed"
    pocket = Rouge().settings(Model(model.decoder, model.tokenizer, Provenance(POCKET)))
    assert (pocket["data"], pocket["documents"]) == ("aclsum", 100)


# What is refused


def test_the_missing_package_is_named_before_anything_is_generated(
    data: Data, writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writing()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    evaluator, model = Rouge(data(), new_tokens=8), tiny("gpt2")
    for ask in (evaluator, evaluator.baselines):
        with pytest.raises(MissingExtraError, match=r"^the package 'rouge-score' is not installed: .*\[rouge\]'$"):
            ask(model)
    assert writer.prompts == []
