"""When a training goes back and on at a lower rate, as KL has risen."""

from dataclasses import dataclass

# times the KL that it is compared with: of the default model's trainings none rose by
# more than 1.04 on held-out text at any look
HELD_OUT_RISE = 1.1
BATCH_RISE = 1.5
SLOWING = 0.25  # of the rate, each time
MOST_RETURNS = 3  # times that it goes back: then it ends


@dataclass
class Brake:
    """How often the rate was cut, and the KL of a batch above which held-out text is
    looked at out of turn.

    The KL of a batch costs nothing, as its loss is computed; that of held-out text
    decides.
    """

    count: int = 0
    usual: float | None = None  # the KL that was no cause to look, at most

    @property
    def factor(self) -> float:
        """What the rate is multiplied by."""
        return SLOWING**self.count

    @property
    def is_over(self) -> bool:
        """Whether no lower rate is left to try."""
        return self.count >= MOST_RETURNS

    def alarms(self, batch: float, first: float) -> bool:
        """Whether the KL of a `batch` is far above those so far, and the `first` of
        held-out text.
        """
        if self.usual is None:
            self.usual = max(first, batch)
        if batch <= BATCH_RISE * self.usual:
            return False
        self.usual = batch  # a false alarm is given once
        return True

    def slows(self, found: float, best: float) -> bool:
        """Whether the KL `found` on held-out text is far above the `best`; the rate is
        lower then.
        """
        # a NaN has risen too
        if found <= HELD_OUT_RISE * best:
            return False
        self.count += 1
        self.usual = None
        return True
