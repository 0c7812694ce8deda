"""The version of the package, which nothing is needed to read."""

__version__ = "0.1.0"
