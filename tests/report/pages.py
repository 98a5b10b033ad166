"""Reports and drawings as their tests read them."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from rich.console import Console

from layerfold.planning import Planned
from layerfold.records import Results
from layerfold.report import drop_report, plan_report, print_report, study_report, window_report, write_csv, write_page
from layerfold.report.report import Plots
from layerfold.search import FoundWindows
from layerfold.search.results import Found

HOSTILE = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"
INK, MUTED, FIRST, SECOND = "var(--ink)", "var(--muted)", "var(--series-0)", "var(--series-1)"


class Page(HTMLParser):
    """The page's elements, and the text of its table cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.text, self.cell = [], [], [], None
        self.feed(text)

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

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


def report_of(found):
    """The report of what a study, a search or a plan found; a report is its own."""
    if isinstance(found, Planned):
        return plan_report(found, found.recipe(found.model))
    makers = {Results: study_report, Found: drop_report, FoundWindows: window_report}
    return makers.get(type(found), lambda report: report)(found)


def written(found, write):
    """The text of a file that a report is written into."""
    with TemporaryDirectory() as folder:
        write(report_of(found), Path(folder) / "report")
        return (Path(folder) / "report").read_text(encoding="utf-8")


def drawn_page(found):
    return written(found, write_page)


def page_of(found):
    """The page of a report with an empty drawing for each that it has: matplotlib takes longer than all the rest."""

    def undrawn(part):
        if not isinstance(part, Plots):
            return part
        blank = [replace(plot, draw=plot.draw and (lambda: "<svg></svg>")) for plot in part.plots]
        return replace(part, plots=blank)

    report = report_of(found)
    sections = [replace(section, parts=list(map(undrawn, section.parts))) for section in report.sections]
    return drawn_page(replace(report, sections=sections))


def section(text, name):
    return re.search(rf'<section aria-labelledby="{name}">.*?</section>', text, re.DOTALL)[0]


def lead_of(text):
    return re.search(r'<p class="lead">(.*?)</p>', text)[1].replace("&#39;", "'")


def cards_of(text):
    return dict(re.findall(r"<h3>(.*?)</h3>(.*?)</article>", text, re.DOTALL))


def listed(text):
    return dict(re.findall(r"<dt>(.*?)</dt><dd dir=\"auto\">(.*?)</dd>", text))


def printed(found, width=140):
    console = Console(width=width, file=io.StringIO())
    print_report(report_of(found), console)
    return console.file.getvalue()


def csv_of(found):
    """The lines of a report's CSV file, and the same as rows by header."""
    text = written(found, write_csv)
    return text.splitlines(), list(csv.DictReader(io.StringIO(text, newline="")))


def headers(table):
    return [f"{column.title} {column.unit}".strip() for column in table.columns]


def rows(table):
    return {label: [cell.value for cell in cells] for label, cells in table.rows}


def shown_in(cells):
    """The texts of cells: values, and intervals where there are any."""
    return {text for cell in cells for text in (cell.value, cell.interval) if text}


def on_page(table):
    """The rows of a table as `Page` reads them."""
    return [
        [[label], *([text for text in (cell.value, cell.interval) if text] for cell in cells)]
        for label, cells in table.rows
    ]


def texts(plot):
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(plot.svg).iter("text")]


def markers(plot, colour, of="fill"):
    """Where markers of a colour stand; those of the axes and of the legend left out."""
    clipped = ElementTree.fromstring(plot.svg).iterfind(".//g[@clip-path]/use")
    return [(float(use.get("x")), float(use.get("y"))) for use in clipped if use.get(of) == colour]


def ticks(plot, axis):
    groups = ElementTree.fromstring(plot.svg).iter("g")
    return ["".join(each.itertext()).strip() for each in groups if f"-{axis}tick_" in each.get("id", "")]
