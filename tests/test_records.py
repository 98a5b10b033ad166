from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from layerfold.environment import environment
from layerfold.errors import InputError, OutputError
from layerfold.files import hash_json, replacing, write_text
from layerfold.records import RESULTS_FILE, Record, RecordStore, Results, read_results, write_results
from layerfold.study.study import _MARKER


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {"key": "a" * 64, "label": "merged", "evaluator": "size", "protocol": "size-1"}
    values |= {"score": {"value": 1.5}, "subject": {}, "notes": {}, "environment": {}, "seconds": 0.5}
    return Record(**values | changes)


def test_a_stored_record_comes_back_under_the_label_it_has_now_and_no_other_does(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    store.put(record())
    assert store.get("size", "a" * 64, "merged") == record()
    assert store.get("size", "a" * 64, "renamed") == record(label="renamed")
    assert store.get("perplexity", "a" * 64, "merged") is None
    # Files are named by the key's beginning: two that share it are still told apart.
    assert store.get("size", "a" * 24 + "b" * 40, "merged") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": "KEY"}', '{"key": "KEY", "colour": 1}', "\x00"])
def test_a_damaged_record_counts_as_missing(content: str, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.put(record())
    (path,) = tmp_path.iterdir()
    path.write_text(content.replace("KEY", "a" * 64))
    assert store.get("size", "a" * 64, "merged") is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of wh")
        raise KeyboardInterrupt
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write '.*file/record'") as raised:
        write_text(tmp_path / "file" / "record", "text")
    assert "\n" not in str(raised.value)
    with pytest.raises(OutputError, match=r"cannot write '.*file/results.json'"):
        write_results(results(), tmp_path / "file")


def test_the_hash_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1}) != hash_json({"a": 1, "b": [2, 1]})


def test_results_give_scores_in_the_recipes_order() -> None:
    records = {("base", "size"): record(label="base"), ("merged", "size"): record(notes={"pairs": []})}
    results = Results("pocket", {"seed": 0}, ("base", "merged", "unmeasured"), ("perplexity", "size"), records)
    assert results.score("merged", "size") == {"value": 1.5}
    assert results.score("merged", "perplexity") is None
    document = results.to_json()
    assert [variant["label"] for variant in document["variants"]] == ["base", "merged", "unmeasured"]
    assert [list(variant["scores"]) for variant in document["variants"]] == [["size"], ["size"], []]
    assert document["variants"][1]["notes"] == {"pairs": []}


def test_the_environment_names_what_a_figure_depends_on() -> None:
    found = environment()
    assert {"python", "torch", "transformers", "tokenizers"} <= found["versions"].keys()
    assert found["threads"] >= 1
    assert found["processor"]


def results() -> Results:
    """Results of all that JSON has no plain form for, with a label that has a record for one evaluator only."""
    score = {"value": math.nan, "low": -math.inf, "high": math.inf, "third": 1 / 3, "whole": 3, "float": 3.0}
    records = {
        ("base", "size"): record(label="base", score=score, notes={"pairs": [], "2": None, "10": True}),
        ("\ud800 <b>", "rouge"): record(label="\ud800 <b>", evaluator="rouge", score={"value": 5e-324}),
    }
    return Results("pocket", {"seed": 0, "budget": None}, ("base", "\ud800 <b>"), ("size", "rouge"), records)


def test_results_come_back_exactly_and_tuples_as_lists(tmp_path: Path) -> None:
    write_results(results(), tmp_path)
    read = read_results(tmp_path)
    assert repr(read) == repr(results())  # nan is not equal to itself, and 3 is equal to 3.0
    assert read.score("\ud800 <b>", "size") is None
    write_results(read, tmp_path / "again")
    assert (tmp_path / "again" / RESULTS_FILE).read_bytes() == (tmp_path / RESULTS_FILE).read_bytes()
    nothing = Results("pocket", {}, ("base",), (), {})
    write_results(nothing, tmp_path)
    assert read_results(tmp_path) == nothing
    write_results(Results("pocket", {"sizes": (2, 4), "by": {2: "two", 10: "ten"}}, ("base",), (), {}), tmp_path)
    assert read_results(tmp_path).recipe == {"sizes": [2, 4], "by": {"2": "two", "10": "ten"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("\x00", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is not what"),
        ("null", "is not what"),
        ('{"base": "pocket", "variants": []}', "is not what"),
        ('{"format": "layerfold results 1"}', "is damaged"),
        ('{"format": "layerfold results 2"}', "is not what"),
    ],
)
def test_damaged_and_foreign_results_are_one_line(content: str | bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as raised:
        read_results(tmp_path)
    assert str(tmp_path / RESULTS_FILE) in str(raised.value)
    assert "run `layerfold study`" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_results_that_somebody_changed_are_not_read(tmp_path: Path) -> None:
    write_results(results(), tmp_path)
    path = tmp_path / RESULTS_FILE
    text = path.read_text(encoding="utf-8")
    reordered = json.dumps(json.loads(text), sort_keys=True)
    path.write_text(reordered, encoding="utf-8")
    assert repr(read_results(tmp_path).labels) == repr(results().labels)  # another order of keys changes nothing
    for before, after in (("0.3333333333333333", "0.3333333333333334"), ("5e-324", "NaN"), ('"rouge"', '"rogue"')):
        assert before in text
        path.write_text(text.replace(before, after), encoding="utf-8")
        with pytest.raises(InputError, match="is damaged"):
            read_results(tmp_path)


def test_a_folder_without_results_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder at '.*run'; accepted: the folder of a run"):
        read_results(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"no folder at '.*file'"):
        read_results(tmp_path / "file")
    with pytest.raises(InputError, match="is no run of `layerfold study`"):
        read_results(tmp_path)
    (tmp_path / _MARKER).write_text("{}")
    with pytest.raises(InputError, match=r"unfinished or of an older version: run `layerfold study` with --output-dir"):
        read_results(tmp_path)
    (tmp_path / RESULTS_FILE).mkdir()
    with pytest.raises(InputError, match=r"cannot read '.*results.json': Is a directory"):
        read_results(tmp_path)
