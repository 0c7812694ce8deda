"""One command from a model to checkpoints that keep what was asked for: the steps of
`search`, `bench` and `export`, in turn.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from ...errors import UsageError
from ...exporters import check_absent, check_export, export, target_named
from ...exporters.manifest import read_manifest
from ...options import Workload, option
from ...plan import Plan
from ...progress import Progress
from ...results.ledger import Ledger, read_records, working_in
from ...results.provenance import Provenance, this_run
from ...results.repairs import MeasuredRecord
from .. import bench as benching
from ..bench import BenchRecord
from ..folder import check_folder
from ..next_commands import LITTLE_NATS, as_step, next_command, what_next
from ..options.model import ModelOptions
from ..options.plan import read_plan
from ..options.text import HeldOutOptions
from ..recovery import JudgedRecord, RecoveryOptions
from ..repair import RepairOptions
from ..search.one_phase import READS
from ..search.options import BudgetOptions, ObjectiveOptions, SpaceOptions
from ..search.records import SearchRecord
from ..search.run import Search
from ..verdict import Verdict, share_skipped
from .forecast import announce
from .records import SlimRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..options.tasks import TaskChoice

logger = logging.getLogger(__name__)
R = TypeVar("R", SearchRecord, MeasuredRecord, JudgedRecord)
PLAN, MODEL = "plan", "model"  # how the files of a set begin, and its checkpoint
PROMPT = "The capital of France is"
USUAL_TEXT = HeldOutOptions(sequences=8, length=512, batch_size=2)  # of a search
USUAL_TIMES = Workload(generation_tokens=32)  # of `bench`


@dataclass(frozen=True)
class SlimOptions:
    """In which form the model is written, and how long sets are looked for."""

    PANEL: ClassVar[str] = "Result"

    to: str | None = option(
        None,
        "form of the export, as in `notall export` (default: hf, of a .gguf file gguf)",
        metavar="FORM",
    )
    max_minutes: float | None = option(
        None,
        "minutes by the clock to look for at most; loading, writing the mix, timing and"
        " measuring take more",
    )


class Slimmed(NamedTuple):
    """A set that was found: what it gains, what is kept, and where its checkpoint is,
    if it was exported.
    """

    name: str
    plan: Plan
    of_prompt: bool  # whether the prompt alone skips it
    share: float  # of the layers' parameters, which is skipped
    timed: BenchRecord | None
    scores: Sequence[JudgedRecord]
    verdict: Verdict
    folder: Path | None


@dataclass(frozen=True)
class Slim:
    """All that is asked for: a search by recovery, with its repair; what is timed, and
    the form of the export. Everything lies in `out`.
    """

    search: Search
    workload: Workload
    to: str
    out: Path

    @classmethod
    def of(
        cls,
        model: ModelOptions,
        space: SpaceOptions,
        text: HeldOutOptions,
        tasks: RecoveryOptions,
        repair: RepairOptions,
        workload: Workload,
        how: SlimOptions,
        out: Path,
        seed: int = 0,
    ) -> Slim:
        """Of options as the verbs take them."""
        by = ObjectiveOptions(max_minutes=how.max_minutes)
        file, budget = out / f"{PLAN}.json", BudgetOptions()
        search = Search(
            model, space, text, budget, Workload(), by, repair, tasks, file, seed
        )
        to = how.to or ("gguf" if model.model.endswith(".gguf") else "hf")
        return cls(search, workload, to, out)

    @property
    def model(self) -> ModelOptions:
        """The model, and how it is loaded."""
        return self.search.model

    def run(self, progress: Progress) -> list[Slimmed]:
        """Search, repair, time and export, unless that is done already.

        Raises `UsageError` for whatever is wrong that can be known beforehand, before
        anything long, and as the steps do.
        """
        asked, tasks, empty = self.checked()
        with working_in(self.out, "slim"):
            about = asked.about
            held = Ledger(self.out, SlimRecord, about)
            if len(held):
                logger.info("going on in %s", self.out)
                *_, last = held
                found = last.found
            else:
                announce(asked.search, self.workload, tasks, progress)
                found = asked.find(progress)
                held.add(SlimRecord(found=found, provenance=about))
            times = asked.time(found, progress)
            return [
                asked.export(asked.judged(name, times.get(name), empty), progress)
                for name in found
            ]

    def checked(self) -> tuple[Slim, TaskChoice, PreTrainedModel]:
        """The same with a phase that the model and the export have; the tasks, and the
        model without weights. Raises `UsageError` as `run` does.
        """
        check_folder(self.out, "slim")
        if self.search.tasks.recovery is None:
            raise UsageError("give --recovery a share such as 0.95")
        self.search.check()
        target_named(self.to)
        tasks = self.search.tasks.check()
        empty = self.model.empty()
        self.workload.check(empty)
        if not read_records(self.out / SlimRecord.file, SlimRecord):
            for name in (MODEL, f"{MODEL}-prefill"):
                check_absent(self.out / name)
        space = self.search.space
        if space.phase != "prefill":
            self._try(space, empty)
        if space.phase != "all":
            try:
                self._try(replace(space, phase="prefill"), empty)
            except UsageError as error:
                if space.phase:
                    raise
                logger.info("note: for every token alone: %s", error)
                space = replace(space, phase="all")
        return replace(self, search=replace(self.search, space=space)), tasks, empty

    def _try(self, space: SpaceOptions, empty: PreTrainedModel) -> None:
        """Raise `UsageError` where a set amid the model cannot be chosen, or not be
        exported.
        """
        among = space.of(empty)
        allowed = [
            frozenset(one) for one in among.units if among.allows(frozenset(one))
        ]
        if allowed:
            plan = among.plan(allowed[len(allowed) // 2])
            check_export(self.model.source, plan, self.to, self.out / "of-one-unit")

    @property
    def about(self) -> Provenance:
        """What decides the sets that are found: another run in the same folder asks for
        the same.
        """
        from ...models.identity import identify

        asked, model = self.search, self.model
        given = [model, asked.space, asked.text, asked.tasks, asked.repair, asked.by]
        settings = {
            name: value
            for options in given
            for name, value in asdict(options).items()  # type: ignore[call-overload]
        }
        what = json.loads(json.dumps(settings | {"seed": asked.seed}, default=str))
        what |= {"to": self.to, **identify(model.model, revision=model.revision)}
        return Provenance(what=what, where=this_run())

    def find(self, progress: Progress) -> tuple[str, ...]:
        """Search, and repair what was found; the plans, by the names of their files."""
        asked = self.search
        given = [
            (asked.model, ModelOptions()),
            (asked.space, SpaceOptions()),
            (asked.text, USUAL_TEXT),
            (asked.tasks, RecoveryOptions()),
            (asked.repair, RepairOptions()),
            (asked.by, ObjectiveOptions()),
        ]
        more = {"seed": asked.seed or None, "out": asked.out}
        with as_step("search", self.model.model, given=given, **more):
            return tuple(one.out.stem for one in asked.run(progress))

    def time(self, found: Sequence[str], progress: Progress) -> dict[str, BenchRecord]:
        """The times of each plan that skips something, as `bench` takes them, or took
        them before.
        """
        from ...structure.locating import locate

        net: PreTrainedModel | None = None
        times: dict[str, BenchRecord] = {}
        for name in found:
            plan, folder = read_plan(self._made(name)), self.out / f"{name}.bench"
            if not plan:
                continue
            before = [
                one
                for one in read_records(folder / BenchRecord.file, BenchRecord)
                if one.plan.indices == plan.indices
                and all(
                    getattr(one, key) == n for key, n in vars(self.workload).items()
                )
            ]
            if before:
                times[name] = before[-1]
                continue
            given = [(self.model, ModelOptions()), (self.workload, USUAL_TIMES)]
            more = {"seed": self.search.seed or None, "out": folder}
            made = self._made(name)
            with as_step("bench", self.model.model, given=given, plan=made, **more):
                net = net or self.model.load()[0]
                about = self.model.provenance(
                    net, dummy_weights=False, fingerprint=locate(net).fingerprint
                )
                times[name] = benching.bench(
                    net,
                    plan,
                    self.workload,
                    about,
                    out=folder,
                    seed=self.search.seed,
                    progress=progress,
                )
        return times

    def judged(
        self, name: str, timed: BenchRecord | None, empty: PreTrainedModel
    ) -> Slimmed:
        """What is known of a set that was found."""
        from ...structure.locating import locate

        asked, folder = self.search, self.out / f"{name}.search"
        plan = read_plan(self._made(name))

        def of_plan(kind: type[R]) -> list[R]:
            return [
                one
                for one in read_records(folder / kind.file, kind)
                if one.plan.indices == plan.indices
            ]

        *_, chosen = of_plan(SearchRecord)
        measured = [one for one in of_plan(MeasuredRecord) if one.model == plan.state]
        scores = [one for one in of_plan(JudgedRecord) if one.model == plan.state]
        quality, text = chosen.quality, asked.text.text
        if measured:
            quality, text = measured[-1].quality, measured[-1].text
        verdict = Verdict.on(empty, plan, quality, text, spec=self.model.model)
        speedup = None
        if timed and timed.skipped:
            times = timed.skipped.times
            speedup = times.speedup_prefill if plan.prefill else times.speedup_decode
        verdict = replace(
            verdict,
            speedup=speedup,
            verb=READS if plan.prefill else "decodes",
            missed=chosen.missed,
            late=not chosen.in_time,
        ).judged(scores, asked.tasks.recovery)
        share = share_skipped(locate(empty), plan)
        of_prompt = asked.of_prompt or name != PLAN
        return Slimmed(name, plan, of_prompt, share, timed, scores, verdict, None)

    def export(self, one: Slimmed, progress: Progress) -> Slimmed:
        """The set with its checkpoint, compared with the plan in memory, if it is of
        use; else with the command to type next.
        """
        made, spec = self._made(one.name), self.model.model
        is_written = bool(one.plan and one.verdict.usable)
        if not one.plan:
            phase, file = "prefill" if one.of_prompt else None, f"{one.name}.json"
            following = next_command(
                "search", spec, phase=phase, max_nll=LITTLE_NATS, out=file
            )
        elif is_written:
            following = next_command("generate", spec, PROMPT, plan=made)
        else:
            _, following = what_next(one.verdict, spec, made)
        one = one._replace(verdict=replace(one.verdict, next=following))
        if not is_written:
            return one
        folder = self.out / one.name.replace(PLAN, MODEL, 1)
        if folder.exists():
            self._check_written(folder, one.plan)
            return one._replace(folder=folder)
        given = [(self.model, ModelOptions())]
        more = {"to": self.to, "out": folder}
        with as_step("export", self.model.model, given=given, plan=made, **more):
            export(
                self.model.source,
                one.plan,
                self.to,
                folder,
                command=str(this_run()["command"]),
                progress=progress,
            )
        return one._replace(folder=folder)

    def _check_written(self, folder: Path, plan: Plan) -> None:
        """Raise `UsageError` unless a folder is an export of this plan."""
        written = read_manifest(folder)
        plan_written = {
            key: value for key, value in written["plan"].items() if key != "note"
        }
        weights = written.get("repair", {}).get("weights")
        if (plan_written, weights) != (plan.indices, plan.digest):
            check_absent(folder)

    def _made(self, name: str) -> Path:
        """The plan to take: repaired, if it is."""
        repaired = self.out / f"{name}.repaired"
        return repaired if repaired.is_dir() else self.out / f"{name}.json"
