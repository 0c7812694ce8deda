"""Where a model stands after the paper's evaluation: on its claims, on the benchmarks and by the clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..records.claims import LEAST_DOCUMENTS
from ..records.columns import Row
from ..records.record import VARIANTS
from .folder import Folder
from .sentences import joined
from .verdict import MOST_NATS

Configured = tuple[str, float, bool]  # variant, fraction, whether the last layer is kept
BECAME = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "within error": ("lies within error", "lie within error"),
    "too few": ("is open, on too few documents or rounds", "are open, on too few documents or rounds"),
}


@dataclass(frozen=True)
class Standing:
    """Of each configuration: the change of its average on the benchmarks with its error, its times, its nats lost.

    `tasks` is over how many benchmarks the average is; a share of 0 to 1, as its error. `documents` is how many the one
    of them with the fewest has. `nats` come from the battery.
    """

    tasks: int
    documents: int
    averages: Mapping[Configured, tuple[float, float]]
    times: Mapping[Configured, Row]
    nats: Mapping[Configured, float]

    @property
    def headline(self) -> Configured | None:
        """The fastest that is usable, as far as that is known; else the paper's own, the most attentions."""
        usable = [key for key in self.nats if self.usable(key) and key in self.times]
        if usable:
            return max(usable, key=lambda key: (self.times[key]["speedup_decode"], -self.nats[key]))
        known = [key for key in (*self.averages, *self.times) if key[0] == "attention"]
        return max(known, key=lambda key: (key[1], not key[2]), default=None)

    def usable(self, key: Configured) -> bool | None:
        """Whether perplexity has at most doubled, where the battery tells."""
        return self.nats[key] <= MOST_NATS if key in self.nats else None

    @property
    def few(self) -> bool:
        """Whether there are fewer documents than a verdict is given on."""
        return self.documents < LEAST_DOCUMENTS

    def told(self, key: Configured) -> str:
        """What a configuration comes to, in words."""
        return joined([*self._parts(key)])

    def _parts(self, key: Configured) -> Iterator[str]:
        if key in self.times:
            yield f"it decodes {self.times[key]['speedup_decode']:.2f}× as fast"
        if key in self.averages:
            change, error = self.averages[key]
            benchmarks = f"the average of {self.tasks} benchmarks" if self.tasks > 1 else "the one benchmark"
            few = f", from too few documents to say ({self.documents} a task)" if self.few else ""
            yield f"{benchmarks} changes by {100 * change:+.1f} ± {100 * error:.1f} points{few}"
        if key in self.nats:
            usable = "" if self.usable(key) else ": it is no longer usable"
            yield f"long texts take {self.nats[key]:+.2f} nats a token{usable}"


def standing_of(folder: Folder) -> Standing:
    """From the tables of a folder of `notall paper`."""
    shared = _shared(folder.others.get("benchmarks", ()))
    return Standing(
        tasks=len({(row["task"], row["metric"]) for row in shared}),
        documents=min((row["documents"] for row in shared), default=LEAST_DOCUMENTS),
        averages=_averages(shared),
        times=_times(folder.others.get("times", ())),
        nats=_nats(folder.others.get("battery", ())),
    )


def claims_in_words(claims: Sequence[Row], model: str) -> str:
    """How many of the claims hold on a model, and what became of the others."""
    return f"of the paper's {len(claims)} claims {became_of(claims)} on {model}"


def became_of(claims: Sequence[Row]) -> str:
    """Such as `5 hold, 2 do not hold and 8 lie within error`."""
    counts = Counter(row["verdict"] for row in claims)
    order = sorted(counts, key=[*BECAME, *counts].index)
    return joined(
        [f"{counts[verdict]} {BECAME.get(verdict, (verdict,) * 2)[counts[verdict] > 1]}" for verdict in order]
    )


def in_words(key: Configured) -> str:
    """A configuration, such as `the deepest 33% of its attentions`."""
    variant, fraction, keep_last = key
    return f"the deepest {fraction:.0%} of its {VARIANTS[variant]}s" + (" (the last layer kept)" if keep_last else "")


def _key(row: Row) -> Configured:
    return row["variant"], row["fraction"], row["keep_last"]


def _shared(benchmarks: Sequence[Row]) -> list[Row]:
    """Rows of those tasks that are shares and that every configuration has."""
    everything = {_key(row) for row in benchmarks}
    by_task: dict[tuple[str, str], list[Row]] = {}
    for row in benchmarks:
        if row["value"] is not None and row["delta"] is not None and 0 <= row["value"] <= 1:
            by_task.setdefault((row["task"], row["metric"]), []).append(row)
    return [row for rows in by_task.values() if {_key(row) for row in rows} == everything for row in rows]


def _averages(rows: Sequence[Row]) -> dict[Configured, tuple[float, float]]:
    found: dict[Configured, list[Row]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row)
    return {
        key: (
            math.fsum(row["delta"] for row in given) / len(given),
            math.sqrt(math.fsum((row["delta_se"] or 0) ** 2 for row in given)) / len(given),
        )
        for key, given in found.items()
    }


def _times(rows: Sequence[Row]) -> dict[Configured, Row]:
    """At the longest prompt and the smallest batch, as the claims are judged."""
    longest = max((row["prompt_tokens"] for row in rows), default=0)
    asked = [row for row in rows if row["prompt_tokens"] == longest]
    smallest = min((row["batch_size"] for row in asked), default=0)
    return {_key(row): row for row in asked if row["batch_size"] == smallest and row["variant"] != "dense"}


def _nats(battery: Sequence[Row]) -> dict[Configured, float]:
    """The mean of what is lost at each depth of a long text."""
    found: dict[Configured, list[float]] = {}
    for row in battery:
        if row["check"].startswith("NLL at"):
            found.setdefault(_key(row), []).append(math.inf if row["delta"] is None else row["delta"])
    return {key: sum(lost) / len(lost) for key, lost in found.items()}
