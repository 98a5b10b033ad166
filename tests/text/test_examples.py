"""Labelled texts and documents with summaries: what is read, in which split, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tiny import Write

from layerfold.errors import LayerfoldError, MissingExtraError, OfflineError
from layerfold.text import sources
from layerfold.text.corpora import load_corpus, read_corpus
from layerfold.text.examples import Labelled, Summarized, load_labelled, load_summaries


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(*rows: tuple[str, Any]) -> str:
    return lines(*({"text": text, "label": label} for text, label in rows))


def numbered(count: int) -> list[tuple[str, int]]:
    return [(f"text {i}", i % 3) for i in range(count)]


def table(*rows: tuple[object, ...]) -> str:
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    return written.getvalue()


def failing(name: Path | str, load: Any = load_labelled) -> str:
    """The one line that what cannot be read is refused with."""
    with pytest.raises(LayerfoldError) as raised:
        load(str(name))
    assert "\n" not in str(raised.value)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_texts_are_split_as_a_corpus_is_and_keep_their_labels(write: Write) -> None:
    path = write("rows.jsonl", labelled(*numbered(60)))
    train, test = load_labelled(str(path))
    assert test.texts == load_corpus(str(path), "test").documents
    assert train.texts == load_corpus(str(path), "train").documents
    for part in (train, test):
        assert part.labels == tuple(int(text.split()[1]) % 3 for text in part.texts)
    assert (train.split, test.split, train.dropped, test.dropped) == ("train", "test", 0, 0)
    assert test.corpus.documents == test.texts
    assert (test.corpus.name, test.corpus.split) == (str(path), "test")


def test_every_kind_of_file_gives_the_same_texts(write: Write, tmp_path: Path) -> None:
    rows = [(f'é "{i}",\n映画', "pos" if i % 2 else "neg") for i in range(40)]
    texts, labels = zip(*rows, strict=True)
    parquet.write_table(pyarrow.table({"label": labels, "text": texts}), tmp_path / "rows.parquet")
    write("rows.jsonl", labelled(*rows))
    write("rows.csv", "\ufeff" + table(("text", "label"), *rows))
    found = [load_labelled(str(tmp_path / f"rows.{suffix}")) for suffix in ("jsonl", "csv", "parquet")]
    assert {part.sha256 for part in (train for train, _ in found)} == {found[0][0].sha256}
    assert {part.labels for part in (test for _, test in found)} == {found[0][1].labels}
    assert found[0][0].texts == found[1][0].texts == found[2][0].texts


def test_a_folder_with_a_train_and_a_test_file(write: Write) -> None:
    write("data/train-0.csv", table(("label", "text"), *((i % 2, f"train {i}") for i in range(30))))
    folder = write("data/test.jsonl", labelled(("test 0", "0"), ("test 1", "1"))).parent
    train, test = load_labelled(str(folder))
    assert test.texts == ("test 0", "test 1")
    calibration = load_corpus(str(folder), "calibration").documents
    assert sorted([*train.texts, *calibration]) == sorted(f"train {i}" for i in range(30))
    assert calibration


def test_duplicates_are_dropped_from_train_and_counted(write: Write) -> None:
    train = [*numbered(30), ("only in test", 0), (" also \n in validation", 1), ("text  7", 2)]
    write("data/train.jsonl", labelled(*train))
    write("data/validation.jsonl", labelled(("also in validation", 1), ("only in test", 1)))
    test = (("only in  test", 0), ("other", 1), ("other\n", 2), ("third", 2))
    folder = write("data/test.jsonl", labelled(*test)).parent
    train_part, test_part = load_labelled(str(folder))
    assert test_part.texts == ("only in  test", "other", "third")
    assert test_part.labels == (0, 1, 2)  # the first stays
    assert not {"only in test", " also \n in validation", "text  7"} & set(train_part.texts)
    assert (train_part.dropped, test_part.dropped) == (3, 1)


def test_the_hash_is_of_texts_labels_and_their_kinds() -> None:
    def sha256(texts: tuple[str, ...], labels: tuple[Any, ...]) -> str:
        return Labelled("", "train", texts, labels, 0).sha256

    given = [(("a", "b"), (0, 1)), (("a", "b"), (1, 0)), (("a", "b"), ("0", "1")), (("b", "a"), (0, 1))]
    assert len({sha256(*each) for each in given}) == 4
    assert sha256(("a",), (1,)) == Labelled("another", "test", ("a",), (1,), 9).sha256


@pytest.mark.parametrize("label", [True, 1.0, None, "", "  ", ["a\nb"], {"a": "b" * 99}])
def test_a_label_that_is_none_names_row_field_and_what_is_accepted(label: Any, write: Write) -> None:
    path = write("rows.jsonl", labelled(*numbered(2), ("text", label)))
    message = failing(path)
    assert message.startswith(f"CorpusError: {str(path)!r} line 3: field 'label' is {f'{label!r:.40}'}, ")
    assert message.endswith("; accepted: an integer or a string that is not empty")
    assert len(message) < len(str(path)) + 170


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "labels": 1}, "line 2 has no field 'label'; did you mean 'labels'? accepted: labels, text"),
        ({"texts": "a", "label": 1}, "line 2 has no field 'text'; did you mean 'texts'? accepted: label, texts"),
        ({"text": 7, "label": 1}, "line 2: field 'text' is int, not text"),
        ({"text": "", "label": 1}, "line 2: field 'text' is empty"),
        ({"text": " \n", "label": 1}, "line 2: field 'text' is empty"),
    ],
)
def test_a_bad_row_is_named(row: Any, said: str, write: Write) -> None:
    assert said in failing(write("rows.jsonl", labelled(("a", 0)) + lines(row)))


def test_columns_of_other_names_follow_a_colon(write: Write) -> None:
    rows = [{"review": f"r{i}", "stars": i % 5, "text": "wrong", "label": 9} for i in range(400)]
    path = write("rows.jsonl", lines(*rows))
    train, test = load_labelled(f"{path}: review , stars")
    assert set(train.labels) == {0, 1, 2, 3, 4}
    assert set(test.texts) | set(train.texts) < {f"r{i}" for i in range(400)}
    assert "line 1 has no field 'star'; did you mean 'stars'?" in failing(f"{path}:review,star")
    null = write("null.jsonl", lines({"text": "a", "nothing": None}))
    assert "line 1: field 'nothing' is None, NoneType" in failing(f"{null}:text,nothing")


def test_another_number_of_columns_is_refused(write: Write) -> None:
    path = write("rows.jsonl", labelled(*numbered(20)))
    for given in ("review", "review,stars,label", "review,", ",stars"):
        name = f"{path}:{given}"
        expected = f"InputError: {name!r} names the fields {given!r}; accepted: 2, for text and label"
        assert failing(name) == expected


def test_classes_must_be_several_and_known_from_train(write: Write) -> None:
    one = write("one.jsonl", labelled(*((f"text {i}", "good") for i in range(40))))
    assert (
        failing(one) == f"CorpusError: labelled texts {str(one)!r} have one label only, 'good'; accepted: two or more"
    )
    write("data/train.jsonl", labelled(*((f"text {i}", i % 2) for i in range(20))))
    folder = write("data/test.jsonl", labelled(("a", 0), ("b", "1"))).parent
    message = failing(folder)  # the string is not the number
    assert "label '1' is in test, but not in train (19 texts); accepted: each label in both" in message
    write("data/test.jsonl", labelled(("a", 0)))
    assert "label 1 is in train, but not in test (1 texts); accepted: each label in both" in failing(folder)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_labels_in_turn_stand_in_both_splits_alike(classes: int, write: Write) -> None:
    rows = [(f"review number {i} says nothing at all", i % classes) for i in range(100 * classes)]
    train, test = load_labelled(str(write("rows.jsonl", labelled(*rows))))
    assert set(train.labels) == set(test.labels) == set(range(classes))
    assert max(map(test.labels.count, test.labels)) < 2.5 * len(test.labels) / classes


def test_text_alone_and_an_unknown_name_are_refused(write: Write) -> None:
    for load in (load_labelled, load_summaries):
        message = failing(write("rows.txt", "one\n\ntwo"), load)
        assert message.startswith("InputError: ")
        assert message.endswith("are needed: .csv, .jsonl, .parquet")
    assert failing("imbd").startswith("InputError: unknown corpus 'imbd'; did you mean 'imdb'?")
    assert failing("aclsun", load_summaries).startswith("InputError: unknown corpus 'aclsun'; did you mean 'aclsum'?")
    assert failing("none.csv") == "CorpusError: no file or folder at 'none.csv'"


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_a_file_without_rows_has_no_labelled_texts(content: str, write: Write) -> None:
    path = write("rows.csv", content)
    said = f"CorpusError: labelled texts {str(path)!r} have none in split 'train'"
    assert failing(path) == f"{said}; accepted: 4 texts or more, or a folder of train and test files"
    folder = write("data/train.jsonl", labelled(*numbered(30))).parent
    assert failing(folder).endswith("have none in split 'test'")


def test_the_reviews_of_the_package_are_the_corpus_with_labels() -> None:
    train, test = load_labelled("imdb")
    corpus = read_corpus("imdb")
    assert test.corpus.sha256 == corpus["test"].sha256
    assert train.corpus.sha256 == corpus["train"].sha256
    assert set(train.labels) == set(test.labels) == {"0", "1"}
    # Mixed, and the labels went with their texts: there are words that tell.
    assert 80 < sum(label == "1" for label in test.labels[:200]) < 120
    good = [label for text, label in zip(train.texts, train.labels, strict=True) if "wonderful" in text]
    awful = [label for text, label in zip(train.texts, train.labels, strict=True) if "awful" in text]
    assert good.count("1") > 0.75 * len(good)
    assert awful.count("0") > 0.75 * len(awful)


def test_a_data_sets_rows_without_labels_are_no_part_of_it(hub: Any) -> None:
    both = {"text": [f"text {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}
    test = {"text": ["a", "b"], "label": [0, 1]}
    hub({"train": both, "test": test, "unsupervised": {"text": ["c"], "label": [-1]}})
    train, found = load_labelled("stanfordnlp/imdb")
    assert found.texts == ("a", "b")
    assert set(train.labels) == {0, 1}
    hub({"train": both, "test": {"text": ["a", "b"], "label": [0, None]}})
    assert failing("some/set").startswith("CorpusError: 'some/set' test row 1: field 'label' is None, NoneType")
    # The news articles' columns have names of their own.
    hub({"test": {"article": ["a"], "highlights": ["h"], "id": ["1"]}})
    news = load_summaries("cnn_dailymail/3.0.0")
    assert (news.documents, news.summaries) == (("a",), ("h",))


@pytest.mark.parametrize("load", [load_labelled, load_summaries])
def test_the_hub_unreachable_is_one_clear_line(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # whatever this machine holds
    with pytest.raises(OfflineError) as raised:
        load("stanfordnlp/imdb")
    assert str(raised.value) == ("the Hub cannot be reached and data set 'stanfordnlp/imdb' is not in the local cache")


def test_the_papers_of_the_package_have_summaries_that_people_wrote() -> None:
    found = load_summaries("aclsum")
    spec = importlib.util.find_spec("aclsum")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "dataset" / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert found.documents == tuple(" ".join(row["sentences"]["abstract"]) for row in rows)
    first = rows[0]["summary"]
    assert found.summaries[0] == f"{first['challenge']} {first['approach']} {first['outcome']}"
    others = {split: load_summaries("aclsum", split) for split in ("train", "validation")}
    assert not set(found.documents) & {text for each in others.values() for text in each.documents}


def test_the_package_missing_or_changed_is_said(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    changed = write("aclsum/dataset/test.jsonl", lines({"sentences": {"text": []}, "summary": {}}))
    write("aclsum/__init__.py", "")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(changed.parents[2])
        patched.delitem(sys.modules, "aclsum", raising=False)
        assert failing("aclsum", load_summaries).endswith("has another format than expected: KeyError('abstract')")
    monkeypatch.setitem(sys.modules, "aclsum", None)
    with pytest.raises(MissingExtraError, match=r"'aclsum' is not installed: pip install 'layerfold\[rouge\]'"):
        load_summaries("aclsum")


def test_summaries_from_files_are_split_paired_and_read_once(write: Write) -> None:
    rows = [{"document": f"document {i % 25}", "summary": f"summary {i}"} for i in range(50)]
    path = write("rows.jsonl", lines(*rows))
    found = load_summaries(str(path))
    assert found.documents == load_corpus(f"{path}:document").documents
    assert found.summaries == tuple(f"summary {document.split()[1]}" for document in found.documents)  # the first
    assert found.corpus.documents == found.documents
    named = write("named.csv", table(("body", "short"), *((row["document"], row["summary"]) for row in rows)))
    assert load_summaries(f"{named}:body,short").sha256 == found.sha256
    swapped = Summarized("", "", found.summaries, found.documents)
    assert swapped.sha256 != found.sha256


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", "b"), (" \n", "b")], "line 2: field 'document' is empty"),
        ([("a", " ")], "line 1: field 'summary' is empty"),
        ([("a", 3)], "line 1: field 'summary' is int, not text"),
        ([("a", None)], "line 1 has no field 'summary'; accepted: document"),
        ([(None, "b")], "line 1 has no field 'document'"),
        ([], "have none in split 'test'"),
    ],
    ids=str,
)
def test_a_document_or_summary_that_is_not_there_is_named(rows: list[Any], said: str, write: Write) -> None:
    pairs = [dict(zip(("document", "summary"), row, strict=True)) for row in rows]
    present = [{name: value for name, value in pair.items() if value is not None} for pair in pairs]
    assert said in failing(write("data/test.jsonl", lines(*present)).parent, load_summaries)
