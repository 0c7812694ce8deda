"""Facts that add up."""

from typing_extensions import Self

from ..record import Fact


class Added(Fact):
    """A fact of which two make a third: numbers are added, and tuples joined."""

    def __add__(self, other: Self) -> Self:
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in type(self).model_fields
        }
        return type(self)(**sums)
