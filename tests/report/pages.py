"""A page as its tests read it."""

from __future__ import annotations

from html.parser import HTMLParser

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
