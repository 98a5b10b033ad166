"""What a study, a search or a plan shows: each gives a report, which the terminal, the page and the CSV file print."""

from layerfold.report.page import write_page
from layerfold.report.plan import plan_report
from layerfold.report.search import drop_report, window_report
from layerfold.report.spreadsheet import write_csv
from layerfold.report.study import study_report
from layerfold.report.terminal import print_report

__all__ = ["drop_report", "plan_report", "print_report", "study_report", "window_report", "write_csv", "write_page"]
