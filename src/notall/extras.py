"""What an extra of the package brings, and the refusal where it is absent."""

from importlib.util import find_spec

from .errors import UsageError

FIGURES = ("altair", "vl_convert")
# Which extra brings a module that not every command needs.
EXTRAS = dict.fromkeys((*FIGURES, "jinja2"), "report")
EXTRAS |= {"lm_eval": "eval", "reasoning_gym": "reasoning"}


def installed(*modules: str) -> bool:
    """Whether all of these modules can be imported; none of them is."""
    return all(find_spec(module) for module in modules)


def need(*modules: str) -> None:
    """Raise `UsageError` unless all of these are installed: before any work is done
    that would be lost.
    """
    for module in modules:
        if not installed(module):
            raise UsageError(
                f"this needs {module}: pip install 'notall[{EXTRAS[module]}]'"
            )
