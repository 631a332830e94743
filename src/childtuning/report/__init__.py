"""Layer 5: what a comparison found: a page to read, tables for a paper, and JSON."""

from childtuning.report.joining import joined
from childtuning.report.page import html_page
from childtuning.report.reading import read_recorded
from childtuning.report.tables import json_content, latex_tables, markdown_tables

__all__ = ["html_page", "joined", "json_content", "latex_tables", "markdown_tables", "read_recorded"]
