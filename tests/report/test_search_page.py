"""The page of a search."""

from __future__ import annotations

import hashlib
import math
import re
from base64 import b64encode
from dataclasses import replace

import pytest
from pages import HOSTILE, Page

from layerfold.errors import OutputError
from layerfold.report import write_search_html
from layerfold.report.search import best_table, candidate_table


def page_of(found, tmp_path):
    write_search_html(found, tmp_path / "search.html")
    return (tmp_path / "search.html").read_text(encoding="utf-8")


def lead_of(text):
    return re.search(r'<p class="lead">(.*?)</p>', text)[1].replace("&#39;", "'")


def section(text, name):
    return re.search(rf'<section aria-labelledby="{name}">.*?</section>', text, re.DOTALL)[0]


def listed(text):
    return dict(re.findall(r"<dt>(.*?)</dt><dd dir=\"auto\">(.*?)</dd>", text))


def test_both_tables_have_every_row_the_best_first(make_found, make_sets, tmp_path):
    found = make_found(make_sets(2))
    text = page_of(found, tmp_path)
    rows = Page(text).rows
    for table in (best_table(found), candidate_table(found, 500)):
        for label, cells in table.rows:
            assert [[label], *([text for text in (cell.value, cell.interval) if text] for cell in cells)] in rows
    assert text.index('id="best-about"') < text.index("<summary>Candidates") < text.index('id="candidates-about"')
    assert text.index('id="candidates-about"') < text.index("<svg")
    assert text.count("<svg") == 2
    assert text.count('<tr class="base">') == 2
    assert "in the CSV file" not in text


def test_4096_candidates_are_cut_to_a_page(make_found, make_sets, tmp_path):
    text = page_of(make_found(make_sets(12), eliminated=77), tmp_path)
    assert len(text) < 1_000_000
    assert "3,583 more candidates in the CSV file." in text
    assert len(Page(text).rows) == 2 + 13 + 513
    assert "77 more candidates given up in the race, before all of the text was read." in text


def test_summary(make_found, make_sets, tmp_path):
    assert lead_of(page_of(make_found(make_sets(3)), tmp_path)) == (
        "298 sets of pocket's 12 blocks measured: without block 5, perplexity on the test text is 1.05 times the "
        "base's, at 1.08 times its speed; without blocks 4 6 9, perplexity on the test text is 1.21 times the base's, "
        "at 1.27 times its speed."
    )
    bare = make_found({(0,): 868.0}, blocks=1, tests={}, timings={}, settings={"part": "ffn"})
    assert lead_of(page_of(bare, tmp_path)) == (
        "1 set of pocket's 1 FFN measured: without FFN 0, perplexity on the selection text is 10.0 times the base's."
    )
    assert lead_of(page_of(make_found({}), tmp_path)) == "0 sets of pocket's 12 blocks measured."


def test_texts_settings_work_and_environment_are_listed(make_found, tmp_path):
    text = page_of(make_found(), tmp_path)
    cards = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</article>", section(text, "protocols"), re.DOTALL))
    assert list(cards) == ["Selection text", "Test text", "Latency", "Settings", "Work"]
    assert listed(cards["Selection text"]) == {
        "corpus": "movie-reviews",
        "split": "validation",
        "tokens": "65,536",
        "tokens sha256": "0f" * 32,
    }
    assert listed(cards["Test text"])["tokens"] == "131,072"
    assert "took no part in choosing" in cards["Test text"]
    assert "measured once for each number" in cards["Latency"]
    assert listed(cards["Settings"]) == {
        "part": "block",
        "remove": "1",
        "objective": "perplexity",
        "seed": "\N{EN DASH}",
        "model": "pocket",
        "model sha256": "5e" * 32,
    }
    assert listed(cards["Work"]) == {
        "scored windows": "786,432",
        "windows of all candidates": "9,437,184",
    }
    assert listed(section(text, "environment")) == {"versions": "torch 2.13.0", "threads": "2"}


def test_what_was_not_measured_is_not_spoken_of(make_found, tmp_path):
    text = page_of(make_found({(0, 1): 99.0}, timings={}, tests={}, work={}), tmp_path)
    assert "<h3>Latency" not in text
    assert "<h3>Work" not in text
    assert "given up" not in text
    assert '<abbr title="not measured">\N{EN DASH}</abbr>' in text
    assert "No candidate removes one block alone." in text
    assert text.count("<svg") == 1


def test_the_page_of_repaired_candidates_says_what_is_repaired_how_far(make_found, tmp_path):
    said = "candidates are listed with each block repaired by itself, the best of each number with a whole repair."
    found = make_found()
    assert said not in page_of(found, tmp_path)
    best = {number: replace(each, perplexity=0.9 * each.perplexity, kl=math.nan) for number, each in found.best.items()}
    text = page_of(replace(found, best=best, settings=found.settings | {"objective": "repaired"}), tmp_path)
    assert text.count(said) == 1
    assert "nan" not in re.sub(r"<svg.*?</svg>|<style.*?</style>|<script.*?</script>", "", text, flags=re.DOTALL)


def test_figures_that_are_not_finite(make_found, tmp_path):
    found = make_found({(0,): math.nan, (1,): math.inf, (2,): 1e5})
    text = page_of(found, tmp_path)
    assert "Not drawn, being out of the scale&#39;s range: 0, 1." in text
    nothing = replace(found, base=replace(found.base, perplexity=math.nan), candidates=found.candidates[:2], best={})
    assert page_of(nothing, tmp_path).count("Nothing to draw") == 2


def test_all_text_is_escaped(make_found, tmp_path):
    hostile = {HOSTILE: HOSTILE, "list": [HOSTILE, {HOSTILE: HOSTILE}]}
    names = ("settings", "text", "test_text", "work", "environment")
    found = make_found(model=f"{HOSTILE}\x1b\x00\ud800</title></style>{{{{ 7 * 7 }}}}", **dict.fromkeys(names, hostile))
    text = page_of(replace(found, settings=hostile | {"part": HOSTILE}), tmp_path)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if {"style", "src", "onerror"} & set(attributes)]
    # The title, the heading, the summary, the model among the settings; five listings of five; the part.
    assert "".join(page.text).count(HOSTILE) == 4 + 25 + 1
    assert "{{ 7 * 7 }}" in text


def test_page_loads_nothing_and_runs_nothing(make_found, make_sets, tmp_path):
    text = page_of(make_found(make_sets(2)), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import", text)
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if {"style", "src"} & set(attributes)]
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    allowed = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{allowed}';")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labels <= set(ids)


def test_the_same_findings_give_the_same_bytes(make_found, make_sets, tmp_path):
    assert page_of(make_found(make_sets(2)), tmp_path) == page_of(make_found(make_sets(2)), tmp_path)


def test_a_folder_that_cannot_be_written(make_found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_search_html(make_found(), tmp_path / "file" / "search.html")
