"""Which commands have a part of a page, and in which order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..experiments.bench import BenchRecord
from ..experiments.benchmarks import BenchmarkRecord, DiagnosticsRecord
from ..experiments.compare.records import ComparisonRecord
from ..experiments.draft import DraftRecord
from ..experiments.paper.records import ClaimRecord, TimesRecord
from ..experiments.pareto.records import ParetoRecord
from ..experiments.search.records import SearchRecord
from ..experiments.similarity import SimilarityRecord
from ..experiments.slim.records import SlimRecord
from ..experiments.sweep import SweepRecord
from ..results.record import Record
from ..results.repairs import HealRecord, MeasuredRecord, RefitRecord
from . import bench, comparison, draft, measured, paper, pareto, search, sweep
from .folder import Folder, read_folder
from .parts import PageParts


@dataclass(frozen=True)
class Verb:
    """What a command adds to the page of a folder that holds one of these kinds."""

    page_parts: Callable[[Folder], PageParts]
    kinds: tuple[type[Record], ...]

    def is_in(self, folder: Folder) -> bool:
        """Whether the folder holds a record of the command."""
        return any(kind in folder for kind in self.kinds)


PAPER_KINDS = (ClaimRecord, BenchmarkRecord, DiagnosticsRecord, TimesRecord)
# In the order of a page; the first of each group that is in the folder.
VERBS: tuple[tuple[Verb, ...], ...] = (
    (
        Verb(sweep.page_parts, (SweepRecord,)),
        Verb(paper.page_parts, PAPER_KINDS),
        Verb(sweep.page_parts, (SimilarityRecord,)),
    ),
    (Verb(comparison.page_parts, (ComparisonRecord,)),),
    (Verb(search.page_parts, (SearchRecord,)),),
    (Verb(bench.page_parts, (BenchRecord,)),),
    (
        Verb(measured.page_parts_of_repair, (RefitRecord, HealRecord)),
        Verb(measured.page_parts, (MeasuredRecord,)),
    ),
    (Verb(pareto.page_parts, (ParetoRecord,)),),
    (Verb(draft.page_parts, (DraftRecord,)),),
    # the page is that of the searches in its folder
    (Verb(lambda _: PageParts(), (SlimRecord,)),),
)


def parts_of(folder: Folder) -> list[PageParts]:
    """The parts of a page, of each command that the folder holds records of.

    The first one opens on what a search in the folder found, as in `plan.search`;
    without a search of that name, on the repair of a plan, as in `plan.repaired`.
    """
    present = ([verb for verb in group if verb.is_in(folder)] for group in VERBS)
    found = [verbs[0].page_parts(folder) for verbs in present if verbs]
    found = found or [PageParts()]
    for chosen in _chosen_in(folder.path):
        # the page opens on the step that was chosen; its sections come behind the first
        first, *others = found
        opened = replace(
            first,
            message=chosen.message,
            steps=(*first.steps, *chosen.steps),
            first=len(first.steps) + chosen.first,
        )
        found = [opened, chosen, *others]
    return found


def _chosen_in(path: Path) -> Iterator[PageParts]:
    """The searches and the repairs in folders of this one."""
    for file in sorted(path.glob(f"*.search/{SearchRecord.file}")):
        yield search.page_parts(read_folder(file.parent))
    for file in sorted(path.glob(f"*.repaired/{MeasuredRecord.file}")):
        if not file.parent.with_suffix(".search").is_dir():  # whose page has the repair
            yield measured.page_parts_of_repair(read_folder(file.parent))
