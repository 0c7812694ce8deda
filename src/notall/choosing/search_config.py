"""How a plan is looked for: when the search ends, and what judges what it finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ..results.provenance import Provenance
    from .recovering import Recovering


@dataclass(frozen=True)
class SearchConfig:
    """How `choose_plan` looks for a plan, and what judges it.

    The search ends after `max_minutes` by the clock, or after `patience` evaluations
    that brought nothing. `seed` is for criteria that draw. `states_bytes` is the most
    memory for hidden states that evaluations share.

    With `after_repair` sets are judged by the KL that a cheap repair leaves on half of
    the text, to which it was not fitted. With `recovering` the plan is the one that
    keeps enough. The windows `held_out`, token ids of (batch, tokens) each, measure the
    plan in the end. `provenance` says what else the evaluations in a folder depend on,
    such as the model's name: a search with another one does not resume there.

    Raises `UsageError` for a time that is none.
    """

    max_minutes: float | None = None
    patience: int = 12
    seed: int = 0
    states_bytes: int = 2 * 2**30
    after_repair: bool = False
    recovering: Recovering | None = None
    held_out: Sequence[Tensor] = ()
    provenance: Provenance | Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        if self.max_minutes is not None and not self.max_minutes >= 0:
            raise UsageError(
                f"the search cannot end after {self.max_minutes} minutes by the clock:"
                " give 0 or more"
            )

    def deadline_from(self, now: float) -> float:
        """When a search that begins `now`, in seconds of any clock, has to end."""
        return math.inf if self.max_minutes is None else now + 60 * self.max_minutes
