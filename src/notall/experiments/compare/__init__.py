"""Importance criteria compared on held-out text."""
