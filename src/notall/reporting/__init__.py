"""A results folder as one page that people can look at: figures, tables, examples, and where they come from."""

from .page import write_report

__all__ = ["write_report"]
