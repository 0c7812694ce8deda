"""The harness's tasks: which ones the paper's leaderboard holds, finding others, and
building their requests once.
"""

import difflib
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from ..errors import UsageError, nearest, shortened
from ..extras import installed
from ..files import refuse_endless
from ..models.load_errors import quiet
from ..progress import generation_work, reading
from ..results.facts import NamedTasks
from .checks import (
    CHOOSING,
    GROUPS,
    GYM,
    ITEMS,
    SEED,
    check_names,
    generators,
    is_check,
    made,
)
from .limits import stock_name

LETTERS_PER_TOKEN = 4  # of a token, about
HARNESS = ("lm_eval", "lm-eval", "datasets")  # the names of its loggers


@dataclass(frozen=True)
class Benchmark:
    """A task of the leaderboard, with its number of examples and the metric it ranks
    by.
    """

    task: str
    num_fewshot: int
    metric: str  # as the harness names it: metric,filter


# Open LLM Leaderboard v1, which the paper evaluates on.
OPENLLM = (
    Benchmark("arc_challenge", 25, "acc_norm,none"),
    Benchmark("hellaswag", 10, "acc_norm,none"),
    Benchmark("mmlu", 5, "acc,none"),
    Benchmark("truthfulqa_mc2", 0, "acc,none"),
    Benchmark("winogrande", 5, "acc,none"),
    Benchmark("gsm8k", 5, "exact_match,strict-match"),
)


@dataclass(frozen=True)
class Job:
    """What one task name stands for: the harness's tasks, their requests built, and the
    metric to report (or all).
    """

    name: str
    loaded: Any  # a TaskDict of the harness
    metric: str | None
    limit: int | None
    is_stock: bool = (
        False  # whether it is the harness's own, whose data and metrics are on the hub
    )

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the harness, by name: one, or those of a group."""
        return self.loaded["tasks"]

    def steps(self, plans: int) -> float:
        """What it takes `plans`, about, in tokens that are read: what they only read,
        they read together.
        """
        found = 0.0
        for request in chain.from_iterable(
            task.instances for task in self.tasks.values()
        ):
            read = (
                sum(len(part) for part in request.args if isinstance(part, str))
                / LETTERS_PER_TOKEN
            )
            options = [part for part in request.args if isinstance(part, dict)]
            new = sum(normalize_gen_kwargs(part)["max_gen_toks"] for part in options)
            if (
                request.request_type == "first_choices"
            ):  # the original's own answer, which all plans read
                found += generation_work(new) + reading(read + new, plans)
            elif options:
                found += plans * reading(read) + generation_work(new, plans)
            else:
                found += reading(read, plans)
        return found

    def reported(self) -> dict[str, list[str]]:
        """The rows to report, with the tasks that each is made of: a group that has a
        mean is one row.
        """
        group: Group | None = self.loaded["groups"].get(self.name)
        if group and group.has_aggregation:
            return {self.name: list(self.tasks)}
        return {name: [name] for name in self.tasks}


class TaskShelf:
    """The tasks that the harness knows, with those of the folder `task_path`, whose
    names come first.
    """

    def __init__(self, task_path: str | Path | None = None) -> None:
        give = "give a folder with the harness's YAML files"
        self.folder = Path(task_path).resolve() if task_path else None
        if task_path and not Path(task_path).is_dir():
            raise UsageError(f"no task folder {task_path}: {give}")
        files = [*Path(task_path).rglob("*")] if task_path else []
        for file in files:
            refuse_endless(file)  # the harness reads what it finds
        if task_path and not any(file.suffix == ".yaml" for file in files):
            raise UsageError(f"{shortened(task_path)} holds no task: {give}")
        if self.folder:
            self._check_names()

    def _check_names(self) -> None:
        try:
            "".join(self.manager.all_tasks)
        except TypeError:
            raise UsageError(
                f"a task in {shortened(self.folder)} has a name that is not text: give"
                " it a name"
            ) from None

    @cached_property
    def manager(self) -> TaskManager:
        """The harness's index of tasks, read where it is needed: that takes ten seconds
        of CPU time.
        """
        with quiet(*HARNESS):
            return TaskManager(include_path=str(self.folder) if self.folder else None)

    def _index(self, names: Sequence[str]) -> Mapping[str, Any]:
        """Tasks by name, where `names` may be others than checks."""
        return (
            self.manager.task_index
            if self.folder or not all(map(is_check, names))
            else {}
        )

    @classmethod
    def of(cls, tasks: "TaskShelf | str | Path | None") -> "TaskShelf":
        """`tasks` itself, or the shelf of a folder: the harness's own are read once."""
        return tasks if isinstance(tasks, TaskShelf) else cls(tasks)

    def names(self, wanted: Sequence[str]) -> list[str]:
        """Each of `wanted` once, `openllm` spelled out, a local_ one first. Raises
        `UsageError` for an unknown name.
        """
        found: list[str] = []
        groups = {"openllm": tuple(one.task for one in OPENLLM), **GROUPS}
        for name in wanted:
            found += groups.get(name, (name,))
        known = self._index(found)
        found = [
            f"local_{name}" if f"local_{name}" in known else name for name in found
        ]
        for name in [
            name for name in found if name not in known and not is_check(name)
        ]:
            names = dict.fromkeys([*groups, *check_names(), *self.manager.all_tasks])
            near = difflib.get_close_matches(name, names, 3)
            hint = (
                f"did you mean {', '.join(near)}?"
                if near
                else "`notall tasks` lists them"
            )
            raise UsageError(f"the harness has no task {shortened(name)!r}; {hint}")
        if not found:
            raise UsageError(
                "no task is named; give openllm, or names of the harness's tasks"
            )
        return list(dict.fromkeys(found))

    def listed(self, word: str = "") -> list[NamedTasks]:
        """Each name that holds `word`, or all of openllm. Raises `UsageError` where
        there is none.
        """
        shots = {benchmark.task: benchmark.num_fewshot for benchmark in OPENLLM}
        kinds = {
            name: str(self.manager.task_index[name].kind.name).lower()
            for name in self.manager.all_tasks
        }
        gym = generators() if installed("reasoning_gym") else []
        own = [*check_names(), *(f"{GYM}{generator}" for generator in gym)]
        kinds = (
            dict.fromkeys(("openllm", *GROUPS), "group")
            | dict.fromkeys(own, "check")
            | kinds
        )
        kinds = {name: kind.removeprefix("py_") for name, kind in kinds.items()}
        found = [name for name in kinds if word.lower() in name.lower()]
        if word == "openllm":
            found = ["openllm", *filter(kinds.__contains__, shots)]
        if not found:
            near = nearest(word, [*kinds])
            raise UsageError(
                f"no task's name holds {shortened(word)!r}{near}: give a shorter word,"
                " or none"
            )
        found.sort(
            key=lambda name: not name.lower().startswith(word.lower())
        )  # these are more likely meant
        return [
            NamedTasks(
                task=name, kind=kinds[name], num_fewshot=shots.get(stock_name(name))
            )
            for name in found
        ]

    def build(
        self,
        name: str,
        num_fewshot: int | None = None,
        limit: int | None = None,
        choosing: bool = False,
    ) -> Job:
        """Load a task's data and build its requests, with the leaderboard's number of
        examples unless one is given.

        A check has other items for `choosing` than for judging what was chosen.
        Raises `UsageError` when the data can't be had, or is not what the task says.
        """
        if num_fewshot is not None and num_fewshot < 0:
            raise UsageError(f"{num_fewshot} examples cannot be shown; give 0 or more")
        benchmark = next((b for b in OPENLLM if b.task == stock_name(name)), None)
        if num_fewshot is None and benchmark:
            num_fewshot = benchmark.num_fewshot
        random.seed(
            DEFAULT_RANDOM_SEED
        )  # as the harness does: some tasks draw their documents or choices
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        is_stock = not is_check(name) and self._is_stock(name)
        with (
            quiet(*HARNESS),
            no_bars(),
            in_empty_folder() if is_stock else nullcontext(),
        ):
            try:
                seed = CHOOSING if choosing else SEED
                if is_check(name):
                    loaded = TaskManager(include_defaults=False).load(
                        [made(name, limit or ITEMS, seed)]
                    )
                else:
                    loaded = self.manager.load([name])
                for task in loaded["tasks"].values():
                    _build_requests(task, num_fewshot, limit)
            except (
                Exception
            ) as error:  # whatever a task's own code and data, and the hub, may raise
                raise UsageError(_complaint(name, error)) from error
        return Job(
            name, loaded, benchmark.metric if benchmark else None, limit, is_stock
        )

    def _is_stock(self, name: str) -> bool:
        """Whether a task is the harness's own, and not one of the user's folder."""
        file = getattr(self.manager.task_index.get(name), "yaml_path", None)
        return not (
            self.folder and file and Path(file).resolve().is_relative_to(self.folder)
        )


def _build_requests(task: Task, num_fewshot: int | None, limit: int | None) -> None:
    """Once, as the harness's `simple_evaluate` has them; a new evaluation finds them
    without answers.
    """
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", num_fewshot or 0)
    elif (
        task.get_config("num_fewshot") != 0 and num_fewshot is not None
    ):  # a task's own 0 is meant
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.build_all_requests(limit=limit)

    def renew(**_: object) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = renew


@contextmanager
def in_empty_folder() -> Iterator[None]:
    """Inside, the working folder is an empty one.

    datasets and evaluate take a folder there for the hub's of that name, and evaluate
    runs the code that it holds.
    """
    before = os.getcwd()
    with TemporaryDirectory(prefix="notall-") as empty:
        os.chdir(empty)
        try:
            yield
        finally:
            os.chdir(before)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars of the harness and datasets, which would hide ours, and without
    counts of reads on the hub.
    """
    hidden, bar = datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda things, **_: things
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        lm_eval.api.task.tqdm, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = bar, counted
        if not hidden:
            datasets.enable_progress_bars()


def _complaint(name: str, error: Exception) -> str:
    cause = error.__cause__ or error  # datasets wraps what its reader said
    reason = str(cause).strip() or type(cause).__name__
    if re.search(
        "Couldn't reach|OfflineMode|Connection ?Error|Max retries|offline mode",
        reason,
        re.I,
    ):
        fix = (
            "a folder of tasks on files of your own (docs/evaluating.md, Benchmarks"
            " without a network)"
        )
        return (
            f"cannot read the data of {name}: the hub is out of reach. Give --task-path"
            f" DIR, {fix}"
        )
    problem = f"cannot build the requests of {name}: {shortened(reason, 160)}"
    return f"{problem}; check its data (a network, or its files), examples and limit"
