"""Choose a plan to meet a budget, and measure what was chosen."""

from .records import SearchRecord as SearchRecord
