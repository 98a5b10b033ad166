"""The report of a study: its page, its table in the terminal, and its CSV file."""

from __future__ import annotations

import math
import re

import pytest
from attacks import hostile_recovery
from made import make_record, make_recovered, make_results
from pages import HOSTILE, Page, csv_of, listed, page_of, printed, shown_in

from layerfold.report.report import MISSING
from layerfold.report.study import table


def rows_of(results):
    return {row["label"]: row for row in csv_of(results)[1]}


def shown_cells(results):
    return shown_in([cell for _, cells in table(results).rows for cell in cells])


def test_the_summary_names_the_outstanding_variants():
    text = page_of(make_results())
    assert (
        "10 compressed variants of pocket measured beside it: merged_2 comes closest in perplexity, 9.08 times" in text
    )
    assert "compressed_10 is the smallest, with 64.1% of the parameters removed" in text
    assert "compressed_10 is the fastest, 4.49 times as fast" in text
    assert "1 compressed variant of pocket" in page_of(make_results(labels=("base", "merged_2")))
    assert "Only the base model" in page_of(make_results(labels=("base",)))
    assert "merged_2 comes closest in perplexity after recovery, 9.08 times" in page_of(make_recovered())
    assert "merged_2 comes closest in perplexity, 9.08 times" in page_of(make_recovered({"merged_2": None}))


def test_a_speed_up_within_chance_is_none():
    said = {}
    for low in (0.97, 1.03):
        scores = {("merged_2", "latency"): {"speedup": {"value": 1.05, "low": low, "high": 1.17}}}
        said[low] = page_of(make_results(labels=("base", "merged_2"), scores=scores))
    assert "none is faster than the base by more than the uncertainty" in said[0.97]
    assert "is the fastest" not in said[0.97]
    assert "merged_2 is the fastest, 1.05 times as fast" in said[1.03]


def recovery_of(text):
    """The text of the section on recovery, the drawings' left out."""
    found = re.search(r"<h2 id=\"recovery\">(.*?)</section>", text, re.DOTALL)
    return re.sub(r"\s+", " ", "".join(Page(re.sub(r"<svg.*?</svg>", "", found[1], flags=re.DOTALL)).text))


def test_recovery_is_described_and_drawn():
    text = page_of(make_recovered())
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
def test_recovery_says_what_was_done_to_which(changes, said):
    assert said in recovery_of(page_of(make_recovered(changes)))


def test_a_learning_rate_that_was_given_was_not_chosen():
    given = {"search_tokens": 0, "learning_rates": [], "learning_rate": 3e-5}
    labels = make_recovered().labels
    said = recovery_of(page_of(make_recovered(dict.fromkeys(labels, given))))
    assert "at a learning rate of 3e-5, given by the recipe; of each run" in said
    assert "tried" not in said


def test_the_page_speaks_of_recovery_where_there_is_some():
    for results in (make_results(), make_recovered(dict.fromkeys(make_recovered().labels))):
        text = page_of(results)
        assert 'id="recovery"' not in text
        assert text.count("<svg") == 2
    assert "recover" not in page_of(make_results()).lower()
    begun = page_of(make_recovered(evaluators=("recovery",)))
    assert 'id="plots"' not in begun
    assert begun.count("<svg") == 2


def test_recovery_that_is_not_finite_or_missing():
    nan = math.nan
    absurd = {"value": nan, "seconds": nan, "tokens": 1e300, "search_tokens": None, "before": {"value": math.inf}}
    curve = {"train": [[0, None]], "validation": [[0, nan], [1e300, 1e300]]}
    results = make_recovered({"merged_2": absurd | {"curve": curve}, "merged_4": None})
    text = page_of(results)
    assert "Not drawn, no validation loss being in the scale&#39;s range: merged_2." in text
    nothing = make_recovered({label: {"curve": curve} for label in results.labels})
    assert "Nothing to draw: no run has a validation loss in the scale" in page_of(nothing)


def test_what_recovery_says_of_others_is_text():
    # The sentence's method, the label among those not improved and among the learning rates, the title of a drawing.
    assert recovery_of(page_of(hostile_recovery())).count(HOSTILE) == 4


def test_recovery_protocol_has_the_settings_and_not_what_came_of_it():
    results = make_recovered()
    for label in results.labels:
        settings = {"name": "distill", "tokens": 98765, "schedule": "cosine"}
        results.records[label, "recovery"].subject["settings"] = settings
    text = page_of(results)
    card = re.search(r"<article>\s*<h3>recovery <span>recovery-1</span></h3>(.*?)</article>", text, re.DOTALL)[1]
    assert listed(card) == {"name": "distill", "tokens": "98,765", "schedule": "cosine"}
    perplexity = re.search(r"<article>\s*<h3>perplexity <span>.*?</article>", text, re.DOTALL)[0]
    assert '<dt>tokens</dt><dd dir="auto">131,072</dd>' in perplexity


def test_missing_and_not_finite_figures_on_the_page():
    infinite = {"value": math.inf, "low": math.nan, "high": math.inf}
    broken = {("merged_4", "perplexity"): infinite | {"versus_base": infinite}}
    text = page_of(make_results(replace={("merged_2", "latency"): None}, scores=broken))
    assert "Not drawn, being out of the scale&#39;s range: merged_4." in text
    assert '<abbr title="not measured">\N{EN DASH}</abbr>' in text
    empty = page_of(make_results(replace=dict.fromkeys(make_results().records)))
    assert "Nothing to draw" in empty


def test_pages_of_few_evaluators():
    text = page_of(make_results(evaluators=("size",)))
    assert "<svg" not in text
    assert "What they write" not in text
    score = {"value": 0.8372, "low": 0.8301, "high": 0.8441, "unit": "accuracy", "lower_is_better": False}
    sentiment = {("base", "sentiment"): make_record("base", "sentiment", score)}
    text = page_of(make_results(evaluators=("sentiment",), replace=sentiment))
    assert [["base"], ["0.837", "0.830\N{EN DASH}0.844"]] in Page(text).rows
    page_of(make_results(evaluators=()))


def test_samples_stand_under_their_prompt():
    results = make_results()
    text = page_of(results)
    for sample in results.score("merged_10", "generation")["samples"]:
        assert text.count(f">{sample['prompt']}</h3>") == 1
        assert f">{sample['text']}</p>" in text


def test_protocols_name_the_settings_and_not_the_long_lists():
    text = page_of(make_results())
    for setting in ("perplexity-1", "movie-reviews", "131,072", "a3" * 32, "latency-1", "float32"):
        assert setting in text
    assert "123.456789" not in text
    assert "window" not in text.replace("windows", "")
    assert "It is not sound" not in text


def test_protocols_that_make_figures_incomparable_are_pointed_out():
    score = make_results().score("merged_2", "perplexity") | {"protocol": "published"}
    other = make_record("merged_2", "perplexity", score, protocol="perplexity-2", environment={"threads": 64})
    text = page_of(make_results(replace={("merged_2", "perplexity"): other}))
    assert "It is not sound" in text
    assert "different versions of the protocol" in text
    assert "Figures come from 2 environments" in text


NOTES = [
    (
        {"pairs": [{"anchor": 3, "block": 5, "correlation": 0.4567, "unaligned": math.nan}], "ridge": [0.5]},
        [
            '<span title="block 5 matched to block 3">0.46</span><small>nan</small>',
            '<dt>ridge</dt><dd dir="auto">[0.5]</dd>',
        ],
    ),
    (
        {
            "repaired": [
                {"block": 0, "error": 0.5, "repaired": 0.0125, "ridges": {"ffn": 0.1}},
                {"block": 1, "error": 0.25, "repaired": 0.25, "ridges": {}},
            ]
        },
        [
            "missed of each block&#39;s target",
            "block 0: 50.00% -&gt; 1.25%; block 1: 25.00% -&gt; 25.00%",
        ],
    ),
    (
        {
            "search": {
                "perplexity": {"0-1,2-3": 628.0734, "1-3": math.nan, "0-2": None},
                "scored": 7,
                "text": {"corpus": "imdb", "split": "validation", "tokens": 16384},
            }
        },
        [
            "<dt>selection perplexity</dt>",
            "0-1,2-3: 628.1; 1-3: nan; 0-2 (on imdb, validation, 16,384 tokens)",
        ],
    ),
]


@pytest.mark.parametrize(("notes", "said"), NOTES, ids=["pairs", "repair", "search"])
def test_notes_are_told(notes, said):
    record = make_record("merged_2", "size", make_results().score("merged_2", "size"), notes=notes)
    text = page_of(make_results(replace={("merged_2", "size"): record}))
    assert [each for each in said if each not in text] == []
    assert "Matched neurons" not in page_of(make_results(labels=("base",)))


def test_where_rows_are_pruned_perplexity_is_drawn_against_what_is_not_zero():
    pruned = make_results(scores={("merged_2", "size"): {"nonzero": 5515453}})
    for found, drawn in ((make_results(), False), (pruned, True)):
        page = page_of(found)
        assert ("zeros alone make nothing faster on dense kernels" in printed(found, 200)) == drawn
        assert ("Perplexity against non-zero" in page) == drawn
        assert ("Zeros alone make nothing faster on dense kernels." in page) == drawn
        assert ("Perplexity against parameters" in page) != drawn


def test_one_table_fits_in_100_columns_and_columns_of_an_evaluator_stay_together_in_fewer():
    assert printed(make_results(), 100).count("variant") == 1
    lines = printed(make_results(), 80).splitlines()
    headers = [line.split() for line in lines if "perplexity" in line or "speed-up" in line]
    assert headers == [
        ["blocks", "parameters", "removed", "perplexity", "perplexity"],
        ["latency", "speed-up", "repeated"],
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_recovery_shows_before_beside_after_and_what_it_took(width):
    results = make_recovered({"merged_2": None})
    text = printed(results, width)
    assert max(map(len, text.splitlines())) <= width
    assert shown_cells(results) <= set(text.split())
    assert [line for line in text.splitlines() if re.search(r"before +after +\S+ base", line)]
    assert [line for line in text.splitlines() if re.search(r"tokens +seconds", line)]
    rows = [line.split() for line in text.splitlines() if line.startswith("merged_2 ")]
    assert sum(row.count(MISSING) for row in rows) == 3
    assert [row[-2:] for row in rows][-1] == [MISSING, MISSING]


def test_labels_are_plain_text_and_continue_on_the_next_line_where_they_are_long():
    text = printed(make_results(rename={"merged_2": "[red]x[/red]\x1b[2J", "merged_4": "[/]"}), 100)
    assert "[red]x[/red]" in text
    assert "[/]" in text
    assert "\x1b" not in text
    label = "abcdefghij" * 9
    text = printed(make_results(rename={"merged_2": label}), 100)
    assert label in "".join(line[:33].strip() for line in text.split("variant")[1].splitlines())
    assert shown_cells(make_results()) <= set(text.split())


def test_missing_and_not_finite_figures():
    collapsed = {("merged_4", "perplexity"): {"value": math.nan, "low": math.nan, "high": math.inf}}
    text = printed(make_results(replace={("merged_2", "latency"): None}, scores=collapsed), 100)
    row = next(line for line in text.splitlines() if line.startswith("merged_2"))
    assert row.split()[-3:] == [MISSING, MISSING, "12%"]
    assert "nan" in next(line for line in text.splitlines() if line.startswith("merged_4"))


@pytest.mark.parametrize("evaluators", [(), ("size",), ("latency",)])
def test_a_study_of_few_evaluators(evaluators):
    text = printed(make_results(evaluators=evaluators, labels=("base",)), 100)
    assert "base" in text
    assert ("quartiles" in text) == ("latency" in evaluators)


@pytest.mark.parametrize(
    ("same", "said"),
    [
        ((1.002, 0.991, 1.012), "speed of a copy of the base: +0.2% [-0.9%, +1.2%]"),
        ((0.962, 0.951, 0.97), "warning: speed of a copy of the base: -3.8% [-4.9%, -3.0%]. Equal models should"),
    ],
)
def test_the_base_timed_twice_is_said_beside_the_speedups(same, said):
    results, check = make_results(), {"same_model": dict(zip(("value", "low", "high"), same, strict=True))}
    found = make_results(scores={(label, "latency"): check for label in results.labels})
    assert " ".join(printed(found, 200).split()).count(said) == 1
    assert f"{said[0].upper()}{said[1:]}" in page_of(found)
    assert "copy of the base" not in printed(results, 200)  # records of latency-1


def test_parses_back_to_the_exact_numbers():
    results = make_results()
    rows = rows_of(results)
    assert tuple(rows) == results.labels
    for label, row in rows.items():
        perplexity, latency = results.score(label, "perplexity"), results.score(label, "latency")
        size, generation = results.score(label, "size"), results.score(label, "generation")
        estimates = {
            "perplexity": perplexity,
            "perplexity_ratio": perplexity.get("versus_base"),
            "latency_ms": latency,
            "speedup": latency.get("speedup"),
            "prefill_ms": latency["prefill"],
            "repeated_4grams": generation,
        }
        for name, score in estimates.items():
            for column, key in ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                assert row[column] == ("" if score is None else repr(score[key]))
        counts = {"nonzero_parameters": "nonzero", "dense_bytes": "bytes"}
        for name in ("blocks", "parameters", "compact_bytes", "flops_per_token", *counts):
            assert int(row[name]) == size[counts.get(name, name)]
        assert float(row["bits_per_byte"]) == perplexity["bits_per_byte"]
        assert float(row["removed_fraction"]) == 1 - size["parameters"] / results.score("base", "size")["parameters"]


def test_recovery_is_written_unrounded():
    results = make_recovered({"merged_2": None, "merged_4": {"before": None, "seconds": math.nan}})
    rows = rows_of(results)
    score = results.score("compressed_4", "recovery")
    expected = {
        "perplexity_before": score["before"]["value"],
        "perplexity_before_low": score["before"]["low"],
        "perplexity_before_high": score["before"]["high"],
        "perplexity": results.score("compressed_4", "perplexity")["value"],
        "recovery_tokens": 100352,
        "recovery_seconds": 61.25,
        "recovery_validation_perplexity": score["value"],
        "recovery_parameters": 4290123,
        "recovery_learning_rate": 0.001,
        "recovery_search_tokens": 75264,
        "recovery_best_step": 49,
    }
    assert {name: rows["compressed_4"][name] for name in expected} == {k: repr(v) for k, v in expected.items()}
    assert {value for name, value in rows["merged_2"].items() if name.startswith("recovery_")} == {""}
    assert (rows["merged_2"]["perplexity_before"], rows["merged_4"]["perplexity_before_high"]) == ("", "")
    assert rows["merged_4"]["recovery_seconds"] == "nan"


def test_recovery_adds_columns_and_renames_none():
    headers = [list(csv_of(results)[1][0]) for results in (make_recovered(), make_results())]
    assert [name for name in headers[0] if "recovery" not in name and "before" not in name] == headers[1]
    assert len(headers[0]) == len(set(headers[0]))


def test_missing_is_empty_and_not_finite_hostile_and_unknown_is_written():
    broken = {("merged_4", "perplexity"): {"value": math.nan, "low": 1.5, "high": math.inf}}
    rows = rows_of(make_results(replace={("merged_2", "size"): None}, scores=broken))
    assert (rows["merged_2"]["blocks"], rows["merged_2"]["removed_fraction"]) == ("", "")
    row = rows["merged_4"]
    assert math.isnan(float(row["perplexity"]))
    assert (float(row["perplexity_low"]), float(row["perplexity_high"])) == (1.5, math.inf)
    hostile = '=cmd|"/c calc"!A1, and\na line'
    assert rows_of(make_results(rename={"merged_2": hostile}))[hostile]["blocks"] == "12"
    score = {"value": 0.1, "low": 0.05, "high": 0.15}
    results = make_results(evaluators=("mood",), replace={("base", "mood"): make_record("base", "mood", score)})
    assert csv_of(results)[0][:2] == ["label,mood,mood_low,mood_high", "base,0.1,0.05,0.15"]
