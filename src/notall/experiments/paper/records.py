"""What is recorded of the paper's evaluation."""

import math
from typing import Literal

from pydantic import Field

from ...plan import Plan
from ...results.facts import GRID, Compared, Configured, Footprint, Times
from ...results.record import Count, Number, Record, Unsigned

# the variant, the fraction, and whether the last layer is kept
Configuration = tuple[str, float, bool]
DENSE: Configuration = ("dense", 0.0, False)
DENSE_ROW = Configured(variant="dense", fraction=0.0, keep_last=False, plan=Plan())
ClaimVerdict = Literal["holds", "does not hold", "inconclusive", "too few"]


class TimesRecord(
    Record, Configured, kind="times", key=("prompt_tokens", "asked_concurrency", *GRID)
):
    """One configuration at one prompt length and number of sequences at once."""

    prompt_tokens: Count
    concurrency: Count = Field(description="sequences at once, as many as memory held")
    asked_concurrency: Count
    times: Times
    footprint: Footprint


class ClaimRecord(Record, kind="claim", key=("claim",)):
    """A claim of arXiv 2407.15516, the figures that bear on it here, and what they say
    of it.
    """

    claim: str
    here: str = Field(description="the figures of this model")
    verdict: ClaimVerdict = Field(
        description=(
            "too few: documents, rounds or windows, below the least for a verdict"
        )
    )
    figure: Number = Field(
        math.nan,
        description=(
            "what is judged: a difference, a correlation, how many times as fast"
        ),
    )
    error: Unsigned = Field(math.nan, description="its standard error")
    low: Number = Field(math.nan, description="the lower end of its 95 % interval")
    high: Number = Field(math.nan, description="the upper end")
    threshold: Number = Field(math.nan, description="above which the claim holds")
    unit: str | None = Field(None, description="of these")


class Average(Compared, Configured):
    """The average of a configuration over tasks, with its difference to the original
    model's."""

    tasks: Count = Field(description="over how many")
