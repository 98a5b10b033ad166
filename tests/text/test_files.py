"""Rows of files: what a CSV file says, byte for byte, and what is said of one that cannot be read."""

from __future__ import annotations

import csv
import io

import pytest
from tiny import Write

from layerfold.errors import CorpusError, InputError, LayerfoldError
from layerfold.text.corpora import load_corpus
from layerfold.text.files import SUFFIXES, Row, read_rows, text_of

FIELDS = ("text", "label")
BOM = "\ufeff".encode()


def rows_of(path: object, *fields: str) -> list[Row]:
    return list(read_rows(path, fields or FIELDS))  # type: ignore[arg-type]


def values(path: object, *fields: str) -> list[tuple[object, ...]]:
    return [row.values for row in rows_of(path, *fields)]


def failing(path: object, *fields: str) -> str:
    """The one line that a file which cannot be read is refused with."""
    with pytest.raises(LayerfoldError) as raised:
        rows_of(path, *fields)
    assert "\n" not in str(raised.value)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_cell_holds_commas_quotes_and_line_ends_when_quoted(write: Write) -> None:
    cells = [
        ("one, two", "a"),
        ('she said "no"', "b"),
        ("first\nsecond\r\n\nfourth", "c"),
        (" kept ", ""),
        ("é映画🎬", "d"),
    ]
    written = io.StringIO(newline="")
    csv.writer(written).writerows([FIELDS, *cells])
    assert values(write("rows.csv", written.getvalue())) == cells


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_a_byte_order_mark_and_the_line_ends_change_nothing(mark: bytes, end: str, write: Write) -> None:
    lines = ["text,label", "one,0", "", "two,1"]
    path = write("rows.csv", mark + end.join(lines).encode())
    assert values(path) == [("one", "0"), ("two", "1")]  # the blank line is no row
    for name, content in (("a.txt", "only text"), ("a.jsonl", '{"text": "only text"}')):
        assert values(write(name, mark + content.encode()), "text") == [("only text",)]


def test_a_cell_may_be_longer_than_the_csv_modules_own_limit_and_a_file_without_rows_has_none(write: Write) -> None:
    long = "word " * 30_000
    assert values(write("rows.csv", f"text\n{long}\n"), "text") == [(long,)]
    for content in ("", "\n\n", "text,label\n", "text,label"):
        assert rows_of(write("rows.csv", content)) == []


def test_fields_come_in_the_order_asked_for_and_a_row_says_where_it_stands(write: Write) -> None:
    path = write("rows.csv", "label,id,text\n1,7,one\n")
    assert values(path) == [("one", "1")]
    assert values(path, "label", "text") == [("1", "one")]
    assert values(path, "id") == [("7",)]
    path = write("rows.csv", 'text,label\none,0\n"two\nlines",1\n')
    assert [row.where for row in rows_of(path)] == [f"{str(path)!r} line 2", f"{str(path)!r} line 4"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("texts,label\na,1\n", "line 2 has no field 'text'; did you mean 'texts'? accepted: label, texts"),
        ("text;label\na;1\n", "line 2 has no field 'text'; accepted: text;label"),
        ("text,label\na,1\nb\n", "line 3 has no field 'label'; accepted: text"),
        ("text,label\na,1\nhello, world,1\n", "line 3 has more cells than the header"),
        ('text,label\n"a,1\nb,0\n', "line 3 is not CSV: unexpected end of data"),
        ('text,label\na,1\n"a" b,0\n', "line 3 is not CSV"),
    ],
)
def test_a_bad_line_of_csv_is_named(content: str, said: str, write: Write) -> None:
    path = write("rows.csv", content)
    message = failing(path)
    assert message.startswith(f"CorpusError: {str(path)!r} ")
    assert said in message


def test_a_folder_that_has_the_name_of_a_data_set_is_read_as_any_other(write: Write) -> None:
    # The data set's rows are lines, which are joined; a file's rows are documents.
    folder = write("wikitext/test.csv", "text\n" + "".join(f"document {i}\n" for i in range(3))).parent
    assert load_corpus(str(folder)).documents == ("document 0", "document 1", "document 2")


def test_another_suffix_is_refused_with_those_that_are_read(write: Write) -> None:
    with pytest.raises(InputError, match=r"suffix '.tsv'; .*accepted: .csv, .jsonl, .parquet, .txt"):
        rows_of(write("rows.tsv", "text\tlabel\n"))
    assert "suffix '.json'; did you mean '.jsonl'?" in failing(write("rows.json", "{}"))
    assert set(SUFFIXES) == {".txt", ".csv", ".jsonl", ".parquet"}


def test_text_is_text() -> None:
    row = Row("here", (3, "three", "\ud800"))
    assert text_of(row, 1) == "three"
    with pytest.raises(CorpusError, match="here: field 'review' is int, not text"):
        text_of(row, 0, "review")
    with pytest.raises(CorpusError, match="here: field 'text' is not valid Unicode"):
        text_of(row, 2)
