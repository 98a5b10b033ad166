"""A text of one's own, from the command line: what is read of it, and what is said of that."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import Write, prose, tiny

import layerfold
from layerfold import Drop, Score, api
from layerfold.api import each_score
from layerfold.errors import CorpusError, ModelError, OfflineError
from layerfold.evaluators import Imdb, Size
from layerfold.progress import Silent
from layerfold.text.corpora import load_corpus, read_corpus
from layerfold.text.sources import unsplit
from layerfold.text.used import check_unread, texts_read


class Notes(Silent):
    """Keeps the lines that it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def lines(write: Write) -> str:
    """A file with one short text a line and no blank line."""
    return str(write("lines.txt", "".join(f"{number} {prose(8, number)}\n" for number in range(60))))


def test_eval_scores_all_of_a_file_or_the_test_split_where_there_is_one_and_says_so(
    layerfold: Any, model: Path, lines: str, corpus_folder: str
) -> None:
    words = ("eval", model, "--metrics", "perplexity", "--corpus")
    whole = layerfold(*words, lines)
    assert whole.code == 0, whole.err
    assert "  split: all\n" in whole.out
    assert "  text: 60 documents, one a line\n" in whole.out
    count = len(load_corpus(lines, "test").documents)
    assert f"  text: {count} of 60 documents, one a line\n" in layerfold(*words, lines, "--split", "test").out
    score = json.loads(layerfold(*words, corpus_folder, "--json").out)["perplexity"]
    assert (score["split"], score["text"]) == ("test", "6 documents")


def test_a_repair_reads_train_too_where_calibration_is_short_and_says_how_much_there_was(
    layerfold: Any, model: Path, lines: str, tmp_path: Path
) -> None:
    done = layerfold(
        *("compress", "drop", "--model", model, "--blocks", "1", "--repair", "refit"),
        *("--corpus", lines, "--output-dir", tmp_path / "small"),
    )
    assert done.code == 0, done.err
    text = read_corpus(lines)
    share = (text["calibration"] + text["train"]).share
    assert f"repair: {lines!r}, split calibration+train, {share}: " in done.out
    assert " of the 65,536 tokens asked for; a longer text gives more (--corpus)" in done.out
    step = json.loads((tmp_path / "small" / "layerfold.json").read_text())["provenance"]["steps"][-1]
    assert step["calibration"]["split"] == "calibration+train"


def test_calibration_alone_is_read_where_it_is_long_enough(write: Write) -> None:
    text = str(write("long.txt", "\n\n".join(prose(60, number) for number in range(100))))
    notes = Notes()
    small = layerfold.compress(tiny("gpt2"), layerfold.Merge(n=2), corpus=text, tokens=100, progress=notes)
    share = load_corpus(text, "calibration").share
    assert notes.lines == [f"calibration: {text!r}, split calibration, {share}: 100 tokens"]
    calibration = small.provenance.steps[-1]["calibration"]
    assert calibration["corpus_sha256"] == load_corpus(text, "calibration").sha256


def test_a_file_of_one_document_calibrates_and_cannot_be_split(write: Write) -> None:
    text = str(write("one.jsonl", json.dumps({"text": prose(200, 1)}) + "\n"))
    small = layerfold.compress(tiny("gpt2"), Drop(blocks="1"), corpus=text, repair="refit")
    assert small.provenance.steps[-1]["calibration"]["tokens"] > 100
    with pytest.raises(CorpusError, match="has 1 documents, too few to hold out any for split 'test'"):
        layerfold.evaluate(tiny("gpt2"), ["perplexity"], corpus=text, split="test")
    with pytest.raises(CorpusError, match=r"the model was made with text of .*; accepted: another text$"):
        layerfold.evaluate(small, ["perplexity"], corpus=text)


@pytest.mark.parametrize("moved", [False, True])
def test_a_model_is_not_measured_on_all_of_the_text_it_was_made_with(
    moved: bool, lines: str, study_corpus: str, tmp_path: Path
) -> None:
    small = layerfold.compress(tiny("gpt2"), Drop(blocks="1"), corpus=lines, repair="refit")
    small.save(tmp_path / "small")
    small, name = layerfold.load(tmp_path / "small"), lines
    check_unread(small.provenance, read_corpus(study_corpus))  # another text is measured whole
    assert [text.corpus for text in texts_read(small.provenance)] == [lines]
    if moved:
        name = str(Path(lines).rename(tmp_path / "elsewhere.txt"))
    with pytest.raises(CorpusError, match=r"would look too good; accepted: --split test, which it has not read$"):
        layerfold.evaluate(small, ["perplexity"], corpus=name)
    assert layerfold.evaluate(small, ["perplexity"], corpus=name, split="test")["perplexity"].value > 1
    assert layerfold.evaluate(tiny("gpt2"), ["perplexity"], corpus=name)["perplexity"].details["split"] == "all"


def test_another_file_of_the_same_name_in_another_folder_is_not_taken_for_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, first in (("a", 0), ("b", 100)):
        write(f"{name}/data.txt", "\n\n".join(prose(30, seed) for seed in range(first, first + 60)))
    monkeypatch.chdir(tmp_path / "a")
    made = layerfold.compress(tiny("gpt2"), Drop(blocks="1"), corpus="data.txt", repair="refit", repair_tokens=300)
    with pytest.raises(CorpusError, match="the model was made with text of"):
        check_unread(made.provenance, read_corpus("data.txt"))
    monkeypatch.chdir(tmp_path / "b")
    check_unread(made.provenance, read_corpus("data.txt"))


def test_the_reviews_are_split_whatever_lies_here_under_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "mine.txt").write_text("one\n\ntwo\n")
    monkeypatch.chdir(tmp_path)
    assert not unsplit("imdb")
    assert unsplit("imdb/mine.txt")


def test_what_trained_a_model_is_remembered(write: Write, layerfold: Any, tmp_path: Path, model: Path) -> None:
    text = str(write("long.txt", "\n\n".join(prose(40, number) for number in range(80))))
    settings = ("--set", "batch_size=2", "--set", "context=32", "--learning-rate", "0.001")
    done = layerfold(
        *("recover", model, "--method", "finetune", "--tokens", "128", *settings),
        *("--corpus", text, "--output-dir", tmp_path / "trained"),
    )
    assert done.code == 0, done.err
    assert f"training: {text!r}, split train, {load_corpus(text, 'train').share}: 128 tokens" in done.out
    refused = layerfold("eval", tmp_path / "trained", "--metrics", "perplexity", "--corpus", text)
    assert refused.code == 2
    assert "accepted: --split test" in refused.err


def test_offline_the_message_names_a_file_and_the_text_that_the_model_knows(
    offline: None, layerfold: Any, lines: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = layerfold("eval", model, "--metrics", "perplexity")
    assert unknown.code == 2
    assert "is not in the local cache; accepted: a file or a folder of text, as --corpus FILE" in unknown.err
    refused = layerfold("compress", "merge", "--n", 2, "--model", model, "--output-dir", tmp_path / "merged")
    assert "as --corpus FILE" in refused.err
    repair = ("--repair", "refit", "--corpus", lines)
    layerfold("compress", "drop", "--model", model, "--blocks", "1", *repair, "--output-dir", tmp_path / "small")
    known = layerfold("eval", tmp_path / "small", "--metrics", "perplexity")
    assert f"as --corpus FILE; the model's layerfold.json names {lines!r}" in known.err
    monkeypatch.setitem(sys.modules, "datasets", None)  # the package for the Hub is missing
    refused = layerfold("eval", model, "--metrics", "perplexity")
    assert "accepted without it: a file or a folder of text, as --corpus FILE" in refused.err


def test_scores_come_one_by_one_and_what_can_be_refused_is_before_anything_is_measured(
    offline: None, lines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = each_score(tiny("gpt2"), ["size", "perplexity"], corpus=lines)
    assert next(scores)[0] == "size"
    assert next(scores)[0] == "perplexity"
    assert api.evaluate(tiny("gpt2"), ["size"])["size"].value > 0
    measured: list[str] = []
    monkeypatch.setattr(Size, "__call__", lambda *_: measured.append("size"))
    with pytest.raises(OfflineError):
        layerfold.evaluate(tiny("gpt2"), ["size", "perplexity"])
    assert measured == []


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_what_was_measured_is_shown_where_a_later_metric_refuses(
    form: tuple[str, ...], layerfold: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Score:
        raise ModelError("no text can be generated")

    monkeypatch.setattr("layerfold.evaluators.Generation.__call__", refuse)
    done = layerfold("eval", model, "--metrics", "size,generation", *form)
    assert done.code == 2
    assert done.err.endswith("layerfold: no text can be generated\n")
    if form:
        assert list(json.loads(done.out)) == ["size"]
    else:
        assert done.out.startswith("size: ")


@pytest.mark.parametrize("classes", [2, 5])
def test_labels_in_turn_that_the_text_says_nothing_of_are_told_by_nobody(classes: int, write: Write) -> None:
    rng = random.Random(0)
    rows = [{"text": f"review {rng.random()} {prose(5, i)}", "label": i % classes} for i in range(500)]
    data = str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    evaluator = Imdb(data=data, body=False, train_rows=200)
    scores = [evaluator(tiny("gpt2")), evaluator.baselines(tiny("gpt2"))["bag of words"]]
    for score in scores:
        assert 1 / classes <= score.details["largest_class"] < 2 / classes
        assert score.low < score.details["largest_class"]
        assert score.high > 1 / classes
