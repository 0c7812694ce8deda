"""The plans of a comparison, each in a file."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...digests import digest_of
from .records import ComparisonRecord


def file_name(words: str) -> str:
    """A digest distinguishes names that differ in what no file name may hold, or are
    too long.
    """
    short = re.sub(r"[^\w.+*-]", "-", words)[:80]
    return f"{short}-{digest_of([words])[:8]}"


def plan_file(folder: Path, record: ComparisonRecord) -> Path:
    """Where the plan of a row is, in the folder of its comparison."""
    return folder / "plans" / f"{file_name('-'.join(map(str, record.run)))}.json"


def save_plans(records: Sequence[ComparisonRecord], out: Path) -> None:
    """Write each plan into `out/plans`, with the model it is of and what chose it."""
    (out / "plans").mkdir(exist_ok=True)
    for record in records:
        about = {
            "fingerprint": record.what.get("fingerprint"),
            "note": record.chosen_by,
        }
        record.plan.model_copy(update=about).save(plan_file(out, record))
