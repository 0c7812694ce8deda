"""The file of a plan, and the plans that come with the package."""

import json
from pathlib import Path

from ..errors import UsageError, nearest, shortened
from ..files import contents, write_whole, writing
from ..strict_json import DoubledKey, Settings, read_json
from .layers import IN_BOTH

MOST_BYTES = 1 << 20  # of a plan file
# The plans of docs/results.md, which `published:NAME` names.
PUBLISHED = Path(__file__).parents[1] / "published"
PUBLISHED_AS = "published:"


def write_fields(path: Path, fields: Settings) -> None:
    """Write the fields of a plan, a line each. Raises `UsageError` where that fails."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()
    ]
    with writing(f"the plan to {shortened(path)}", "choose another path"):
        write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_fields(path: Path) -> Settings:
    """The fields of a plan, from its file or as `published:NAME`.

    Raises `UsageError` for a file that is missing, too large, truncated, or no plan.
    """
    where = shortened(path)
    content = _read(_published(path) or path, where)
    try:
        fields = read_json(content.decode("utf-8-sig"))
    except DoubledKey as error:
        raise UsageError(
            f"{where} is no plan: it says {shortened(error)} twice; merge the two"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{where} is no plan: not valid JSON ({shortened(error)}); write it again"
        ) from None
    known = {"attention", "mlp", "prefill"}
    if not isinstance(fields, dict) or not known & fields.keys():
        expected = '{"attention": [...], "mlp": [...]}'
        raise UsageError(f"{where} is no plan: expected {expected}; {IN_BOTH}")
    return fields


def _published(path: Path) -> Path | None:
    """The file of `published:NAME`; None for another path."""
    if not str(path).startswith(PUBLISHED_AS):
        return None
    name = str(path).removeprefix(PUBLISHED_AS)
    known = [one.stem for one in PUBLISHED.glob("*.json")]
    if name not in known:
        raise UsageError(
            f"no published plan {shortened(name)}{nearest(name, known)}; see"
            " docs/plans.md"
        )
    return PUBLISHED / f"{name}.json"


def _read(path: Path, where: str) -> bytes:
    try:
        return contents(path, MOST_BYTES)
    except UsageError as error:
        raise UsageError(f"{where} is no plan: {error}") from None
    except IsADirectoryError:
        raise UsageError(
            f"{where} is a folder: notall.RepairedPlan.load reads a plan with weights"
        ) from None
    except OSError as error:
        raise UsageError(
            f"cannot read the plan {where}: {error.strerror}; `notall plan` writes one"
        ) from None
