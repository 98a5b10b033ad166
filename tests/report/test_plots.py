"""The plots of a study and where their labels go."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from made import make_record, make_results
from pages import texts

from layerfold.report.columns import columns
from layerfold.report.placement import Box, place
from layerfold.report.plots import family, plot


def draw(results, x="parameters", y="perplexity"):
    named = {column.name: column for column in columns(results)}
    return plot(results, named[x], named[y])


def with_perplexity(**values):
    scores = {
        (label, "perplexity"): dict(zip(("value", "low", "high"), bounds, strict=True))
        for label, bounds in values.items()
    }
    return make_results(scores=scores)


def test_every_variant_and_family_is_named():
    drawing = draw(make_results())
    assert set(make_results().labels) | {"merge", "collapse"} <= set(texts(drawing))
    assert drawing.note == ""
    assert drawing.title == "Perplexity against parameters"


def test_figures_that_cannot_be_drawn_are_named():
    nan, inf = math.nan, math.inf
    results = with_perplexity(
        merged_2=(nan, nan, nan),
        merged_4=(inf, inf, inf),
        merged_6=(50.0, 40.0, inf),
        merged_8=(0, 0, 0),
        merged_10=(1e300, 1, 2),
    )
    drawing = draw(results)
    assert drawing.note == (
        "Not drawn, being out of the scale's range: merged_2, merged_4, merged_8, merged_10. "
        "Drawn without the bounds that are out of range: merged_6."
    )
    assert "merged_6" in texts(drawing)
    assert not {"merged_2", "merged_4", "merged_8", "merged_10"} & set(texts(drawing))


def test_nothing_to_draw_is_no_drawing_and_a_base_alone_is_drawn():
    assert draw(make_results(replace={(label, "size"): None for label in make_results().labels})).svg == ""
    only_nan = with_perplexity(**dict.fromkeys(make_results().labels, (math.nan,) * 3))
    assert draw(only_nan).svg == ""
    assert "base" in texts(draw(make_results(labels=("base",))))


@pytest.mark.parametrize(
    "bounds",
    [(1e99, 1e-99, 1e300), (29.41, 29.40, 29.42), (5.0, 6.0, 4.0), (5.0, -1.0, 9.0), (1e-5, 1e-6, 1e-4)],
)
def test_unusual_values_are_drawn(bounds):
    assert "merged_2" in texts(draw(with_perplexity(merged_2=bounds)))


def test_any_label_can_be_drawn():
    labels = ["$x$ $", "<b>&amp;", "_x", "a\nb\x00", "数\N{SNOWMAN}", "long_" * 40, "url(#p)"]
    drawn = texts(draw(make_results(rename=dict(zip(make_results().labels[1:], labels, strict=False)))))
    for label in labels:
        start = label.replace("\n", "�").replace("\x00", "�")[:20]
        assert any(text.startswith(start) for text in drawn), label


def test_families():
    results = make_results()
    assert family(results, "merged_2") == "merge"
    assert family(results, "base") == "base"
    for subject, expected in (({}, "merged"), ({"method": "drop"}, "drop"), ({"method": {}}, "merged")):
        records = {
            ("merged_2", evaluator): make_record("merged_2", evaluator, {"value": 1.0}, subject=subject)
            for evaluator in results.evaluators
        }
        assert family(make_results(replace=records), "merged_2") == expected


def test_labels_of_points_in_a_heap_do_not_overlap():
    points = [(100.0 + 2 * index, 100.0 + index) for index in range(8)]
    sizes = [(60.0, 10.0)] * len(points)
    obstacles = [Box.around(*point, 8, 8) for point in points]
    bounds = Box(0, 0, 300, 200)
    placed = [
        Box.around(*centre, *size) for centre, size in zip(place(points, sizes, obstacles, bounds), sizes, strict=True)
    ]
    assert sum(one.overlap(other) for one, other in combinations(placed, 2)) == 0
    assert sum(box.overlap(obstacle) for box in placed for obstacle in obstacles) == 0
    assert all(box.overlap(bounds) == pytest.approx(600) for box in placed)
