"""The HTML page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

from layerfold.report import write_html
from layerfold.report.columns import columns

HOSTILE = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"


class Page(HTMLParser):
    """The page's elements, and the text of its table cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.text, self.cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self.cell is not None and data.strip():
            self.cell.append(data.strip())


def page_of(results, tmp_path):
    write_html(results, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_tables_show_the_figures_of_the_columns(make_results, tmp_path):
    results = make_results()
    rows = Page(page_of(results, tmp_path)).rows
    for detail in (False, True):
        shown = [column for column in columns(results) if column.detail == detail]
        for label in results.labels:
            cells = [column.cell(results, label) for column in shown]
            assert [[label], *([text for text in (cell.value, cell.interval) if text] for cell in cells)] in rows


def test_summary_names_the_outstanding_variants(make_results, tmp_path):
    text = page_of(make_results(), tmp_path)
    assert (
        "10 compressed variants of pocket measured beside it: merged_2 comes closest in perplexity, 9.08 times" in text
    )
    assert "compressed_10 is the smallest, with 64.1% of the parameters removed" in text
    assert "compressed_10 is the fastest, 4.49 times as fast" in text
    assert "1 compressed variant of pocket" in page_of(make_results(labels=("base", "merged_2")), tmp_path)
    assert "Only the base model" in page_of(make_results(labels=("base",)), tmp_path)


def test_page_loads_nothing_and_runs_nothing(make_results, tmp_path):
    text = page_of(make_results(), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import", text)
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 2
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & set(tags)
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        href = attributes.get("href", "#")
        assert href.startswith("#") or (tag, href) == ("link", "data:,")
    policy = next(attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_ids_are_unique(make_results, tmp_path):
    ids = [attributes["id"] for _, attributes in Page(page_of(make_results(), tmp_path)).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_results_give_the_same_bytes(make_results, tmp_path):
    assert page_of(make_results(), tmp_path) == page_of(make_results(), tmp_path)


def test_all_text_is_escaped(hostile_results, tmp_path):
    page = Page(page_of(hostile_results, tmp_path))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    # The sample, its prompt, the label (in tables, samples, notes), the recipe, the protocol, the environment.
    assert "".join(page.text).count(HOSTILE) >= 8


def test_missing_and_not_finite_figures(make_results, tmp_path):
    record = make_results().records["merged_4", "perplexity"]
    infinite = {"value": float("inf"), "low": float("nan"), "high": float("inf")}
    broken = replace(record, score=record.score | infinite | {"versus_base": infinite})
    text = page_of(make_results(replace={("merged_2", "latency"): None, ("merged_4", "perplexity"): broken}), tmp_path)
    assert "Not drawn, being out of the scale&#39;s range: merged_4." in text
    assert '<abbr title="not measured">\N{EN DASH}</abbr>' in text
    empty = page_of(make_results(replace=dict.fromkeys(make_results().records)), tmp_path)
    assert "Nothing to draw" in empty


def test_studies_of_few_evaluators(make_results, make_record, tmp_path):
    text = page_of(make_results(evaluators=("size",)), tmp_path)
    assert "<svg" not in text
    assert "What they write" not in text
    score = {"value": 0.8372, "low": 0.8301, "high": 0.8441, "unit": "accuracy", "lower_is_better": False}
    imdb = {("base", "imdb"): make_record("base", "imdb", score)}
    text = page_of(make_results(evaluators=("imdb",), replace=imdb), tmp_path)
    assert [["base"], ["0.837", "0.830\N{EN DASH}0.844"]] in Page(text).rows
    page_of(make_results(evaluators=()), tmp_path)


def test_samples_stand_under_their_prompt(make_results, tmp_path):
    results = make_results()
    text = page_of(results, tmp_path)
    for sample in results.score("merged_10", "generation")["samples"]:
        assert text.count(f">{sample['prompt']}</h3>") == 1
        assert f">{sample['text']}</p>" in text


def test_protocols_name_the_settings_and_not_the_long_lists(make_results, tmp_path):
    text = page_of(make_results(), tmp_path)
    for setting in ("perplexity-1", "movie-reviews", "131,072", "a3" * 32, "latency-1", "float32"):
        assert setting in text
    assert "123.456789" not in text
    assert "window" not in text.replace("windows", "")
    assert "It is not sound" not in text


def test_protocols_that_make_figures_incomparable_are_pointed_out(make_results, make_record, tmp_path):
    score = make_results().score("merged_2", "perplexity") | {"protocol": "published"}
    other = make_record("merged_2", "perplexity", score, protocol="perplexity-2", environment={"threads": 64})
    text = page_of(make_results(replace={("merged_2", "perplexity"): other}), tmp_path)
    assert "It is not sound" in text
    assert "different versions of the protocol" in text
    assert "Figures come from 2 environments" in text


def test_pairs_and_other_notes(make_results, make_record, tmp_path):
    results = make_results()
    notes = {"pairs": [{"anchor": 3, "block": 5, "correlation": 0.4567, "unaligned": float("nan")}], "ridge": [0.5]}
    record = make_record("merged_2", "size", results.score("merged_2", "size"), notes=notes)
    text = page_of(make_results(replace={("merged_2", "size"): record}), tmp_path)
    assert '<span title="block 5 matched to block 3">0.46</span><small>nan</small>' in text
    assert re.search(r"<dt>ridge</dt><dd dir=\"auto\">\[0.5\]</dd>", text)
    assert "Matched neurons" not in page_of(make_results(labels=("base",)), tmp_path)
