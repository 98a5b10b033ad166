"""The HTML page."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from pages import HOSTILE, Page

from layerfold.report import write_html
from layerfold.report.study import columns


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


def test_summary_says_where_perplexity_is_after_recovery(make_recovered, tmp_path):
    assert "merged_2 comes closest in perplexity after recovery, 9.08 times" in page_of(make_recovered(), tmp_path)
    missing = page_of(make_recovered({"merged_2": None}), tmp_path)
    assert "merged_2 comes closest in perplexity, 9.08 times" in missing


def recovery_of(text):
    """The text of the section on recovery, the drawings' left out."""
    found = re.search(r"<h2 id=\"recovery\">(.*?)</section>", text, re.DOTALL)
    return re.sub(r"\s+", " ", "".join(Page(re.sub(r"<svg.*?</svg>", "", found[1], flags=re.DOTALL)).text))


def test_recovery_is_described_and_drawn(make_recovered, tmp_path):
    text = page_of(make_recovered(), tmp_path)
    assert (
        "Every model, the base included, went through distillation on 100k tokens at a learning rate chosen on "
        "validation text in trial runs (75.3k further tokens); of each run, the weights that did best on validation "
        "text are kept." in recovery_of(text)
    )
    assert text.count("<svg") == 4
    assert text.index('id="plots"') < text.index('id="recovery"') < text.index('id="samples"')
    assert "Perplexity during recovery: merge" in recovery_of(text)
    assert re.search(r"compressed_10 ?0.0003: 150.1; 0.001: [\d.]+; 0.003: diverged", recovery_of(text))
    assert "never beat" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"merged_2": None}, "10 of the 11 models, the base included, went through distillation on 100k tokens"),
        ({"base": None}, "10 of the 11 models went through distillation"),
        ({"merged_2": {"method": "finetune"}}, "distillation or fine-tuning on"),
        ({"merged_2": {"method": "mend"}}, "distillation or mend on"),
        ({"merged_2": {"tokens": 50000}}, "on 50.0k\N{EN DASH}100k tokens"),
        ({"merged_2": {"tokens": None}}, "on 100k tokens"),
        ({"merged_2": {"best_step": 0}}, "Training never beat the weights it began with, which are kept: merged_2."),
    ],
)
def test_recovery_says_what_was_done_to_which(make_recovered, tmp_path, changes, said):
    assert said in recovery_of(page_of(make_recovered(changes), tmp_path))


def test_a_learning_rate_that_was_given_was_not_chosen(make_recovered, tmp_path):
    given = {"search_tokens": 0, "learning_rates": [], "learning_rate": 3e-5}
    labels = make_recovered().labels
    said = recovery_of(page_of(make_recovered(dict.fromkeys(labels, given)), tmp_path))
    assert "at a learning rate of 3e-5, given by the recipe; of each run" in said
    assert "tried" not in said


def test_without_recovery_the_page_does_not_speak_of_it(make_results, make_recovered, tmp_path):
    for results in (make_results(), make_recovered(dict.fromkeys(make_recovered().labels))):
        text = page_of(results, tmp_path)
        assert 'id="recovery"' not in text
        assert text.count("<svg") == 2
    assert "recover" not in page_of(make_results(), tmp_path).lower()


def test_a_study_that_began_recovery_shows_it_without_the_rest(make_recovered, tmp_path):
    text = page_of(make_recovered(evaluators=("recovery",)), tmp_path)
    assert 'id="plots"' not in text
    assert text.count("<svg") == 2


def test_recovery_that_is_not_finite_or_missing(make_recovered, tmp_path):
    nan = math.nan
    absurd = {"value": nan, "seconds": nan, "tokens": 1e300, "search_tokens": None, "before": {"value": math.inf}}
    curve = {"train": [[0, None]], "validation": [[0, nan], [1e300, 1e300]]}
    results = make_recovered({"merged_2": absurd | {"curve": curve}, "merged_4": None})
    text = page_of(results, tmp_path)
    assert "Not drawn, no validation loss being in the scale&#39;s range: merged_2." in text
    nothing = make_recovered({label: {"curve": curve} for label in results.labels})
    assert "Nothing to draw: no run has a validation loss in the scale" in page_of(nothing, tmp_path)


def test_recovery_keeps_the_page_as_it_should_be(make_recovered, hostile_recovery, tmp_path):
    for results in (make_recovered(), hostile_recovery):
        text = page_of(results, tmp_path)
        assert page_of(results, tmp_path) == text
        page = Page(text)
        assert not {"script", "img"} & {tag for tag, _ in page.elements}
        assert not [attributes for _, attributes in page.elements if {"style", "src", "onerror"} & set(attributes)]
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
    # The sentence's method, the label among those not improved and among the learning rates, the title of a drawing.
    assert recovery_of(text).count(HOSTILE) == 4


def test_recovery_protocol_has_the_settings_and_not_what_came_of_it(make_recovered, tmp_path):
    results = make_recovered()
    for label in results.labels:
        results.records[label, "recovery"].subject["settings"] = {
            "name": "distill",
            "tokens": 98765,
            "schedule": "cosine",
        }
    text = page_of(results, tmp_path)
    card = re.search(r"<article>\s*<h3>recovery <span>recovery-1</span></h3>(.*?)</article>", text, re.DOTALL)[1]
    listed = dict(re.findall(r"<dt>(.*?)</dt><dd dir=\"auto\">(.*?)</dd>", card))
    assert listed == {"name": "distill", "tokens": "98,765", "schedule": "cosine"}
    perplexity = re.search(r"<article>\s*<h3>perplexity <span>.*?</article>", text, re.DOTALL)[0]
    assert '<dt>tokens</dt><dd dir="auto">131,072</dd>' in perplexity


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
    sentiment = {("base", "sentiment"): make_record("base", "sentiment", score)}
    text = page_of(make_results(evaluators=("sentiment",), replace=sentiment), tmp_path)
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


def test_what_a_repair_left_of_each_block_s_error_is_told(make_results, make_record, tmp_path):
    results = make_results()
    repaired = [{"block": 0, "error": 0.5, "repaired": 0.0125, "ridges": {"ffn": 0.1}}]
    repaired.append({"block": 1, "error": 0.25, "repaired": 0.25, "ridges": {}})
    record = make_record("merged_2", "size", results.score("merged_2", "size"), notes={"repaired": repaired})
    text = page_of(make_results(replace={("merged_2", "size"): record}), tmp_path)
    assert "missed of each block&#39;s target" in text
    assert "block 0: 50.00% -&gt; 1.25%; block 1: 25.00% -&gt; 25.00%" in text


def test_what_a_search_scored_is_told(make_results, make_record, tmp_path):
    results = make_results()
    text = {"corpus": "imdb", "split": "validation", "tokens": 16384}
    search = {"perplexity": {"0-1,2-3": 628.0734, "1-3": math.nan, "0-2": None}, "scored": 7, "text": text}
    record = make_record("merged_2", "size", results.score("merged_2", "size"), notes={"search": search})
    page = page_of(make_results(replace={("merged_2", "size"): record}), tmp_path)
    assert "<dt>selection perplexity</dt>" in page
    assert "0-1,2-3: 628.1; 1-3: nan; 0-2 (on imdb, validation, 16,384 tokens)" in page


def test_perplexity_is_drawn_against_what_is_not_zero_where_rows_are_pruned(make_results, tmp_path):
    results = make_results()
    size = results.records["merged_2", "size"]
    pruned = replace(size, score=size.score | {"nonzero": 0.84 * size.score["value"]})
    for found, drawn in ((results, False), (make_results(replace={("merged_2", "size"): pruned}), True)):
        write_html(found, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert ("Perplexity against non-zero" in page) == drawn
        assert ("Zeros alone make nothing faster on dense kernels." in page) == drawn
        assert ("Perplexity against parameters" in page) != drawn


def test_a_speed_up_within_chance_is_none(make_results, tmp_path):
    results = make_results(labels=("base", "merged_2"))
    latency = results.records["merged_2", "latency"]
    said = {}
    for low in (0.97, 1.03):
        speedup = {"value": 1.05, "low": low, "high": 1.17}
        found = replace(latency, score=latency.score | {"speedup": speedup})
        said[low] = page_of(
            make_results(labels=("base", "merged_2"), replace={("merged_2", "latency"): found}), tmp_path
        )
    assert "none is faster than the base by more than the uncertainty" in said[0.97]
    assert "is the fastest" not in said[0.97]
    assert "merged_2 is the fastest, 1.05 times as fast" in said[1.03]
