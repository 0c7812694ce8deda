"""lm-evaluation-harness for many plans in one pass: each request is computed once, and
answered for every plan.

The harness builds the requests, encodes and cuts them, filters the answers and makes
the metrics. Plans share their first sublayers, and requests that begin alike their
tokens. Needs the extra `eval`.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of_json
from ..errors import UsageError, raised_by, shortened
from ..files import Settings
from ..measuring.statistics import (
    JACKKNIFED,
    are_right_or_wrong,
    jackknife_error,
    mean_and_error,
    recovery_interval,
    sign_flip_p_value,
    student_p_value,
    too_few,
)
from ..models.load_errors import quiet
from ..models.mix import origin
from ..plan import Plan, several
from ..progress import Progress, Stages, silent
from ..results.facts import Recovery, TaskScore
from ..results.ledger import Ledger, working_in
from ..results.repairs import AnswersRecord, Said
from ..running.generating import as_asked, greedily, greedy_each, reporting
from ..running.skipping import skip
from ..structure.model_structure import inputs_device
from ..structure.undoing import Undo
from .scoring import BatchSize, Request, Scorer, unless_out_of_memory

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import mean
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    from .tasks import Job, in_empty_folder, no_bars
except ModuleNotFoundError as error:
    raise UsageError(
        f"benchmarks need {error.name}; pip install 'notall[eval]'"
    ) from None

if TYPE_CHECKING:
    from .ray_workers import Workers

A = TypeVar("A")
LM_EVAL_VERSION = version("lm_eval")
CHUNK = 1024  # requests whose tokens are in memory together
OWN = 32  # prompts that the original model answers at once
CHATS = ("chat", "first_choices")  # our own kinds of requests
# What a document calls the text that others ask about, too: questions on one passage
# are no independent items.
PASSAGES = (
    "passage",
    "flores_passage",
    "paragraph",
    "article",
    "context",
    "story",
    "source_id",
)


@dataclass(frozen=True)
class Sample:
    """What one plan made of one document: its value of the metric, and the answers to
    its requests.
    """

    task: str
    doc_id: int
    value: Any
    answers: tuple[
        Any, ...
        # (log-likelihood in nats, whether it is the greedy one), a log-likelihood, or a
        # text
    ]
    source: str = ""  # the passage that it is about, or all of it


@dataclass(frozen=True)
class TaskResult:
    """One plan on one task by one metric, beside the original model on the same
    documents.
    """

    number: int  # of the plan, in the order given
    plan: Plan
    score: TaskScore
    samples: tuple[Sample, ...]  # one a document


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[Plan],
    jobs: Sequence[Job],
    *,
    batch_size: BatchSize = "auto",
    folder: Path | None = None,
    truncate: bool = False,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Evaluate each of `plans` on each of `jobs`, which `TaskShelf.build` makes: task
    by task, plan by plan.

    Answers are kept in `folder`, so that a run that was killed goes on. Requests longer
    than the model's context raise `UsageError` before anything is computed, or lose
    tokens on the left, as in the harness, with `truncate`. Raises `UsageError` for a
    plan that does not fit, a full disk, a folder that another process works in.
    """
    with working_in(folder, "eval"):
        lm = PlansLM(
            model,
            tokenizer,
            plans,
            folder,
            batch_size=batch_size,
            truncate=truncate,
            progress=progress,
        )
        for job in jobs:
            lm.check(job)
        steps = [job.steps(len(lm.answers.distinct)) for job in jobs]
        stages = Stages(progress, sum(steps))
        told = [*map(stages.stage, steps)]
        return [
            result
            for job, lm.progress in zip(jobs, told)
            for result in evaluate_job(lm, job)
        ]


def evaluate_job(lm: "PlansLM", job: Job) -> list[TaskResult]:
    """All plans of `lm` on one task; the first evaluation computes what is missing for
    all of them.
    """
    outcomes = []
    place = in_empty_folder() if job.is_stock else nullcontext()
    named = raised_by("lm_eval", f"cannot score {job.name}", "check its data")
    with quiet(), no_bars(), place, named:
        for number in range(len(lm.plans)):
            lm.number, lm.task = number, job.name
            outcomes.append(
                evaluate(lm, job.loaded, limit=job.limit, bootstrap_iters=1000)
            )  # where there is no mean
    dense, *others = outcomes
    return [
        TaskResult(number, lm.plans[number + 1], score, samples)
        for row in job.reported().items()
        for number, outcome in enumerate(others)
        for score, samples in _scores(job, *row, outcome, dense)
    ]


class Answers:
    """Answers of `plans`, by number, to requests, by key; a file of them may hold other
    origins' and plans' too.
    """

    def __init__(self, folder: Path | None, origin: str, plans: Sequence[Plan]) -> None:
        self.origin = origin
        self.names = [digest_of_json(plan.identity)[:24] for plan in plans]
        self.distinct = [
            number
            for number, name in enumerate(self.names)
            if name not in self.names[:number]
        ]
        self._known: dict[tuple[str, str], Said] = {}  # by request and plan
        # absolute, since tasks of the harness run in another working folder
        self._ledger = Ledger(folder.absolute(), AnswersRecord) if folder else None
        for record in self._ledger or ():
            self._note(record.plans, record.answers)

    def key(self, *request: object) -> str:
        return digest_of_json([self.origin, *request])[:24]

    def get(self, key: str, number: int, form: type[A]) -> A:
        """Raises `UsageError` where the file has something of another form."""
        answer = self._known[key, self.names[number]]
        if not isinstance(answer, form):
            where = (
                self._ledger.path if self._ledger is not None else "what was answered"
            )
            told = f"{where} has {shortened(repr(answer))} where an answer should be"
            raise UsageError(f"{told}; delete the file, and ask again")
        return answer

    def place(self, number: int) -> int:
        """Of a plan among those that differ, from 1; of equal ones that of the
        first.
        """
        return 1 + self.distinct.index(self.names.index(self.names[number]))

    def has(self, key: str, number: int) -> bool:
        return (key, self.names[number]) in self._known

    def lacking(self, keys: Iterable[str]) -> dict[tuple[int, ...], list[str]]:
        """The distinct keys whose answers are not all there, by the plans that lack
        them: of equal ones, the first.
        """
        found: dict[tuple[int, ...], list[str]] = {}
        for key in dict.fromkeys(keys):
            if numbers := tuple(
                number for number in self.distinct if not self.has(key, number)
            ):
                found.setdefault(numbers, []).append(key)
        return found

    def add(
        self, numbers: Sequence[int], answers: Mapping[str, Sequence[Said]]
    ) -> None:
        """Keep, by key, the answers of the plans `numbers`; they are in the file when
        this returns.
        """
        names = tuple(self.names[number] for number in numbers)
        if self._ledger is not None:
            self._ledger.add(
                AnswersRecord(
                    plans=names,
                    answers={key: tuple(said) for key, said in answers.items()},
                )
            )
        self._note(names, answers)

    def _note(
        self, names: Sequence[str], answers: Mapping[str, Sequence[Said]]
    ) -> None:
        for key, values in answers.items():
            self._known |= {(key, name): said for name, said in zip(names, values)}


class PlansLM(HFLM):
    """The harness's `HFLM`, which computes a request for the original and all plans,
    and answers as one of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plans: Sequence[Plan],
        folder: Path | None = None,
        *,
        batch_size: BatchSize = "auto",
        truncate: bool = False,
        progress: Progress = silent,
        workers: "Workers | None" = None,
    ) -> None:
        with quiet():  # batches are cut here, not in HFLM
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=CHUNK
            )
        self._device = inputs_device(
            self.model
        )  # HFLM takes the first weight's, which may be elsewhere
        self.plans = (Plan(), *plans)  # the dense one is first
        self.scorer = Scorer(model, batch_size)
        self.score = (
            partial(workers.score_requests, batch_size=batch_size)
            if workers
            else self.scorer.score
        )
        self.answers = Answers(folder, origin(model, tokenizer), self.plans)
        self.truncate, self.progress = truncate, progress
        self.number, self.task = (
            0,
            "",
        )  # the plan to answer as, and of which task, for people
        self.running: tuple[
            int, ...
        ] = ()  # the plans that what is being computed is for
        self.before = self.of = (
            0  # requests answered before what is being computed, of how many
        )

    def check(self, job: Job) -> None:
        """Raise `UsageError` where the model's context is too short for a request of
        `job`.
        """
        self.task = job.name
        requests = [
            request for task in job.tasks.values() for request in task.instances
        ]
        texts = [
            "".join(request.args)
            for request in requests
            if request.request_type == "loglikelihood"
        ]
        self._check_fit(
            [len(self.tok_encode(text)) for text in texts], self.max_length + 1
        )  # the last is predicted
        self._room_to_generate(
            [
                request
                for request in requests
                if request.request_type == "generate_until"
            ]
        )
        self._room_to_generate(
            self._as_chat(
                [request for request in requests if request.request_type in CHATS]
            )
        )

    def _as_chat(self, requests: Iterable[Instance]) -> list[Instance]:
        """With prompts as what a user says."""
        parts = [(request, *request.args) for request in requests]
        return [
            replace(one, arguments=(as_asked(self.tokenizer, prompt), how))
            for one, prompt, how in parts
        ]

    def chat(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[str, str]]:
        """What the plan says to a user, greedy, and what the original model says."""
        asked = self._as_chat(requests)
        with greedily(self.model):
            with Undo() as undo, undo.put(vars(self), "number", 0):
                undo.put(vars(self), "progress", silent)  # which would begin anew
                dense = self._written("chat", asked)
            return list(zip(self._written("chat", asked), dense))

    def first_choices(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The share, 0 to 1, of the tokens of the original model's own greedy answer
        that are the first choice.
        """
        asked = self._as_chat(requests)
        keys = [self.answers.key("first_choices", *request.args) for request in asked]
        for chunk in self._missing(keys, asked, OWN):
            prompts = [self.tok_encode(request.args[0]) for request in chunk]
            stages, new = (
                Stages(self.progress, self.of),
                chunk[0].args[1]["max_gen_toks"],
            )
            stages.stage(self.before)  # which is done
            telling = reporting(
                stages.stage(len(chunk)), f"{self.task}: answering", new
            )
            with skip(self.model, Plan()):
                said = greedy_each(self.model, prompts, new, **telling)
            answers = [
                Request((*prompt, *answer[:-1]), tuple(answer))
                for prompt, answer in zip(prompts, said)
            ]
            for scores in self.score(
                [self.plans[number] for number in self.running], answers
            ):
                lengths = [
                    len(answers[number].continuation) for number in scores.requests
                ]
                shares = (1 - scores.missed / Tensor(lengths)).T.tolist()
                found = [
                    self.answers.key("first_choices", *chunk[number].args)
                    for number in scores.requests
                ]
                self.answers.add(self.running, dict(zip(found, shares)))
        return [self.answers.get(key, self.number, float) for key in keys]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        keys = [
            self.answers.key("loglikelihood", *request.args) for request in requests
        ]
        for chunk in self._missing(keys, requests, CHUNK):
            super().loglikelihood(chunk, disable_tqdm=True)
        return [self.answers.get(key, self.number, tuple) for key in keys]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        keys = [
            self.answers.key("loglikelihood_rolling", *request.args)
            for request in requests
        ]
        for (request,) in self._missing(keys, requests, 1):
            (totals,) = super().loglikelihood_rolling([request], disable_tqdm=True)
            key = self.answers.key("loglikelihood_rolling", *request.args)
            self.answers.add(
                self.running, {key: np.broadcast_to(totals, len(self.running)).tolist()}
            )
        return [self.answers.get(key, self.number, float) for key in keys]

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[str]:
        return self._written("generate_until", requests)

    def _written(self, kind: str, requests: list[Instance]) -> list[str]:
        """What the plan writes, by the settings that the model has now; it is kept as
        of this kind of request.
        """
        asked: Counter[str] = (
            Counter()
            # the same request asked again (a task that samples) has another key each
            # time
        )
        keys = []
        for request in requests:
            key = self.answers.key(kind, *request.args)
            asked[key] += 1
            keys.append(key if asked[key] == 1 else f"{key}-{asked[key]}")
        waiting = [
            (key, request)
            for key, request in zip(keys, requests)
            if not self.answers.has(key, self.number)
        ]
        width, generate = (
            self._room_to_generate([request for _, request in waiting]),
            super().generate_until,
        )
        place = self.answers.place(self.number)
        with skip(self.model, self.plans[self.number]):
            while waiting:
                self._report(
                    place * len(keys) - len(waiting),
                    len(keys) * len(self.answers.distinct),
                )
                chunk = waiting[
                    : self.scorer.fitting(width, len(waiting), written=True)
                ]
                texts = unless_out_of_memory(
                    partial(
                        generate, [request for _, request in chunk], disable_tqdm=True
                    )
                )
                if texts is None:
                    self.scorer.shrink(len(chunk), width)
                    continue
                self.answers.add(
                    [self.number], {key: [text] for (key, _), text in zip(chunk, texts)}
                )
                waiting = waiting[len(chunk) :]
        self._report(place * len(keys), len(keys) * len(self.answers.distinct))
        return [self.answers.get(key, self.number, str) for key in keys]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        *_: object,
        **__: object,
    ) -> list[tuple[Any, Any]]:
        """For (strings, context, continuation) each: log-likelihood and greediness,
        arrays over the plans `running`.
        """
        cut = [
            self._cut(context, continuation) for _, context, continuation in requests
        ]
        found: dict[int, tuple[Any, Any]] = {}
        for scores in self.score([self.plans[number] for number in self.running], cut):
            values, greedy = (
                scores.log_likelihoods.T.numpy(),
                scores.greedy.T.numpy(),
            )  # (requests, plans)
            found |= dict(zip(scores.requests, zip(values, greedy)))
            lines = {
                self.answers.key("loglikelihood", *strings): list(
                    zip(*map(np.ndarray.tolist, found[number]))
                )
                for number in scores.requests
                if (strings := requests[number][0])
            }
            if lines:
                self.answers.add(self.running, lines)
                self._report(self.before + len(found), self.of)
        return [found[number] for number in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> Request:
        """What the model reads, cut on the left as HFLM cuts it."""
        if not 0 < len(continuation) <= self.max_length:
            told = f"an answer of {self.task} has {several(len(continuation), 'token')}"
            raise UsageError(
                f"{told}, and the model takes 1 to {self.max_length}; leave the task"
                " out, or mend it"
            )
        return Request(
            tuple((context + continuation)[-(self.max_length + 1) :][:-1]),
            tuple(continuation),
        )

    def _missing(
        self, keys: list[str], requests: list[Instance], size: int
    ) -> Iterator[list[Instance]]:
        """The requests that some plans lack, each once, `size` at a time; `running` is
        then set to those plans.
        """
        by_key = dict(zip(keys, requests))
        lacking = self.answers.lacking(by_key)
        done = len(by_key) - sum(map(len, lacking.values()))
        self.of = len(by_key)
        for self.running, names in lacking.items():
            for start in range(0, len(names), size):
                chunk = names[start : start + size]
                self._report(done, self.of)
                self.before = done
                yield [by_key[name] for name in chunk]
                done += len(chunk)
        self._report(done, self.of)

    def _room_to_generate(self, requests: list[Instance]) -> int:
        """The most tokens that a prompt and what is generated from it take."""
        widths = [0]
        for request in requests:
            prompt, options = request.args
            new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                told = (
                    f"{self.task} generates {new} tokens, but the model's context is"
                    f" {self.max_length}"
                )
                raise UsageError(f"{told}; leave it out")
            widths.append(len(self.tok_encode(prompt)) + new)
        self._check_fit(widths, self.max_length)
        return min(max(widths), self.max_length)

    def _check_fit(self, lengths: Sequence[int], most: int) -> None:
        too_long = sum(length > most for length in lengths)
        if too_long and not self.truncate:
            requests = several(too_long, "request")
            told = (
                f"the model's context of {self.max_length} tokens is too short for"
                f" {requests} of {self.task}"
            )
            fix = "show fewer examples, or have them cut on the left with truncate"
            raise UsageError(f"{told} (up to {max(lengths)}); {fix}")

    def _report(self, done: int, total: int) -> None:
        self.progress(done, total, f"{self.task}: answering")


def _scores(
    job: Job, row: str, leaves: list[str], outcome: Settings, dense: Settings
) -> Iterator[tuple[TaskScore, tuple[Sample, ...]]]:
    """A score for each metric to report of a row, which is a task or a group of tasks,
    and what it is made of.
    """
    figures = outcome["results"][row]
    for metric, value in figures.items():
        name, _, kind = metric.partition(",")
        if not kind or name.endswith("_stderr") or job.metric not in (None, metric):
            continue
        samples, base = (
            _samples(outcome, leaves, metric),
            _samples(dense, leaves, metric),
        )
        delta = float(value - dense["results"][row][metric])
        value_se = figures.get(f"{name}_stderr,{kind}")
        better = outcome["higher_is_better"].get(row, {}).get(name)
        score = TaskScore(
            task=row,
            metric=metric,
            num_fewshot=outcome["n-shot"][
                leaves[0]
            ],  # a group of groups has none of its own
            documents=len(samples),
            value=float(value),
            value_se=float(value_se) if isinstance(value_se, int | float) else math.nan,
            delta=delta,
            higher_is_better=better,
            **_beside(job, samples, base, name, delta, better),
        )
        yield score, samples


def _beside(
    job: Job,
    samples: Sequence[Sample],
    base: Sequence[Sample],
    name: str,
    delta: float,
    better: bool | None,
) -> Settings:
    """What a score says next to the original model's: paired by item, items of one
    passage together.
    """
    sources = _sources(samples)
    passages = len(set(sources)) if sources else len(samples)
    found: Settings = {"sources": sources, "too_few": too_few(passages, len(samples))}
    values, theirs = ([sample.value for sample in some] for some in (samples, base))
    are_numbers = all(isinstance(value, int | float) for value in (*values, *theirs))
    differences = (
        [ours - other for ours, other in zip(values, theirs)] if are_numbers else []
    )
    mean_of_them, error = (
        mean_and_error(differences, sources) if are_numbers else (math.nan, math.nan)
    )
    if math.isclose(mean_of_them, delta, abs_tol=1e-9):
        found |= {"delta_se": error, "p_value": sign_flip_p_value(differences, sources)}
        if are_right_or_wrong(values, theirs):  # what is wrong already gets no worse
            right = {
                source
                for source, value in zip(sources or range(len(theirs)), theirs)
                if value
            }
            found["too_few"] = too_few(len(right), len(samples))
    else:
        error, parts = _error_without(job, samples, base, name)
        found |= {
            "delta_se": error,
            "p_value": student_p_value(delta, error, parts - 1),
        }
    if are_numbers:
        found["values"] = tuple(map(float, values))
        kept = recovery_interval(values, theirs, sources) if better else None
        found["recovery"] = kept and Recovery.of(kept, len(samples))
    return found


def _sources(samples: Sequence[Sample]) -> tuple[int, ...] | None:
    """Of each sample the number of its passage, in the order of the first; None where
    each has its own.
    """
    keys = [(sample.task, sample.source) for sample in samples]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(map(numbers.__getitem__, keys)) if len(numbers) < len(keys) else None


def _samples(outcome: Settings, leaves: list[str], metric: str) -> tuple[Sample, ...]:
    name, _, kind = metric.partition(",")
    return tuple(
        Sample(
            leaf,
            sample["doc_id"],
            sample[name],
            tuple(answer for answer, *_ in sample["resps"]),
            _source_of(sample["doc"]),
        )
        for leaf in leaves
        for sample in outcome["samples"][leaf]
        if sample["filter"] == kind and name in sample
    )


def _source_of(document: object) -> str:
    """What two items must share to be of one passage: its text, or where there is none
    the whole document.
    """
    fields = document if isinstance(document, dict) else {}
    return next(
        (str(fields[name]) for name in PASSAGES if fields.get(name)), repr(document)
    )


def _error_without(
    job: Job, samples: Sequence[Sample], base: Sequence[Sample], name: str
) -> tuple[float, int]:
    """The standard error of a difference that is no mean of its items', and of how many
    parts it is.

    By leaving out passages; of a group it is that of the plain mean over its tasks.
    """
    errors, parts = [], 0
    for task in dict.fromkeys(sample.task for sample in samples):
        by_source: dict[str, list[tuple[Any, Any]]] = {}
        for ours, theirs in zip(samples, base):
            if ours.task == task:
                by_source.setdefault(ours.source, []).append((ours.value, theirs.value))
        aggregate = job.tasks[task].aggregation().get(name, mean)

        def difference(
            passages: Sequence[list[tuple[Any, Any]]], aggregate: Any = aggregate
        ) -> float:
            ours, theirs = zip(*chain.from_iterable(passages))
            return aggregate(list(ours)) - aggregate(list(theirs))

        errors.append(jackknife_error(difference, [*by_source.values()]))
        parts += min(JACKKNIFED, len(by_source))
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors), parts
