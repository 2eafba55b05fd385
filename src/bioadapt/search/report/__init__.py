"""A study as one HTML page."""

from .page import as_record, render, write_report

__all__ = ["as_record", "render", "write_report"]
