"""Run the paper's evaluation: its grid on benchmarks and by the clock, and its Fig. 1."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...options import PAPER_GRID, GridOptions, option
from ...progress import Progress, Stages, silent
from ...results.ledger import Ledger, working_in
from ...results.provenance import Provenance
from ..benchmarks import (
    BenchmarkRecord,
    DiagnosticsRecord,
    benchmark,
    checking_steps,
    diagnose,
)
from ..options.tasks import Diagnostics, TaskChoice
from ..similarity import SimilarityRecord, similarities
from ..subject import Subject
from .claims import claims_of
from .records import ClaimRecord, TimesRecord
from .scoreboard import Scoreboard
from .timing import TimingGrid, time_grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PaperOptions:
    """What the benchmarks are run on, and what else is measured."""

    PANEL: ClassVar[str] = "Benchmarks"

    generate_all: bool = option(
        False,
        "run generating tasks everywhere, not only at the largest fraction",
        ("--generate-all",),
    )
    diagnostics: Diagnostics = False


@dataclass(frozen=True)
class PaperResults:
    """All that the evaluation measured, and what holds of the paper's claims."""

    similarity: Sequence[SimilarityRecord]
    benchmarks: Sequence[BenchmarkRecord]
    times: Sequence[TimesRecord]
    checks: Sequence[DiagnosticsRecord]
    claims: Sequence[ClaimRecord]

    @property
    def provenance(self) -> Provenance:
        """Where the figures come from: the model, the dtype, the machine."""
        records = (*self.similarity, *self.times, *self.benchmarks)
        return next(one.provenance for one in records if one.provenance)


def run_paper(
    subject: Subject,
    tasks: TaskChoice,
    timing: TimingGrid = TimingGrid(),
    grid: GridOptions = PAPER_GRID,
    *,
    windows: "Sequence[Tensor]" = (),
    generate_all: bool = False,
    progress: Progress = silent,
) -> PaperResults:
    """Benchmarks and times of the paper's grid and, on the subject's text, its Fig. 1;
    and what holds of its claims.

    Goes on from what the folder holds. Tasks that generate text are run on dense and
    the largest fraction only, unless `generate_all`; `windows` are those of the
    diagnostics. Raises as `benchmark` and `time_grid`, before it computes.
    """
    from ...choosing.criteria.data_free import paper_grid

    for workload in timing.workloads:
        workload.check(subject.model)
    rows = paper_grid(subject.structure, grid)
    progress(0, 1, "reading the tasks")
    most = max(row.fraction for row in rows)
    generating = None
    if not generate_all:
        generating = [row for row in rows if row.fraction in (0.0, most)]
    # progress counts tokens that the model runs; `benchmark` adds its own, which are
    # known once the tasks are read
    timed = sum(workload.steps for workload in timing.workloads) * len(rows)
    checking = checking_steps(windows, len(rows)) if windows else 0
    stages = Stages(progress, subject.tokens + checking + timed)
    benchmarks = benchmark(subject, rows, tasks, generating, stages) if tasks else []
    with working_in(subject.out, "paper"):
        similarity = similarities(
            subject, subject.provenance, stages.stage(subject.tokens)
        )
    checks = []
    if windows:
        _, *skipping = rows  # the original model comes first, and is in each check
        checks = diagnose(subject, skipping, windows, stages.stage(checking))
    times = time_grid(subject, rows, timing, progress=stages.stage(timed))
    claims = claims_of(similarity, Scoreboard(benchmarks), times)
    found = PaperResults(similarity, benchmarks, times, checks, claims)
    return replace(found, claims=_recorded(claims, subject.out, found.provenance))


def _recorded(
    claims: Sequence[ClaimRecord], out: Path, about: Provenance
) -> list[ClaimRecord]:
    """The claims with their provenance; in `out` they replace earlier ones."""
    claims = [claim.model_copy(update={"provenance": about}) for claim in claims]
    with working_in(out, "paper"):
        (out / ClaimRecord.file).unlink(missing_ok=True)
        if claims:
            Ledger(out, ClaimRecord).add(*claims)
    return claims
