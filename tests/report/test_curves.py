"""The training curves."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from made import make_recovered
from pages import texts

from layerfold.report.curves import TRAINING_POINTS, curves
from layerfold.report.drawing import FONT_SIZE
from layerfold.report.placement import spread

LABELS = [f"merged_{n}" for n in (2, 4, 6, 8, 10)] + [f"compressed_{n}" for n in (2, 4, 6, 8, 10)]


@pytest.fixture(scope="module")
def drawn():
    """The drawings of all variants, one a family."""
    return curves(make_recovered())


def elements(drawing, tag):
    return ElementTree.fromstring(drawing.svg).iter(tag)


def label_of(drawing, text):
    """The height of a label at the end of a line, and its colour."""
    found = next(element for element in elements(drawing, "text") if "".join(element.itertext()).strip() == text)
    return float(found.get("y")), found.get("fill")


def lines(drawing, training=False):
    """The points of each curve by colour, in points from the top left; a gap parts its pieces."""
    found = {}
    for path in elements(drawing, "path"):
        drawn = path.get("clip-path") and path.get("fill") == "none" and "var(--line)" not in path.get("stroke")
        if drawn and (path.get("stroke-opacity") is not None) == training:
            pieces = [re.findall(r"[-\d.]+ [-\d.]+", piece) for piece in path.get("d").split("M")[1:]]
            found[path.get("stroke")] = [[tuple(map(float, point.split())) for point in piece] for piece in pieces]
    return found


def kept(drawing):
    """Where the ring of the weights kept stands, by colour."""
    rings = {path.get("id"): path for path in elements(drawing, "path") if path.get("d").startswith("M 0 3.75")}
    uses = [use for use in elements(drawing, "use") if use.get("href", "").removeprefix("#") in rings]
    # The legend's is muted.
    colours = {use.get("stroke"): (float(use.get("x")), float(use.get("y"))) for use in uses}
    return {colour: place for colour, place in colours.items() if colour != "var(--muted)"}


def test_each_method_has_a_drawing_beside_the_base_on_the_same_scales(drawn):
    merge, collapse = drawn
    assert merge.title == "Perplexity during recovery: merge"
    assert collapse.title == "Perplexity during recovery: collapse"
    assert {"base", *LABELS[:5]} <= set(texts(merge))
    assert {"base", *LABELS[5:]} <= set(texts(collapse))
    assert not set(LABELS[5:]) & set(texts(merge))
    assert (merge.note, collapse.note) == ("", "")
    assert [y for _, y in lines(merge)["var(--ink)"][0]] == [y for _, y in lines(collapse)["var(--ink)"][0]]


def test_few_variants_share_a_drawing():
    (drawing,) = curves(make_recovered(labels=("base", "merged_2", "compressed_2")))
    assert drawing.title == "Perplexity during recovery"
    assert {"base", "merged_2", "compressed_2"} <= set(texts(drawing))
    assert len(curves(make_recovered(labels=("base",)))) == 1
    assert len(curves(make_recovered(labels=("merged_2",)))) == 1


def test_no_drawing_has_two_lines_of_one_colour():
    labels = {label: f"merged_{index}" for index, label in enumerate(LABELS)}
    results = make_recovered(rename=labels)
    for record in results.records.values():
        record.subject.pop("method", None)
    drawings = curves(results)
    assert [drawing.title for drawing in drawings] == ["Perplexity during recovery: merged"] * 2
    for drawing in drawings:
        assert len(lines(drawing)) == 6
        colours = {label_of(drawing, text)[1] for text in texts(drawing) if text.startswith("merged_")}
        assert colours == set(lines(drawing)) - {"var(--ink)"}


def test_points_stand_at_their_tokens_and_the_logarithm_of_their_perplexity():
    results = make_recovered(labels=("base", "merged_4"))
    (drawing,) = curves(results)
    ((points,), (training,)) = lines(drawing)["var(--series-0)"], lines(drawing, training=True)["var(--series-0)"]
    curve = results.score("merged_4", "recovery")["curve"]
    assert (len(points), len(training)) == (5, 49)
    (left, top), (right, bottom) = points[0], points[-1]
    (first, high), (last, low) = curve["validation"][0], curve["validation"][-1]
    for drawn, read in ((points, curve["validation"]), (training, curve["train"])):
        for (x, y), (tokens, nats) in zip(drawn, read, strict=True):
            assert (x - left) / (right - left) == pytest.approx((tokens - first) / (last - first), abs=1e-4)
            assert (y - top) / (bottom - top) == pytest.approx((nats - high) / (low - high), abs=1e-4)
    assert bottom > top
    assert any(text.endswith("k") for text in texts(drawing))


def test_the_weights_kept_are_marked():
    curve = {"train": [], "validation": [[0, 7.0], [1000, 5.0], [2000, 4.5], [3000, 4.75]]}
    worse = {"train": [[1000, 6.0]], "validation": [[0, 5.0], [1000, 5.5]]}
    results = make_recovered(
        {"merged_2": {"curve": curve}, "merged_4": {"curve": worse}}, labels=("base", "merged_2", "merged_4")
    )
    (drawing,) = curves(results)
    drawn = lines(drawing)
    assert kept(drawing)["var(--series-0)"] == pytest.approx(drawn["var(--series-0)"][0][2])
    assert kept(drawing)["var(--series-1)"] == pytest.approx(drawn["var(--series-1)"][0][0])


def test_labels_stand_beside_the_ends_of_their_lines_and_do_not_overlap():
    alike = {"train": [], "validation": [[0, 7.0], [1000, 5.0]]}
    results = make_recovered({label: {"curve": alike} for label in LABELS})
    for drawing, labels in zip(curves(results), (LABELS[:5], LABELS[5:]), strict=True):
        heights = sorted(label_of(drawing, label)[0] for label in (*labels, "base"))
        assert min(after - before for before, after in pairwise(heights)) > FONT_SIZE
        end = lines(drawing)["var(--series-0)"][0][-1][1]
        assert max(abs(label_of(drawing, label)[0] - end) for label in labels) < 5 * 1.5 * FONT_SIZE


def test_losses_that_cannot_be_drawn_are_named():
    nan, inf = math.nan, math.inf
    results = make_recovered(
        {
            "merged_2": {"curve": {"train": [[1, nan], [2, 3.0]], "validation": [[0, 6.0], [9, 5.0]]}},
            "merged_4": {"curve": {"train": [], "validation": [[0, 6.0], [5, 5.9], [6, inf], [8, 5.5], [9, 5.0]]}},
            "merged_6": {"curve": {"train": [[1, 5.0]], "validation": [[0, nan], [inf, 6.0], [9, None]]}},
            "merged_8": {"curve": {"train": [], "validation": [[0, 1e300], [-5, 6.0], [9, -1], ["x", 10**400]]}},
            "merged_10": None,
        },
        labels=("base", *LABELS[:5]),
    )
    (drawing,) = curves(results)
    assert drawing.note == (
        "Not drawn, no validation loss being in the scale's range: merged_6, merged_8. "
        "Drawn without the losses that are out of range: merged_2, merged_4."
    )
    assert not {"merged_6", "merged_8", "merged_10"} & set(texts(drawing))
    assert [len(piece) for piece in lines(drawing)["var(--series-1)"]] == [2, 2]
    assert "nan" not in drawing.svg


@pytest.mark.parametrize(
    "validation", [[[0, 5.0]], [[0, 0.0]], [[7, 16.0]], [[0, 5.0], [0, 5.0]], [[3, 5.0], [9, 5.0]]]
)
def test_unusual_runs_are_drawn(validation):
    changes = {"base": {"curve": {"train": [], "validation": validation}}}
    (drawing,) = curves(make_recovered(changes, labels=("base",)))
    assert "base" in texts(drawing)
    assert len(kept(drawing)) == 1
    assert drawing.note == ""


def test_nothing_to_draw_is_no_drawing():
    (drawing,) = curves(make_recovered({"base": {"curve": {"validation": [[0, math.nan]]}}}, labels=("base",)))
    assert drawing.svg == ""
    assert "base" in drawing.note
    for curve in (None, {}):
        assert curves(make_recovered({"base": {"curve": curve}}, labels=("base",))) == []
    assert curves(make_recovered({"base": None}, labels=("base",))) == []


def test_training_that_is_long_is_averaged():
    noisy = [[step, 5.0 + (-1) ** step] for step in range(1, 100 * TRAINING_POINTS + 1)]
    curve = {"train": noisy, "validation": [[0, 6.0], [len(noisy), 5.0]]}
    (drawing,) = curves(make_recovered({"base": {"curve": curve}}, labels=("base",)))
    ((training,),) = lines(drawing, training=True).values()
    assert len(training) == TRAINING_POINTS
    end = lines(drawing)["var(--ink)"][0][-1][1]
    assert [y for _, y in training] == pytest.approx([end] * TRAINING_POINTS)


def test_any_label_can_be_drawn_and_long_ones_keep_both_ends():
    long = [f"{'pruned' * 8}_at_{percent}" for percent in (10, 20)]
    labels = ["$x$ $", "<b>&amp;", "_x", "a\nb\x00", "数\N{SNOWMAN}", "url(#p)"]
    drawings = curves(make_recovered(rename=dict(zip(LABELS, [*labels, *long], strict=False))))
    drawn = {text for drawing in drawings for text in texts(drawing)}
    assert {label.replace("\n", "�").replace("\x00", "�") for label in labels} <= drawn
    assert {"prunedprun…uned_at_10", "prunedprun…uned_at_20"} <= drawn


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        ([50.0], [50.0]),
        ([-9.0], [0.0]),
        ([70.0, 20.0], [70.0, 20.0]),
        ([50.0, 50.0, 50.0], [40.0, 50.0, 60.0]),
        ([12.0, 8.0, 40.0], [15.0, 5.0, 40.0]),
        ([99.0, 100.0, 20.0], [90.0, 100.0, 20.0]),
        ([0.0] * 12, [10.0 * index for index in range(12)]),
    ],
)
def test_heights_are_spread_as_little_as_need_be(wanted, expected):
    assert spread(wanted, gap=10.0, low=0.0, high=100.0) == pytest.approx(expected)
