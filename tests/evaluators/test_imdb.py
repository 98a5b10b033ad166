"""Accuracy as a figure: on which texts, cut how, trained how, and what it is compared with."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXT, Write, prose, tiny, tokenizer

from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, InputError
from layerfold.evaluators import Imdb
from layerfold.evaluators.classification import classifier
from layerfold.evaluators.classification.classifier import Padding, Training
from layerfold.evaluators.classification.imdb import versus
from layerfold.maths.intervals import wilson
from layerfold.text.examples import load_labelled

END = tokenizer().eos_token_id
QUICK = {"learning_rate": 3e-3, "batch_size": 8}


def reviews(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts shorter and longer than the context; one word, anywhere, tells the label, though not of every tenth."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = prose(rng.randrange(1, 30), seed * 1000 + number).split()
        label = number % 2
        words.insert(rng.randrange(len(words) + 1), ("bad", "good")[label if number % 10 else 1 - label])
        rows.append({"text": f"{' '.join(words)} {number}", "label": label})
    return rows


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(write: Write) -> str:
    write("reviews/train.jsonl", lines(reviews(50, 1)))
    return str(write("reviews/test.jsonl", lines(reviews(30, 2))).parent)


def token_counts(texts: tuple[str, ...]) -> list[int]:
    return [len(ids) for ids in tokenizer()(list(texts))["input_ids"]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training and the prediction were called with, by name."""
    calls: dict[str, Any] = {}

    def recorded(name: str, plain: Any) -> Any:
        return lambda *arguments: (calls.update({name: arguments}), plain(*arguments))[1]

    for name in ("train", "fit_head", "predict"):
        monkeypatch.setattr(classifier, name, recorded(name, getattr(classifier, name)))
    return calls


@pytest.mark.parametrize(("architecture", "body"), [("gpt2", True), ("llama", False)])
def test_neither_batch_nor_side_of_the_test_texts_changes_a_figure(architecture: str, body: bool, data: str) -> None:
    model = tiny(architecture)
    settings = {"data": data, "body": body, **QUICK}
    expected = Imdb(**settings)(model)
    assert 0 < expected.value < 1
    for changes in ({"padding": "left", "eval_batch_size": 1}, {"padding": "left"}, {"eval_batch_size": 7}):
        evaluator = Imdb(**settings, **changes)
        assert evaluator.settings(model) == Imdb(**settings).settings(model)
        found = evaluator(model)
        assert found.details["right"] == expected.details["right"], changes
        assert found == expected


@pytest.mark.parametrize("body", [True, False])
def test_the_score_is_the_share_of_right_ones_with_wilsons_interval(body: bool, data: str) -> None:
    model = tiny("gpt2")
    before = {name: tensor.clone() for name, tensor in model.decoder.model.state_dict().items()}
    score = Imdb(data=data, body=body, **QUICK)(model)
    right = score.details["right"]
    expected = wilson(sum(right), 30)
    assert (score.value, score.low, score.high) == (expected.value, expected.low, expected.high)
    assert len(right) == score.details["test_rows"] == 30
    assert (score.unit, score.lower_is_better, score.details["classes"]) == ("accuracy", False, [0, 1])
    assert score.details["largest_class"] == 0.5
    after = model.decoder.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not model.decoder.model.training


@pytest.mark.parametrize("labels", [(0, 1), ("bad", "good"), (7, "7"), (-1, 10**12)])
def test_labels_are_of_any_kind_and_what_tells_them_is_learnt(labels: tuple[Any, Any], write: Write) -> None:
    rows = [{"text": f"{prose(1, i)} {i} {'!?'[i % 2]}", "label": labels[i % 2]} for i in range(300)]
    path = write("rows.jsonl", lines(rows))
    score = Imdb(data=str(path), body=False)(tiny("gpt2"))
    assert score.value > 0.75
    assert sorted(map(str, score.details["classes"])) == sorted(map(str, labels))


@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_text_that_is_longer_is_cut_by_the_rule_and_counted(keep: Any, data: str, seen: dict[str, Any]) -> None:
    model = tiny("gpt2")
    score = Imdb(data=data, body=False, context=20, keep=keep)(model)
    _, rows, labels, *_ = seen["fit_head"]
    train, test = load_labelled(data)
    ids = {tuple(row): label for row, label in zip(rows, labels, strict=True)}
    for text, label in zip(train.texts, train.labels, strict=True):
        whole = tokenizer()(text)["input_ids"]
        assert ids[tuple(whole[:20] if keep == "first" else whole[-20:])] == label
    cut = [sum(count > 20 for count in token_counts(part.texts)) for part in (train, test)]
    assert 0 < cut[1] < 30
    assert (score.details["truncated_train"], score.details["truncated_test"]) == tuple(cut)
    assert max(map(len, seen["predict"][1])) == 20


def test_training_is_as_set_and_by_default_by_width(data: str, seen: dict[str, Any]) -> None:
    model = tiny("gpt2")
    Imdb(data=data, epochs=2, batch_size=5, learning_rate=1e-4, seed=3, padding="left")(model)
    assert seen["train"][4:6] == (Training(1e-4, 2, 5, 3), Padding("right"))
    assert seen["predict"][2] == Padding("left")
    Imdb(data=data)(model)
    assert seen["train"][4] == Training(pytest.approx(0.0576 / 32), 1, 16, 0)
    assert Imdb(data=data).settings(model)["learning_rate"] == seen["train"][4].learning_rate


@pytest.mark.parametrize("pool", ["last_token", "last_position"])
def test_the_published_run_is_repeated(pool: Any, data: str, seen: dict[str, Any]) -> None:
    model = tiny("gpt2", n_positions=150, n_layer=1)
    evaluator = Imdb(data=data, protocol="published", pool=pool, body=False, train_rows=4, test_rows=3, keep="last")
    score = evaluator(model)
    rows, (training, padding) = seen["train"][1], seen["train"][4:6]
    train, test = load_labelled(data)
    assert len(rows) == len(train.texts)  # all of them, whatever was asked for
    assert len(score.details["right"]) == len(test.texts) == 30
    whole = [tokenizer()(text)["input_ids"] for text in train.texts]
    assert max(map(len, whole)) > 128
    assert sorted(rows) == sorted(row[:128] for row in whole)
    assert training == Training(5e-5, 2, 2, 0)
    assert padding == seen["predict"][2] == Padding("right", 128, pool == "last_position", END)
    batch = padding([rows[0][:3], rows[1][:128]])
    assert batch["input_ids"].shape == (2, 128)
    assert batch["input_ids"][0, 3:].tolist() == [END] * 125
    assert batch["last"][0] == (127 if pool == "last_position" else 2)
    assert score.details["truncated_train"] == sum(len(row) > 128 for row in whole)
    assert (score.details["pool"], score.details["context"], score.details["keep"]) == (pool, 128, "first")
    assert evaluator.protocol_id != Imdb(data=data).protocol_id


def test_the_published_run_on_a_model_of_a_shorter_context_is_cut_there(data: str, seen: dict[str, Any]) -> None:
    Imdb(data=data, protocol="published")(tiny("llama", num_hidden_layers=1))
    assert seen["predict"][2].length == CONTEXT


def test_the_published_run_needs_an_end_of_text(data: str) -> None:
    model = tiny("gpt2")
    endless = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(InputError, match="the tokenizer has no end-of-text token to pad with"):
        Imdb(data=data, protocol="published")(Model(model.decoder, endless, model.provenance))
    assert Imdb(data=data, body=False)(Model(model.decoder, endless, model.provenance)).value > 0


def test_rows_are_drawn_by_the_seed_and_test_rows_always_the_same(data: str) -> None:
    model = tiny("gpt2")
    one, two, other = (Imdb(data=data, train_rows=20, test_rows=9, seed=seed, **QUICK)(model) for seed in (0, None, 1))
    assert one == two
    assert one.details["train_rows"] == other.details["train_rows"] == 20
    assert one.details["train_sha256"] != other.details["train_sha256"]
    assert one.details["test_sha256"] == other.details["test_sha256"]
    assert len(one.details["right"]) == 9
    every = Imdb(data=data, train_rows=10**9, test_rows=10**9).settings(model)
    assert (every["train_rows"], every["test_rows"]) == (len(load_labelled(data)[0].texts), 30)
    assert every["test_sha256"] != one.details["test_sha256"]
    assert Imdb(data=data, train_rows=None, test_rows=None).settings(model) == every


def test_the_words_alone_are_the_baseline(data: str) -> None:
    model, evaluator = tiny("gpt2"), Imdb(data=data, test_rows=20)
    found = evaluator.baselines(model)
    assert tuple(found) == evaluator.baseline_labels
    score = found["bag of words"]
    assert score.details["test_sha256"] == evaluator.settings(model)["test_sha256"]
    # "good" and "bad" tell nine in ten, wherever they stand: the model, of whatever weights, is not asked.
    test = load_labelled(data)[1]
    order = np.random.default_rng(0).permutation(30)[:20]
    told = [("good" in test.texts[i]) == test.labels[i] for i in order]
    assert score.value == pytest.approx(np.mean(told), abs=0.11)
    assert score.value > 0.7
    assert evaluator.baselines(tiny("llama", seed=4))["bag of words"].details["right"] == score.details["right"]
    same = versus(score.to_json(), score.to_json())
    assert same is not None
    assert same["value"] == 0
    assert same["low"] < 0 < same["high"]


def test_a_comparison_is_paired_and_of_the_same_texts_only() -> None:
    rng = np.random.default_rng(0)
    base = {"test_sha256": "a", "right": rng.integers(0, 2, 400).tolist()}
    score = {"test_sha256": "a", "right": [*([1] * 12), *base["right"][12:]]}
    found = versus(score, base)
    assert found is not None
    assert found["value"] == pytest.approx((sum(score["right"]) - sum(base["right"])) / 400)
    assert 0 <= found["low"] < found["value"] < found["high"] < 0.04  # apart, each is known to within 0.05
    assert versus({**score, "test_sha256": "b"}, base) is None


def test_duplicates_between_the_splits_are_counted_and_a_class_that_is_missing_is_refused(write: Write) -> None:
    train, test = reviews(50, 1), reviews(20, 2)
    write("reviews/train.jsonl", lines([*train, *test[:4], train[0]]))
    folder = write("reviews/test.jsonl", lines([*test, test[1]])).parent
    score = Imdb(data=str(folder), body=False)(tiny("gpt2"))
    assert (score.details["duplicates_dropped"], score.details["test_rows"]) == (6, 20)
    rows = [{"text": f"text {i}", "label": "rare" if i < 3 else "often"} for i in range(60)]
    write("data/train.jsonl", lines(rows))
    folder = write("data/test.jsonl", lines([{"text": label, "label": label} for label in ("rare", "often")])).parent
    with pytest.raises(InputError, match=r"imdb train_rows 2; accepted: more, since none has label 'rare'"):
        Imdb(data=str(folder), train_rows=2).settings(tiny("gpt2"))


def test_what_a_model_cannot_read_is_refused(data: str, write: Write) -> None:
    model = tiny("gpt2")
    small = tiny("gpt2", vocab_size=100, bos_token_id=0, eos_token_id=0)
    with pytest.raises(InputError, match=r"token id \d+ for a vocabulary of 100: the wrong tokenizer\?"):
        Imdb(data=data)(small)

    def silent(texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[] if text.startswith("text 1") else [1] for text in texts]}

    path = str(write("rows.jsonl", lines([{"text": f"text {i}", "label": i % 2} for i in range(200)])))
    with pytest.raises(InputError, match="the tokenizer finds no token in the text 'text 1"):
        Imdb(data=path)(Model(model.decoder, silent, model.provenance))  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match=r"no file or folder at 'missing\.csv'"):
        Imdb(data="missing.csv")(model)
