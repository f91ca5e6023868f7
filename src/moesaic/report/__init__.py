"""A comparison for readers: tables for the terminal, Markdown and CSV, and one self-contained HTML page."""

from moesaic.report.page import html
from moesaic.report.text import csv, markdown, rich_table

__all__ = ["csv", "html", "markdown", "rich_table"]
