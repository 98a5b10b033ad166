"""The text that is trained on: whole windows, read again in other orders, and what there is too little of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Train
from tiny import Write, prose, tokenizer

import layerfold
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import CorpusError, InputError, LayerfoldError
from layerfold.recovery.text import TrainingText, settings, training_text, training_windows, windows_of
from layerfold.text.corpora import load_corpus


@pytest.fixture
def little(write: Write) -> str:
    """A folder of about 100 training tokens, which is six windows of 16 and a rest."""
    write("little/train.txt", "\n\n".join(["calibration document 18", *(f"text {i}" * 3 for i in range(6))]))
    write("little/validation.txt", prose(60, seed=9))
    return str(write("little/test.txt", prose(60, seed=8)).parent)


def cut(corpus: str, steps: int = 2, seed: int = 0, **changes: Any) -> TrainingText:
    return training_text(runs.small(), runs.finetune(corpus, steps, **changes), seed)


def test_the_windows_are_the_stream_of_training_documents_and_none_is_padded(little: str) -> None:
    ids = runs.train_ids(little, seed=3)
    assert len(ids) in range(65, 128), "too little for two steps: read again"
    assert len(ids) % 16, "a rest"
    text = cut(little, seed=3)
    whole = len(ids) // 16
    assert text.train.input_ids.tolist() == [ids[16 * i : 16 * i + 16] for i in range(whole)]
    assert text.train.lengths.tolist() == [16] * whole
    assert (text.steps, text.tokens) == (2, 128)


@pytest.mark.parametrize(("tokens", "steps"), [(64, 1), (127, 1), (128, 2), (200, 3)])
def test_tokens_are_rounded_down_to_whole_steps_and_no_more_text_is_cut(tokens: int, steps: int, train: Train) -> None:
    text = cut(train.corpus, tokens=tokens)
    assert (text.steps, text.tokens, len(training_windows(text))) == (steps, 64 * steps, 4 * steps)
    assert text.train.input_ids.shape == (4 * steps, 16)
    assert text.train.input_ids.flatten().tolist() == runs.train_ids(train.corpus)[: 64 * steps]


def test_a_text_too_short_is_read_again_in_another_order_each_window_once_a_reading(little: str) -> None:
    text = cut(little, steps=7)
    rows = len(text.train)
    assert 3 * rows < 28, "four readings, the last in part"
    windows = training_windows(text)
    known = [tuple(row) for row in text.train.input_ids.tolist()]
    assert len(set(known)) == rows
    order = [known.index(tuple(windows[i]["input_ids"].tolist())) for i in range(len(windows))]
    readings = [order[start : start + rows] for start in range(0, len(order), rows)]
    assert readings[0] == list(range(rows))
    for reading in readings[:-1]:
        assert sorted(reading) == list(range(rows))
    assert len(set(readings[-1])) == len(readings[-1])
    assert len({tuple(reading) for reading in readings[:-1]}) == 3, "each another order"
    # Whatever was asked for before, as after resuming: the order is the same.
    again = training_windows(text)
    for index in (27, 0, rows, 13, rows - 1, 27, 2 * rows):
        assert torch.equal(again[index]["input_ids"], windows[index]["input_ids"])


def test_another_seed_is_another_order_of_documents_and_of_readings(little: str) -> None:
    one, two = cut(little, steps=7, seed=0), cut(little, steps=7, seed=1)
    assert not torch.equal(one.train.input_ids, two.train.input_ids)
    same = TrainingText(one.train, one.validation, one.steps, one.tokens, one.batch_size, seed=1)
    first, second = (torch.stack([w[i]["input_ids"] for i in range(28)]) for w in map(training_windows, (one, same)))
    rows = len(one.train)
    assert torch.equal(first[:rows], second[:rows])
    assert not torch.equal(first[rows : 2 * rows], second[rows : 2 * rows])


def test_nothing_of_the_other_splits_is_read(write: Write) -> None:
    for split in ("train", "validation", "test"):
        write(f"data/{split}.txt", "\n\n".join(f"{split} {i}" for i in range(40)))
    corpus = str(write("data/readme.md", "").parent)
    text = cut(corpus, steps=1)
    train, validation = (tokenizer().decode(w.input_ids.flatten()) for w in (text.train, text.validation))
    assert "train" in train
    assert "validation" in validation
    for found, others in ((train, ("validation", "test")), (validation, ("train", "test"))):
        assert not [other for other in others if other in found]
    held_apart = [f" {document.split()[1]}<" for document in load_corpus(corpus, "calibration").documents]
    long = tokenizer().decode(cut(corpus, steps=6).train.input_ids.flatten()).replace("train ", " ")
    assert held_apart
    assert not [each for each in held_apart if each in long]


def test_validation_windows_keep_their_lengths(train: Train) -> None:
    text = cut(train.corpus, validation_tokens=20)
    windows = windows_of(text.validation)
    assert [int(windows[i]["length"]) for i in range(len(windows))] == [16, 4]


def test_a_shortened_text_has_fewer_steps_and_the_same_windows(train: Train) -> None:
    text = cut(train.corpus, steps=8)
    for fraction, steps in ((0.25, 2), (0.01, 1), (1.0, 8)):
        short = text.shortened(fraction)
        assert (short.steps, short.tokens, len(training_windows(short))) == (steps, 64 * steps, 4 * steps)
        assert torch.equal(training_windows(short)[3]["input_ids"], training_windows(text)[3]["input_ids"])


def test_what_the_text_is_stands_in_the_settings(little: str, train: Train) -> None:
    teacher = runs.small(seed=1)

    def said(corpus: str = train.corpus, seed: int = 0, **changes: Any) -> dict[str, Any]:
        recovery = runs.distill(corpus, **changes)
        return settings(recovery, training_text(runs.small(), recovery, seed), teacher)

    plain = said()
    assert plain["teacher_sha256"] == teacher.sha256
    assert json.loads(json.dumps(plain)) == plain
    assert plain["seed"] == 0
    changed = [said(little), said(seed=1), said(context=8), said(validation_tokens=32), said(learning_rate=None)]
    assert len({json.dumps(each, sort_keys=True) for each in [plain, *changed]}) == 6
    assert said(report_to="tensorboard") == plain
    recovery = train.finetune()
    assert settings(recovery, training_text(runs.small(), recovery, 0), teacher)["teacher_sha256"] is None


def test_an_edited_corpus_changes_the_settings(write: Write) -> None:
    def said() -> dict[str, Any]:
        recovery = runs.finetune(str(path), steps=1)
        return settings(recovery, training_text(runs.small(), recovery, 0), None)

    texts = [f"{prose(30, seed)}\n" for seed in range(60)]
    path = write("edited.txt", "\n".join(texts))
    before = said()
    write("edited.txt", "\n".join(["text 0" * 3 + "\n", *texts]))
    assert "text 0" * 3 + "\n" in load_corpus(str(path), "validation").documents
    after = said()
    assert {key for key in after if after[key] != before[key]} >= {"validation_corpus_sha256"}
    assert after["corpus_sha256"] == before["corpus_sha256"]


def refused(corpus: str, **changes: Any) -> str:
    with pytest.raises(LayerfoldError) as caught:
        cut(corpus, **changes)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_text_and_settings_that_do_not_fit_are_refused(write: Write, train: Train) -> None:
    assert refused(train.corpus, tokens=63) == (
        "InputError: tokens 63; accepted: 64 or more, one step of 4 windows (batch_size) of 16 tokens (context)"
    )
    beyond = refused(train.corpus, context=33, tokens=999)
    assert beyond == "InputError: context 33; accepted: 2 ... 32 (the model's maximum)"
    with pytest.raises(InputError, match="for a vocabulary of 100: the wrong tokenizer"):
        training_text(runs.small(vocab_size=100), train.finetune(), 0)
    write("few/train.txt", "a b\n\nc d\n\ne")
    write("few/validation.txt", prose(60))
    few = str(write("few/test.txt", prose(60, 1)).parent)
    assert "split 'train' has" in refused(few, steps=1)
    assert "at least one window of 16 is needed" in refused(few, steps=1)
    write("none/train.txt", "\n\n".join(prose(30, seed) for seed in range(9)))
    without = str(write("none/test.txt", prose(60, 1)).parent)
    assert "no documents in split 'validation'; splits with documents:" in refused(without)


def test_the_context_is_the_models_where_none_is_given(train: Train) -> None:
    assert cut(train.corpus, context=None).train.context == 32
    long = runs.small(n_positions=300)
    assert training_text(long, train.finetune(context=None, tokens=1024), 0).train.context == 256


@pytest.mark.parametrize("where", ["train", "validation"])
def test_text_that_stands_in_what_is_held_out_is_named(where: str, write: Write, tmp_path: Path) -> None:
    corpus, held_out = runs.shared_text(write, where)
    with pytest.raises(CorpusError, match=rf"1 documents stand in both .*one' {where} .*two' test.*'{runs.LINE[:40]}'"):
        layerfold.recover(
            runs.small(), runs.finetune(corpus, steps=1), held_out=held_out, training_dir=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_text_that_stands_apart_is_trained_on(write: Write) -> None:
    corpus, held_out = runs.shared_text(write, "test")  # where recovery does not look
    done = layerfold.recover(runs.small(), runs.finetune(corpus, steps=1), held_out=held_out)
    assert done.provenance.steps[-1]["notes"]["steps"] == 1
    layerfold.recover(runs.small(), runs.finetune(corpus, steps=1), held_out=corpus)


def test_pocket_is_held_apart_from_what_it_is_measured_on(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, held_out = runs.shared_text(write, "train")
    model = runs.small()
    as_pocket = layerfold.Model(model.decoder, model.tokenizer, Provenance("pocket"))
    monkeypatch.setattr("layerfold.api.default_corpus", lambda _: held_out)
    with pytest.raises(CorpusError, match="stand in both"):
        layerfold.recover(as_pocket, runs.finetune(corpus, steps=1))
