"""What every report keeps to, whatever it is of: a study, one with recovery, a search for blocks or windows, a plan."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import replace

import made
import matplotlib as mpl
import pytest
from attacks import hostile
from pages import HOSTILE, Page, csv_of, drawn_page, on_page, printed, report_of, shown_in

from layerfold.errors import OutputError
from layerfold.report import write_csv, write_page
from layerfold.report.report import Details, Plots, Table

DRAWINGS = {"study": 2, "recovered": 4, "drop": 2, "window": 3, "plan": 1}
KINDS = tuple(DRAWINGS)


def make_report(kind):
    """Make a report of a kind anew."""
    windows = {(start, size): 86.0 + start * size for size in range(2, 10) for start in range(10 - size)}
    found = {
        "study": made.make_results,
        "recovered": made.make_recovered,
        "drop": lambda: made.make_found(made.make_sets(2)),
        "window": lambda: made.make_windows(windows),
        "plan": made.make_plan,
    }[kind]()
    return replace(report_of(found), kind=kind)


@pytest.fixture(scope="module", params=KINDS)
def report(request):
    """A report of each kind, whose drawings are made once."""
    return make_report(request.param)


@pytest.fixture(scope="module")
def page(report):
    return drawn_page(report)


def parts(report, kind):
    """The parts of a kind that the page shows, at once or when the reader opens them."""
    shown = [part for section in report.sections for part in section.parts]
    inner = [part for each in shown if isinstance(each, Details) for part in each.parts]
    return [part for part in (*shown, *inner) if isinstance(part, kind)]


def test_page_loads_nothing_and_runs_nothing(page):
    assert not re.search(r"https?:|//[a-z]|@import", page)
    elements = Page(page).elements
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        assert not {"src", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        href = attributes.get("href", "#")
        assert href.startswith("#") or (tag, href) == ("link", "data:,")
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    allowed = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{allowed}';")
    assert "unsafe" not in policy


def test_ids_are_unique_and_every_label_is_there(page):
    read = Page(page)
    assert len(read.ids) == len(set(read.ids))
    labels = {attributes["aria-labelledby"] for _, attributes in read.elements if "aria-labelledby" in attributes}
    assert labels
    assert labels <= set(read.ids)


def test_page_has_every_row_of_every_table(report, page):
    read = Page(page).rows
    tables = parts(report, Table)
    assert tables
    for table in tables:
        assert all(row in read for row in on_page(table))


def test_page_has_every_drawing(report, page):
    drawings = [plot for group in parts(report, Plots) for plot in group.plots]
    assert page.count("<svg") == len(drawings) == DRAWINGS[report.kind]


def test_drawings_stand_alone_and_take_their_colours_from_the_page(report):
    drawings = [plot for group in parts(report, Plots) for plot in group.plots]
    ids = [re.findall(r'\bid="([^"]+)"', plot.svg) for plot in drawings]
    assert len({name for own in ids for name in own}) == sum(map(len, ids))
    for own, plot in zip(ids, drawings, strict=True):
        references = re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg)
        assert references
        assert set(references) <= set(own)
        assert "style=" not in plot.svg
        assert "<style" not in plot.svg
        assert "var(--series-0)" in plot.svg
        assert not re.search(r'"#0[0-9a-f]{5}"', plot.svg)


def test_the_same_findings_give_the_same_bytes_under_any_settings(report, page):
    again = make_report(report.kind)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert drawn_page(again) == page
        assert mpl.rcParams["font.size"] == 30
    assert csv_of(again) == csv_of(report)


@pytest.mark.parametrize("width", [30, 40, 80, 100, 200])
def test_no_label_and_no_figure_is_cut_in_the_terminal(report, width):
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = set(text.split())
    for table in report.printed:
        if isinstance(table, Table):
            for label, cells in table.rows:
                assert shown_in(cells) <= words
                assert width < 40 or set(label.split()) <= words


@pytest.mark.parametrize("width", [1, 5, 20])
def test_the_narrowest_consoles_do_not_fail(report, width):
    assert printed(report, width)


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        # The title, the heading and the summary (twice); the sample and its prompt; the label in tables, samples and
        # notes; the recipe, the protocol, the environment.
        ("study", 17),
        # The sentence's method, the label among those not improved and among the learning rates, and much as before.
        ("recovered", 25),
        # The title, the heading, the summary, the model among the settings; five listings of five; the part.
        ("drop", 4 + 25 + 1),
        # The same; five listings of four; the sharing, of two.
        ("window", 4 + 20 + 2),
        # The title, the heading, the summary, the model and the corpus among the settings; four listings of two; two
        # rows of all trials and one of the front; the plot's note; the recipe's base and corpora.
        ("plan", 5 + 8 + 3 + 1 + 3),
    ],
)
def test_all_text_is_escaped_on_the_page_and_plain_text_in_the_terminal(kind, times):
    attacked = hostile(kind)
    text = drawn_page(attacked)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if {"style", "src", "onerror"} & set(attributes)]
    assert len(page.ids) == len(set(page.ids))
    assert "".join(page.text).replace('\\"', '"').count(HOSTILE) == times
    assert ("{{ 7 * 7 }}" in text) == (attacked.title != "pocket")
    assert "\x1b" not in printed(attacked, 400)


@pytest.mark.parametrize("write", [write_page, write_csv])
def test_a_folder_that_cannot_be_written(write, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(report_of(made.make_windows({})), tmp_path / "file" / "report")
