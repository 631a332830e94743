"""Layer 6: report a comparison as a page, as tables for a paper, and as JSON."""

from childtuning.report.joining import joined
from childtuning.report.page import html_page
from childtuning.report.reading import read_recorded
from childtuning.report.tables import json_content, latex_tables, markdown_tables

__all__ = ["html_page", "joined", "json_content", "latex_tables", "markdown_tables", "read_recorded"]
