from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerfold.errors import OutputError
from layerfold.records import Record, RecordStore, Results, environment, hash_json, replacing, write_text


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {"key": "a" * 64, "label": "merged", "evaluator": "size", "protocol": "size-1"}
    values |= {"score": {"value": 1.5}, "subject": {}, "notes": {}, "environment": {}, "seconds": 0.5}
    return Record(**values | changes)


def test_a_stored_record_comes_back_under_the_label_it_has_now(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    store.put(record())
    assert store.get("size", "a" * 64, "merged") == record()
    assert store.get("size", "a" * 64, "renamed") == record(label="renamed")


def test_another_key_or_evaluator_is_missing(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.put(record())
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


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write '.*file/record'") as raised:
        write_text(tmp_path / "file" / "record", "text")
    assert "\n" not in str(raised.value)


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
