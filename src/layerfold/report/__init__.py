"""What a study, a search or a plan shows: tables in the terminal and in files, and one self-contained HTML page."""

from layerfold.report.page import write_html
from layerfold.report.plan_page import write_plan_html
from layerfold.report.plan_spreadsheet import write_plan_csv
from layerfold.report.plan_terminal import print_plan
from layerfold.report.search_page import write_search_html, write_windows_html
from layerfold.report.search_spreadsheet import (
    check_parquet,
    write_search_csv,
    write_search_parquet,
    write_windows_csv,
)
from layerfold.report.search_terminal import print_search, print_windows
from layerfold.report.spreadsheet import write_csv
from layerfold.report.terminal import print_table

__all__ = [
    "check_parquet",
    "print_plan",
    "print_search",
    "print_table",
    "print_windows",
    "write_csv",
    "write_html",
    "write_plan_csv",
    "write_plan_html",
    "write_search_csv",
    "write_search_html",
    "write_search_parquet",
    "write_windows_csv",
    "write_windows_html",
]
