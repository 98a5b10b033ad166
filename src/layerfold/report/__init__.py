"""What a study shows: a table in the terminal, a CSV file and one self-contained HTML page."""

from layerfold.report.page import write_html
from layerfold.report.spreadsheet import write_csv
from layerfold.report.terminal import print_table

__all__ = ["print_table", "write_csv", "write_html"]
