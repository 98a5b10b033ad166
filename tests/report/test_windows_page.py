"""The page of a search for a window to share."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from pages import HOSTILE, Page

from layerfold.errors import OutputError
from layerfold.report import write_windows_html
from layerfold.report.window_columns import best_windows_table, windows_table


def page_of(found, tmp_path):
    write_windows_html(found, tmp_path / "search.html")
    return (tmp_path / "search.html").read_text(encoding="utf-8")


def lead_of(text):
    return re.search(r'<p class="lead">(.*?)</p>', text)[1].replace("&#39;", "'")


def cards_of(text):
    return dict(re.findall(r"<h3>(.*?)</h3>(.*?)</article>", text, re.DOTALL))


def test_both_tables_have_every_row_the_best_first(make_windows, tmp_path):
    found = make_windows()
    text = page_of(found, tmp_path)
    rows = Page(text).rows
    for table in (best_windows_table(found), windows_table(found, 500)):
        for label, cells in table.rows:
            assert [[label], *([text for text in (cell.value, cell.interval) if text] for cell in cells)] in rows
    assert text.index('id="best-about"') < text.index("<summary>Candidates") < text.index("<svg")
    assert "The best window of each size, chosen on the selection text." in text
    assert "What sharing costs" in text
    assert text.count("<svg") == 2
    assert "Pareto" not in text
    assert "removing" not in text


def test_many_candidates_are_cut_to_a_page(make_windows, tmp_path):
    found = make_windows({(start, size): 90.0 + start for size in range(2, 49) for start in range(49 - size)})
    text = page_of(replace(found, eliminated=12), tmp_path)
    assert len(text) < 1_500_000
    assert "628 more candidates in the CSV file." in text
    assert "12 more candidates given up in the race, before all of the text was read." in text


def test_sizes_are_compared_only_where_there_are_several(make_windows, tmp_path):
    assert page_of(make_windows({(0, 2): 90.0, (1, 2): 91.0}), tmp_path).count("<svg") == 1


def test_summary(make_windows, tmp_path):
    assert lead_of(page_of(make_windows(), tmp_path)) == (
        "5 windows of pocket's blocks measured: with one FFN base for blocks 1–2, perplexity on the test text is 1.02 "
        "times the base's, at 3.8% fewer parameters; with one FFN base for blocks 1–3, perplexity on the test text is "
        "1.12 times the base's, at 7.6% fewer parameters."
    )
    one = make_windows({(0, 2): 868.0}, tests={})
    larger = replace(one, best={2: replace(one.best[2], parameters=2 * 6960768)})
    assert lead_of(page_of(larger, tmp_path)) == (
        "1 window of pocket's blocks measured: with one FFN base for blocks 0–1, perplexity on the selection text is "
        "10.0 times the base's, at 100.0% more parameters."
    )
    assert lead_of(page_of(make_windows({}), tmp_path)) == "0 windows of pocket's blocks measured."


def test_texts_sharing_settings_and_work_are_listed(make_windows, tmp_path):
    cards = cards_of(page_of(make_windows(), tmp_path))
    assert list(cards) == ["Selection text", "Test text", "Sharing", "Settings", "Work"]
    assert "the base and the best window of each size are measured on it" in cards["Test text"]
    assert "rank 8, base fitted, init data-svd, ranks uniform, align none, anchor first." in cards["Sharing"]
    assert "65,536" in cards["Selection text"]
    assert "1,280" in cards["Work"]


def test_figures_that_are_not_finite(make_windows, tmp_path):
    found = make_windows({(0, 2): math.nan, (1, 2): math.inf, (0, 3): math.nan})
    assert "Not drawn, being out of the scale&#39;s range: 0:2, 1:2, 0:3." in page_of(found, tmp_path)
    broken = replace(found, base=replace(found.base, perplexity=math.nan))
    assert "Nothing to draw" in page_of(broken, tmp_path)


def test_all_text_is_escaped(make_windows, tmp_path):
    hostile = {HOSTILE: HOSTILE, "share": {HOSTILE: HOSTILE}}
    names = ("settings", "text", "test_text", "work", "environment")
    found = make_windows(model=f"{HOSTILE}\x1b\ud800</title></style>{{{{ 7 * 7 }}}}", **dict.fromkeys(names, hostile))
    text = page_of(found, tmp_path)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if {"style", "src", "onerror"} & set(attributes)]
    # The title, the heading, the summary, the model among the settings; five listings of four; the sharing, of two.
    assert "".join(page.text).count(HOSTILE) == 4 + 20 + 2
    assert "{{ 7 * 7 }}" in text


def test_page_loads_nothing_and_its_ids_are_its_own(make_windows, tmp_path):
    text = page_of(make_windows({(s, k): 90.0 + s for k in range(2, 10) for s in range(10 - k)}), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import", text)
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_findings_give_the_same_bytes(make_windows, tmp_path):
    assert page_of(make_windows(), tmp_path) == page_of(make_windows(), tmp_path)


def test_a_folder_that_cannot_be_written(make_windows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_windows_html(make_windows(), tmp_path / "file" / "search.html")
