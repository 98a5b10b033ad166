"""Text from files: which documents there are, in which split, and what is said of files that cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tiny import Write

from layerfold.corpora import SPLITS, Corpus, check_disjoint, load_corpus
from layerfold.errors import CorpusError, InputError, LayerfoldError, MissingExtraError


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


def test_rows_are_split_by_their_number(write: Write) -> None:
    found = by_split(write("rows.jsonl", jsonl(*numbered(60))))
    assert found["test"] == [f"document {i}" for i in range(0, 60, 10)]
    assert found["validation"] == [f"document {i}" for i in range(1, 60, 10)]
    rest = [f"document {i}" for i in range(60) if i % 10 > 1]
    assert found["calibration"] == rest[::20]
    assert found["train"] == [document for i, document in enumerate(rest) if i % 20]


def test_splits_share_no_document(write: Write) -> None:
    rows = [f"document {i if i % 3 else i % 7}" for i in range(400)]
    found = by_split(write("rows.jsonl", jsonl(*rows)))
    documents = [document for split in found.values() for document in split]
    assert len(documents) == len(set(documents)) == len(set(rows))


def test_duplicates_are_kept_where_they_are_held_out_and_differ_by_more_than_white_space(write: Write) -> None:
    rows = numbered(40)
    rows[12] = " document\t0\n"  # stands in test as row 0: dropped from train
    rows[11] = "document 0"  # from validation too
    rows[15] = "document 1"  # stands in validation as row 1
    rows[20] = "document 10"  # twice in test: the first stays
    rows[26] = "Document 0"  # another text
    path = write("rows.jsonl", jsonl(*rows))
    found = by_split(path)
    assert found["test"] == ["document 0", "document 10", "document 30"]
    assert found["validation"] == ["document 1", "document 21", "document 31"]
    train = found["train"] + found["calibration"]
    assert not {" document\t0\n", "document 0", "document 1"} & set(train)
    assert "Document 0" in train
    dropped = {split: load_corpus(str(path), split).dropped for split in ("train", "validation", "test")}
    assert dropped == {"train": 2, "validation": 1, "test": 1}


def test_documents_without_text_are_dropped(write: Write) -> None:
    assert by_split(write("rows.jsonl", jsonl("", *numbered(11)[1:], "\n")))["test"] == ["document 10"]


def test_a_text_file_holds_documents_between_blank_lines(write: Write) -> None:
    text = "\n\none, a\none, b\n\n \n\ntwo\n\nthree é\n\nfour"
    found = by_split(write("prose.txt", text))
    assert (found["test"], found["validation"]) == (["one, a\none, b\n"], ["two\n"])
    assert found["calibration"] + found["train"] == ["three é\n", "four"]


def test_every_kind_of_file_gives_the_same_documents(write: Write, tmp_path: Path) -> None:
    rows = [f"document {i} é 映画" for i in range(30)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet")
    paths = [write("rows.jsonl", jsonl(*rows)), tmp_path / "rows.parquet"]
    first, second = (by_split(path) for path in paths)
    assert first == second
    assert load_corpus(str(paths[0])).sha256 == load_corpus(str(paths[1])).sha256


def test_a_folder_with_files_named_by_split(write: Write) -> None:
    for split, count in (("train", 30), ("validation", 3), ("test", 2)):
        write(f"data/{split}-00000-of-00001.jsonl", jsonl(*[f"{split} {i}" for i in range(count)]))
    folder = write("data/readme.md", "not text of the corpus").parent
    found = by_split(folder)
    assert found["test"] == ["test 0", "test 1"]
    assert found["validation"] == [f"validation {i}" for i in range(3)]
    assert found["calibration"] == ["train 0", "train 20"]
    assert len(found["train"]) == 28


def test_a_folder_of_other_names_is_split_by_row_over_all_its_files(write: Write) -> None:
    write("data/b/second.txt", "\n\n".join(f"b{i}" for i in range(12)))
    folder = write("data/a.jsonl", jsonl(*[f"a{i}" for i in range(12)])).parent
    assert [text.strip() for text in by_split(folder)["test"]] == ["a0", "a10", "b8"]


def test_a_field_of_another_name_follows_a_colon(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", jsonl(*numbered(30), field="review"))
    parquet.write_table(pyarrow.table({"review": numbered(30), "text": ["wrong"] * 30}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        corpus = load_corpus(f"{tmp_path / name}:review")
        assert corpus.documents == ("document 0", "document 10", "document 20")


def test_the_hash_is_of_the_documents_and_their_boundaries(write: Write) -> None:
    path = write("rows.jsonl", jsonl(*numbered(30)))
    assert load_corpus(str(path)).sha256 == load_corpus(str(path)).sha256
    assert load_corpus(str(path)).sha256 != load_corpus(str(path), "validation").sha256
    joined, apart = Corpus("", "", ("ab", "c")), Corpus("", "", ("a", "bc"))
    assert len({joined.sha256, apart.sha256, Corpus("", "", ("abc",)).sha256, Corpus("", "", ("c", "ab")).sha256}) == 4
    assert joined.sha256 == Corpus("another name", "test", ("ab", "c")).sha256


def test_corpora_that_share_a_document_are_refused() -> None:
    one = Corpus("one", "calibration", ("alpha  beta", "gamma"))
    check_disjoint(one, Corpus("two", "test", ("delta", "alpha")))
    with pytest.raises(CorpusError, match=r"1 documents stand in both 'one' calibration and 'two' test.*'alpha beta'"):
        check_disjoint(one, Corpus("two", "test", ("delta", "alpha beta\n")))


def test_an_unknown_split_is_refused() -> None:
    assert failing("imdb", "validate").startswith("InputError: unknown split 'validate'; did you mean 'validation'?")


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/folder", "a/b/missing.jsonl"])
def test_a_missing_file_is_named(name: str) -> None:
    assert failing(name) == f"CorpusError: no file or folder at {name!r}"


def test_an_unknown_name_is_met_with_a_suggestion() -> None:
    assert failing("imbd").startswith("InputError: unknown corpus 'imbd'; did you mean 'imdb'?")


@pytest.mark.parametrize("content", ["", "\n\n \n"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_an_empty_file_has_no_documents(content: str, suffix: str, write: Write) -> None:
    assert "has no documents in split 'test'; splits with documents: none" in failing(write(f"a.{suffix}", content))


def test_a_split_without_documents_names_those_with_some(write: Write) -> None:
    path = write("data/test.txt", "one\n\ntwo")
    assert failing(path.parent, "train").endswith("in split 'train'; splits with documents: test")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    assert failing(tmp_path).endswith("holds no .txt, .csv, .jsonl, .parquet file")


def test_another_suffix_is_refused(write: Write) -> None:
    message = failing(write("rows.json", "{}"))
    assert message.startswith("InputError: cannot read")
    assert "suffix '.json'; did you mean '.jsonl'?" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "line 3 is not JSON: Expecting property name"),
        ('{"text": 1}', "line 3: field 'text' is int, not text"),
        ('{"text": null}', "line 3: field 'text' is NoneType, not text"),
        ('{"texts": "a"}', "line 3 has no field 'text'; did you mean 'texts'? accepted: texts"),
        ('["text"]', "line 3 has no field 'text'"),
        (r'{"text": "half a pair: \ud83c"}', "line 3"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, write: Write) -> None:
    assert said in failing(write("rows.jsonl", jsonl("good") + "\n" + line + "\n"))


def test_bytes_that_are_not_utf8_are_refused(write: Write) -> None:
    for suffix in ("txt", "jsonl"):
        message = failing(write(f"latin.{suffix}", '{"text": "café"}'.encode("latin-1")))
        assert message.startswith("CorpusError: cannot read")


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1 damaged in between PAR1"])
def test_a_damaged_parquet_file_is_refused(content: bytes, write: Write) -> None:
    assert failing(write("rows.parquet", content)).startswith("CorpusError: ")


def test_a_parquet_files_missing_field_and_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"texts": ["a"]}), path)
    assert "has no field 'text'; did you mean 'texts'? accepted: texts" in failing(path)
    # Rows are read 65,536 at a time; the number is the file's, not the batch's.
    parquet.write_table(pyarrow.table({"text": ["a"] * 70_000 + [None]}), path)
    assert failing(path).endswith("row 70000: field 'text' is NoneType, not text")


def test_parquet_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed: pip install 'layerfold\[datasets\]'"):
        load_corpus(str(path))


def test_errors_are_of_the_kinds_that_callers_expect(write: Write) -> None:
    with pytest.raises(InputError):
        load_corpus("imdb", "dev")
    with pytest.raises(CorpusError):
        load_corpus("missing.txt")


def test_which_documents_are_shared_is_said_of_the_first_three() -> None:
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
    with pytest.raises(CorpusError, match="documents stand in both"):
        check_disjoint(load_corpus(path, "train"), load_corpus(path, "train"))
