"""A configuration of the paper's grid: what is skipped, and how much of it."""

from typing import Literal

from pydantic import Field

from ...plan import KIND_NAMES
from ..record import Skips
from ..table import Column, number, words

# what tells the configurations apart
GRID = ("variant", "fraction", "keep_last")


class Configured(Skips):
    """A row of the paper's grid."""

    variant: Literal["dense", "attention", "mlp", "block"] = Field(
        description="what is skipped"
    )
    fraction: float = Field(
        ge=0, le=1, description="share of the layers that was asked for, 0 to 1"
    )
    keep_last: bool = Field(description="whether the last layer is preserved")

    @property
    def configuration(self) -> tuple[str, float, bool]:
        """(variant, fraction, keep_last), which no other row of the grid has."""
        return self.variant, self.fraction, self.keep_last

    def describes(self, other: "Configured") -> bool:
        """Whether the other is of this row, and of the plan that the row stands for in
        this model.
        """
        return (
            self.configuration == other.configuration
            and self.plan.indices == other.plan.indices
        )

    @property
    def name(self) -> str:
        """Such as `attention 10%, last layer kept`."""
        if self.variant == "dense":
            return "dense"
        return (
            f"{KIND_NAMES[self.variant]}"
            f" {self.fraction:.0%}{', last layer kept' if self.keep_last else ''}"
        )


CONFIGURED: tuple[Column[Configured], ...] = (
    words("skipped", lambda row: KIND_NAMES[row.variant]),
    number("fraction", lambda row: row.fraction, ".0%", right=False),
    words("last layer", lambda row: "kept" if row.keep_last else ""),
)
