"""The page in a real browser: nothing of what others wrote runs, and the console stays silent."""

from __future__ import annotations

import os
import shutil
import subprocess

import made
import pytest
from attacks import hostile
from pages import page_of

from layerfold.report import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=3000",
    "--dump-dom",
)


@pytest.fixture
def open_page(tmp_path):
    """Return a function that opens a file and gives the document after loading and the console's lines."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    def open_page(path):
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]

    return open_page


@pytest.mark.parametrize(("kind", "drawings"), [("study", 2), ("recovered", 4), ("drop", 2), ("plan", 1)])
def test_hostile_pages_run_nothing_and_report_no_error(kind, drawings, open_page, tmp_path):
    write_page(hostile(kind), tmp_path / "report.html")
    document, console = open_page(tmp_path / "report.html")
    assert console == []
    assert f"<title>layerfold: {'pocket' if kind == 'recovered' else '&lt;script&gt;'}" in document
    assert document.count("<svg") == drawings
    assert ('<h2 id="recovery">' in document) == (kind == "recovered")
    assert "</html>" in document


def test_the_policy_stops_a_script_that_slipped_through(open_page, tmp_path):
    path, page = tmp_path / "report.html", page_of(made.make_results())
    path.write_text(page.replace("</main>", "<script>document.title='x'</script></main>"), encoding="utf-8")
    document, console = open_page(path)
    assert "<title>layerfold: pocket</title>" in document
    assert any("Content Security Policy" in line for line in console)


def test_the_check_sees_what_it_looks_for(open_page, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text(
        "<!doctype html><title>before</title><script>document.title='x'; throw new Error('seen')</script>",
        encoding="utf-8",
    )
    document, console = open_page(path)
    assert "<title>x</title>" in document
    assert any("seen" in line for line in console)
