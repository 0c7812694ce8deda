"""What an extra brings, asked for before any work is done that would be lost without it."""

from importlib.util import find_spec

from .errors import UsageError

# Which extra brings a module that not every command needs.
EXTRAS = {
    "altair": "report",
    "vl_convert": "report",
    "jinja2": "report",
    "lm_eval": "eval",
    "scipy": "solver",
    "reasoning_gym": "reasoning",
}
FIGURES = ("altair", "vl_convert")


def installed(*modules: str) -> bool:
    return all(find_spec(module) for module in modules)


def need(*modules: str) -> None:
    """Raise `UsageError` unless all of these are installed."""
    for module in modules:
        if not installed(module):
            raise UsageError(f"this needs {module}: pip install 'notall[{EXTRAS[module]}]'")
