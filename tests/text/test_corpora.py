"""Text from files: which documents there are, in which split, and what is said of files that cannot be read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import sys
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny import Write

from layerfold.errors import CorpusError, LayerfoldError, MissingExtraError
from layerfold.text.corpora import SPLITS, Corpus, check_disjoint, load_corpus
from layerfold.text.sources import disjoint


def jsonl(*documents: str, field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: document}) + "\n" for i, document in enumerate(documents))


def numbered(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


def by_split(path: Path | str) -> dict[str, list[str]]:
    return {split: list(load_corpus(str(path), split).documents) for split in SPLITS}


def failing(name: Path | str, split: str = "test") -> str:
    """The one line that a corpus which cannot be read is refused with."""
    with pytest.raises(LayerfoldError) as raised:
        load_corpus(str(name), split)
    assert "\n" not in str(raised.value)
    return f"{type(raised.value).__name__}: {raised.value}"


def place(text: str) -> float:
    """Where a text's hash lies between 0 and 1."""
    return int(hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12], 16) / 16**12


def test_texts_are_split_by_their_hashes_and_moved_neither_by_order_nor_by_other_rows(write: Write) -> None:
    rows = numbered(400)
    before = by_split(write("rows.jsonl", jsonl(*rows)))
    assert before["test"] == [row for row in rows if place(row) < 0.1]
    assert before["validation"] == [row for row in rows if 0.1 <= place(row) < 0.2]
    assert before["calibration"] == [row for row in rows if 0.2 <= place(row) < 0.24]
    assert before["train"] == [row for row in rows if place(row) >= 0.24]
    after = by_split(write("more.jsonl", jsonl(*random.Random(0).sample([*rows, *map(str, range(50))], 450))))
    for split in SPLITS:
        assert set(before[split]) < set(after[split])


@pytest.mark.parametrize("period", [2, 20, 200])
def test_kinds_of_rows_in_turn_stand_in_all_splits_alike(period: int, write: Write) -> None:
    rows = [f"{i % period} is the kind of row {i}" for i in range(20 * period if period > 20 else 2000)]
    found = by_split(write("rows.jsonl", jsonl(*rows)))
    for split, documents in found.items():
        kinds = [int(document.split()[0]) % 2 for document in documents]
        assert 0.4 < sum(kinds) / len(kinds) < 0.6, split


@pytest.mark.parametrize("count", [4, 5, 7, 12, 25, 39])
def test_a_small_file_has_something_in_every_split(count: int, write: Write) -> None:
    for start in range(0, 300, 37):
        rows = [f"document {i}" for i in range(start, start + count)]
        found = by_split(write("rows.jsonl", jsonl(*rows)))
        assert all(found.values())
        assert sorted(row for split in found.values() for row in split) == sorted(rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), max_size=12))
def test_whatever_the_texts_are_splits_are_disjoint_and_lose_none(texts: list[str]) -> None:
    kept, dropped = disjoint({"all": texts}, str)
    distinct = {" ".join(text.split()) for text in texts} - {""}
    assert len(kept["all"]) == len(distinct) == len(texts) - dropped["all"]
    assert sum(dropped[split] for split in SPLITS) == dropped["all"]
    if len(distinct) < 4:
        assert kept["train"] == kept["calibration"] == kept["all"]
        assert kept["test"] == kept["validation"] == []
        return
    assert all(kept[split] for split in SPLITS)
    assert sorted(text for split in SPLITS for text in kept[split]) == sorted(kept["all"])
    other, _ = disjoint({"all": texts[::-1]}, str)
    for split in SPLITS:
        assert {" ".join(text.split()) for text in kept[split]} == {" ".join(text.split()) for text in other[split]}


def test_a_file_too_small_to_split_serves_whole_where_nothing_is_measured_on_it(write: Write) -> None:
    path = write("rows.jsonl", jsonl(*numbered(3)))
    for split in ("train", "calibration", "all"):
        assert load_corpus(str(path), split).documents == tuple(numbered(3))
    for split in ("test", "validation"):
        message = failing(path, split)
        assert f"has 3 documents, too few to hold out any for split {split!r}; accepted: 4 or more" in message
        assert "separated by blank lines, or one a line" in message


def test_all_of_a_corpus_is_each_document_once_and_how_much_a_split_is_of_it_can_be_said(write: Write) -> None:
    found = load_corpus(str(write("rows.jsonl", jsonl(*numbered(30), *numbered(5)))), "all")
    assert found.documents == tuple(numbered(30))
    share = "30 documents, 5 repeated or empty ones left out"
    assert (found.dropped, found.total, found.share) == (5, 30, share)
    path = str(write("rows.jsonl", jsonl(*numbered(60))))
    test = load_corpus(path, "test")
    assert test.share == f"{len(test.documents)} of 60 documents"
    assert test.read(100, 100) == f"{path!r}, split test, {test.share}: 100 tokens"
    assert test.read(7, 100).endswith(": 7 of the 100 tokens asked for; a longer text gives more (--corpus)")
    lines = load_corpus(str(write("lines.txt", "\n".join(numbered(60)))), "test")
    assert lines.share == f"{len(lines.documents)} of 60 documents, one a line"


def test_duplicates_differ_by_more_than_white_space(write: Write) -> None:
    rows = numbered(40)
    rows += [" document\t0\n", "document 1", "Document 0"]
    path = write("rows.jsonl", jsonl(*rows))
    documents = [document for split in by_split(path).values() for document in split]
    assert sorted(documents) == sorted([*numbered(40), "Document 0"])
    assert sum(load_corpus(str(path), split).dropped for split in SPLITS) == 2


def test_duplicates_are_kept_where_they_are_held_out(write: Write) -> None:
    write("data/test.jsonl", jsonl("one", "two", "one"))
    write("data/validation.jsonl", jsonl("two ", "three"))
    folder = write("data/train.jsonl", jsonl("three", " one", *numbered(30))).parent
    found = by_split(folder)
    assert (found["test"], found["validation"]) == (["one", "two"], ["three"])
    assert sorted(found["train"] + found["calibration"]) == sorted(numbered(30))
    dropped = {split: load_corpus(str(folder), split).dropped for split in ("train", "validation", "test")}
    assert dropped == {"train": 2, "validation": 1, "test": 1}


def test_a_text_file_holds_documents_between_blank_lines_and_without_them_one_a_line(write: Write) -> None:
    text = "\n\none, a\none, b\n\n \n\ntwo\n\nthree é\n\nfour"
    found = load_corpus(str(write("prose.txt", text)), "all")
    assert found.documents == ("one, a\none, b\n", "two\n", "three é\n", "four")
    assert not found.lines
    for before, after in (("", ""), ("\n \n", "\n\n")):
        found = load_corpus(str(write("lines.txt", f"{before}one\ntwo\nthree{after}")), "all")
        assert [document.strip() for document in found.documents] == ["one", "two", "three"]
        assert found.share == "3 documents, one a line"
    for number in range(5):  # of a folder, a file without a blank line is one document
        write(f"data/{number}.txt", f"first line of {number}\nsecond line\n")
    folder = write("data/5.txt", "first line of 5\n\nsecond document").parent
    assert len(load_corpus(str(folder), "all").documents) == 7


def test_every_kind_of_file_gives_the_same_documents(write: Write, tmp_path: Path) -> None:
    rows = [f'document {i}, é 映画 "quoted"\nand a line' for i in range(30)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet")
    written = io.StringIO(newline="")
    csv.writer(written).writerows([["text"], *([row] for row in rows)])
    write("rows.csv", written.getvalue())
    path = write("rows.jsonl", jsonl(*rows))
    for split in SPLITS:
        found = [load_corpus(str(path.with_suffix(suffix)), split) for suffix in (".jsonl", ".csv", ".parquet")]
        assert found[0].documents
        assert len({each.sha256 for each in found}) == 1


def test_a_folder_with_files_named_by_split(write: Write) -> None:
    for split, count in (("train", 30), ("validation", 3), ("test", 2)):
        write(f"data/{split}-00000-of-00001.jsonl", jsonl(*[f"{split} {i}" for i in range(count)]))
    folder = write("data/readme.md", "not text of the corpus").parent
    found = by_split(folder)
    assert found["test"] == ["test 0", "test 1"]
    assert found["validation"] == [f"validation {i}" for i in range(3)]
    assert found["calibration"] == [f"train {i}" for i in range(30) if place(f"train {i}") < 0.05]
    assert len(found["train"]) == 30 - len(found["calibration"]) == 28


def test_a_folder_of_other_names_is_split_by_hash_over_all_its_files(write: Write) -> None:
    write("data/b/second.txt", "\n\n".join(f"b{i}" for i in range(12)))
    folder = write("data/a.jsonl", jsonl(*[f"a{i}" for i in range(12)])).parent
    names = [f"{file}{i}" for file in "ab" for i in range(12)]
    assert [text.strip() for text in load_corpus(str(folder), "all").documents] == names
    assert [text.strip() for text in by_split(folder)["test"]] == [name for name in names if place(name) < 0.1]


def test_what_is_missing_unknown_or_stray_is_named(write: Write) -> None:
    for name in ("missing.txt", "./missing", "/no/such/folder", "a/b/missing.jsonl"):
        assert failing(name) == f"CorpusError: no file or folder at {name!r}"
    assert failing("imbd").startswith("InputError: unknown corpus 'imbd'; did you mean 'imdb'?")
    assert failing("imdb", "validate").startswith("InputError: unknown split 'validate'; did you mean 'validation'?")
    write("data/train.jsonl", jsonl("a"))
    folder = write("data/dev.jsonl", jsonl("b")).parent
    assert failing(folder).endswith("lies beside files of named splits; accepted: train*, validation*, test*")


def test_a_split_without_documents_names_those_with_some(write: Write, tmp_path: Path) -> None:
    path = write("data/test.txt", "one\n\ntwo")
    assert failing(path.parent, "train").endswith("in split 'train'; splits with documents: test")
    for suffix, empty in (("txt", "\n\n \n"), ("jsonl", "\n\n \n"), ("csv", "text\n")):
        for content in ("", empty):
            said = failing(write(f"a.{suffix}", content))
            assert "has no documents in split 'test'; splits with documents: none" in said
    (tmp_path / "nothing").mkdir()
    assert failing(tmp_path / "nothing").endswith("holds no .txt, .csv, .jsonl, .parquet file")


def test_a_field_of_another_name_follows_a_colon_and_a_path_may_hold_one(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", jsonl(*numbered(30), field="review"))
    write("rows.csv", "text,review\n" + "".join(f"wrong,{row}\n" for row in numbered(30)))
    parquet.write_table(pyarrow.table({"review": numbered(30), "text": ["wrong"] * 30}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        assert load_corpus(f"{tmp_path / name}:review", "all").documents == tuple(numbered(30))
    path = write("a:b.jsonl", jsonl(*numbered(30), field="body"))
    assert load_corpus(f"{path}:body", "all").documents == tuple(numbered(30))
    assert "has no field 'text'; accepted: body, id" in failing(path)
    missing = path.with_name("a:c.jsonl")
    assert failing(missing) == f"CorpusError: no file or folder at {str(missing)!r}"
    assert failing(f"{missing}:body") == f"CorpusError: no file or folder at {str(missing)!r}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *(
            ("rows.jsonl", jsonl("good") + "\n" + line + "\n", said)
            for line, said in (
                ("{'text': 1}", "line 3 is not JSON: Expecting property name"),
                ('{"text": 1}', "line 3: field 'text' is int, not text"),
                ('{"text": null}', "line 3: field 'text' is NoneType, not text"),
                ('{"texts": "a"}', "line 3 has no field 'text'; did you mean 'texts'? accepted: texts"),
                ('["text"]', "line 3 has no field 'text'"),
                (r'{"text": "half a pair: \ud83c"}', "line 3"),
            )
        ),
        *(
            ("array.jsonl", content, "array.jsonl' is a JSON array; accepted: one JSON object a line")
            for content in ('[{"text": "a"}, {"text": "b"}]', '\n [\n{"text": "a"}\n]')
        ),
        *(
            (f"latin.{suffix}", '{"text": "café"}'.encode("latin-1"), f"latin.{suffix}': 'utf-8' codec")
            for suffix in ("txt", "jsonl", "csv")
        ),
    ],
)
def test_a_bad_line_or_file_is_named(name: str, content: str | bytes, said: str, write: Write) -> None:
    message = failing(write(name, content))
    assert message.startswith("CorpusError: ")
    assert said in message


def test_the_hash_is_of_the_documents_and_their_boundaries(write: Write) -> None:
    path = write("rows.jsonl", jsonl(*numbered(30)))
    assert load_corpus(str(path)).sha256 == load_corpus(str(path)).sha256
    assert load_corpus(str(path)).sha256 != load_corpus(str(path), "validation").sha256
    joined, apart = Corpus("", "", ("ab", "c")), Corpus("", "", ("a", "bc"))
    assert len({joined.sha256, apart.sha256, Corpus("", "", ("abc",)).sha256, Corpus("", "", ("c", "ab")).sha256}) == 4
    assert joined.sha256 == Corpus("another name", "test", ("ab", "c")).sha256


def test_a_parquet_file_that_is_damaged_or_lacks_something_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in (b"", b"not parquet at all", b"PAR1 damaged in between PAR1"):
        assert failing(write("rows.parquet", content)).startswith("CorpusError: ")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"texts": ["a"]}), path)
    assert "has no field 'text'; did you mean 'texts'? accepted: texts" in failing(path)
    # Rows are read 65,536 at a time; the number is the file's, not the batch's.
    parquet.write_table(pyarrow.table({"text": ["a"] * 70_000 + [None]}), path)
    assert failing(path).endswith("row 70000: field 'text' is NoneType, not text")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed: pip install 'layerfold\[datasets\]'"):
        load_corpus(str(path))


def test_corpora_that_share_documents_are_refused_and_the_first_three_named() -> None:
    check_disjoint(Corpus("one", "calibration", ("alpha  beta", "gamma")), Corpus("two", "test", ("delta", "alpha")))
    one = Corpus("one", "train", tuple(f"text {i}" for i in range(9)))
    two = Corpus("two", "test", ("text 8", *(f" text  {i}\n" for i in (1, 3, 4, 6))))
    with pytest.raises(CorpusError) as caught:
        check_disjoint(one, two)
    assert str(caught.value) == (
        "5 documents stand in both 'one' train and 'two' test; the texts must be disjoint; "
        "of 'one' train: 1 ('text 1'), 3 ('text 3'), 4 ('text 4'), ..."
    )
    with pytest.raises(CorpusError) as caught:
        check_disjoint(Corpus("one", "train", ("a", "b\n" * 99)), Corpus("two", "test", ("b " * 99,)))
    assert str(caught.value).endswith(f"of 'one' train: 1 ('{'b ' * 20}')")
    assert "\n" not in str(caught.value)


def test_a_corpus_is_disjoint_from_its_other_splits_and_not_from_itself(write: Write) -> None:
    path = str(write("rows.jsonl", jsonl(*numbered(60))))
    check_disjoint(load_corpus(path, "train"), load_corpus(path, "test"))
    for split in ("train", "all"):
        with pytest.raises(CorpusError, match="documents stand in both"):
            check_disjoint(load_corpus(path, "train"), load_corpus(path, split))
