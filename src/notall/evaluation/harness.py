"""lm-evaluation-harness for many plans in one pass: each request is computed once, and answered for every plan.

The harness builds the requests, filters the answers and makes the metrics. `PlansLM` is its own `HFLM`, so encoding
and truncation are its own too, with what runs the model replaced: all plans share their first sublayers, and requests
that begin alike share their tokens. Needs the extra `eval`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, raised_by
from ..measuring.statistics import jackknife_error, mcnemar, mean_and_error, normal_p_value
from ..models.load_errors import quiet
from ..progress import Progress, silent
from ..records.ledger import working_in
from ..records.plan import Plan
from ..running.skipping import skip
from .answers import Answers
from .scoring import Request, Scorer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import mean
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    from .tasks import Job, Limits, TaskShelf, no_bars
except ModuleNotFoundError as error:
    raise UsageError(f"benchmarks need {error.name}; pip install 'notall[eval]'") from None

if TYPE_CHECKING:
    from .ray_workers import SpreadScorer, Workers

LM_EVAL_VERSION = version("lm_eval")
CHUNK = 1024  # requests whose tokens are in memory together
BOOTSTRAP_ROUNDS = 1000  # for the errors of metrics that are no means


@dataclass(frozen=True)
class Document:
    """What one plan made of one document: its value of the metric, and the answers to its requests.

    An answer is (log-likelihood in nats, whether it is the greedy one), a log-likelihood, or a text.
    """

    task: str
    doc_id: int
    value: Any
    answers: tuple[Any, ...]


@dataclass(frozen=True)
class TaskResult:
    """One plan on one task by one metric, beside the dense model on the same documents.

    `value` and `stderr` are the harness's own (nan where it has none); `delta` is value less dense value, with its
    standard error over paired documents, and `p_value` is of no difference: McNemar's exact test where the metric is
    right or wrong, else by the normal distribution. `metric` is the harness's metric,filter.
    """

    task: str
    metric: str
    number: int  # of the plan, in the order given
    plan: Plan
    num_fewshot: int
    value: float
    stderr: float
    delta: float
    delta_stderr: float
    p_value: float
    higher_is_better: bool | None
    documents: tuple[Document, ...]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[Plan],
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | Limits | None = None,
    task_path: str | Path | TaskShelf | None = None,
    batch_size: int | Literal["auto"] = "auto",
    folder: Path | None = None,
    truncate: bool = False,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Evaluate each of `plans` on each of `tasks` (names of the harness, or `openllm`): task by task, plan by plan.

    The tasks of the leaderboard come with its number of examples and its metric, others with what they say, unless
    `num_fewshot` is given. `limit` is in documents a task, or by task. Answers are kept in `folder`, so that a run that
    was killed goes on. Requests longer than the model's context raise `UsageError` before anything is computed, or
    lose tokens on the left, as in the harness, with `truncate`.

    Raises `UsageError` for an unknown task, data that can't be read, a plan that does not fit, a full disk, a
    folder that another process works in.
    """
    limits = limit if isinstance(limit, Limits) else Limits(limit)
    jobs = TaskShelf.of(task_path).jobs(tasks, num_fewshot, limits)
    how: dict[str, Any] = {"batch_size": batch_size, "folder": folder, "truncate": truncate, "progress": progress}
    return run_jobs(model, tokenizer, plans, jobs, **how)


def run_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[Plan],
    jobs: Sequence[Job],
    *,
    batch_size: int | Literal["auto"] = "auto",
    folder: Path | None = None,
    truncate: bool = False,
    progress: Progress = silent,
) -> list[TaskResult]:
    """`run_tasks` of tasks whose requests are built. All of them are checked before any is computed."""
    with working_in(folder, "eval") if folder else nullcontext():
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
        return [result for job in jobs for result in evaluate_job(lm, job)]


def evaluate_job(lm: PlansLM, job: Job) -> list[TaskResult]:
    """All plans of `lm` on one task; the first evaluation computes what is missing for all of them."""
    outcomes = []
    with quiet(), no_bars():
        for number in range(len(lm.plans)):
            lm.answer_as(number, job.name)
            with raised_by("lm_eval", f"cannot score {job.name}", "check its data"):
                outcomes.append(evaluate(lm, job.loaded, limit=job.limit, bootstrap_iters=BOOTSTRAP_ROUNDS))
    return [
        result
        for row, leaves in job.reported().items()
        for number, outcome in enumerate(outcomes[1:], 1)
        for result in _results(job, row, leaves, number - 1, lm.plans[number], outcome, outcomes[0])
    ]


class PlansLM(HFLM):
    """The harness's `HFLM`, which computes a request for the dense model and all plans, and answers as one of them.

    `plans` are the dense plan, then the given ones. Leaves the tokenizer it is given as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plans: Sequence[Plan],
        folder: Path | None = None,
        *,
        batch_size: int | Literal["auto"] = "auto",
        truncate: bool = False,
        progress: Progress = silent,
        workers: Workers | None = None,
    ) -> None:
        with quiet():  # batches are cut here, not in HFLM
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=CHUNK)
        self.plans = (Plan(), *plans)
        self.scorer: Scorer | SpreadScorer = Scorer(model, batch_size)
        if workers:
            self.scorer = workers.scorer(self.scorer)
        self.answers = Answers(folder, origin(model, tokenizer), self.plans)
        self.truncate, self.progress = truncate, progress
        self.number, self.task = 0, ""
        self.running: tuple[int, ...] = ()  # the plans that what is being computed is for
        self.before = self.of = 0  # requests answered before what is being computed, of how many

    def answer_as(self, number: int, task: str) -> None:
        """From now on answer as the plan `number`; `task` is for whoever watches the progress."""
        self.number, self.task = number, task

    def check(self, job: Job) -> None:
        """Raise `UsageError` where the model's context is too short for a request of `job`."""
        self.answer_as(0, job.name)
        asked: dict[str, list[Instance]] = {"loglikelihood": [], "generate_until": []}
        for task in job.tasks.values():
            for request in task.instances:
                asked.setdefault(request.request_type, []).append(request)
        lengths = [len(self.tok_encode("".join(request.args))) for request in asked["loglikelihood"]]
        self._check_fit(lengths, self.max_length + 1)
        self._room_to_generate(asked["generate_until"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        keys = [self.answers.key("loglikelihood", *request.args) for request in requests]
        lacking = {name for names in self.answers.lacking(keys).values() for name in names}
        texts = ["".join(request.args) for key, request in zip(keys, requests) if key in lacking]
        self._check_fit([len(self.tok_encode(text)) for text in texts], self.max_length + 1)
        for chunk in self._missing(keys, requests, CHUNK):
            super().loglikelihood(chunk, disable_tqdm=True)
        return [self.answers.get(key, self.number, tuple) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        keys = [self.answers.key("loglikelihood_rolling", *request.args) for request in requests]
        for chunk in self._missing(keys, requests, 1):
            (totals,) = super().loglikelihood_rolling(chunk, disable_tqdm=True)
            key = self.answers.key("loglikelihood_rolling", *chunk[0].args)
            self.answers.add(self.running, {key: np.broadcast_to(totals, len(self.running)).tolist()})
        return [self.answers.get(key, self.number, float) for key in keys]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        keys = self._generation_keys(requests)
        waiting = [(key, request) for key, request in zip(keys, requests) if not self.answers.has(key, self.number)]
        width = self._room_to_generate([request for _, request in waiting])
        with skip(self.model, self.plans[self.number]):
            while waiting:
                self._report(self.number * len(keys) + len(keys) - len(waiting), len(keys) * len(self.plans))
                chunk = waiting[: self.scorer.fitting(width, len(waiting))]
                texts = self._generate([request for _, request in chunk])
                if texts is None:
                    self.scorer.shrink(len(chunk), width)
                    continue
                self.answers.add([self.number], {key: [text] for (key, _), text in zip(chunk, texts)})
                waiting = waiting[len(chunk) :]
        self._report((self.number + 1) * len(keys), len(keys) * len(self.plans))
        return [self.answers.get(key, self.number, str) for key in keys]

    def _generate(self, requests: list[Instance]) -> list[str] | None:
        """What the live model says, or None when it takes more memory than there is."""
        try:
            return super().generate_until(requests, disable_tqdm=True)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        return None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *_: Any, **__: Any
    ) -> list[tuple[Any, Any]]:
        """For (strings, context, continuation) each: log-likelihood and greediness, arrays over the plans `running`.

        HFLM hands these on, and sums them where it rolls; with strings they are kept as they come.
        """
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        found: dict[int, tuple[Any, Any]] = {}
        for scores in self.scorer.score([self.plans[number] for number in self.running], cut):
            values, greedy = scores.log_likelihoods.T.numpy(), scores.greedy.T.numpy()  # (requests, plans)
            found |= dict(zip(scores.requests, zip(values, greedy)))
            lines = {
                self.answers.key("loglikelihood", *strings): list(zip(*map(np.ndarray.tolist, found[number])))
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
            raise UsageError(
                f"an answer of {self.task} has {len(continuation)} tokens, and the model takes 1 to {self.max_length}; "
                "leave the task out, or mend it"
            )
        sequence = (context + continuation)[-(self.max_length + 1) :][:-1]
        return Request(tuple(sequence), tuple(continuation))

    def _missing(self, keys: list[str], requests: list[Instance], size: int) -> Iterator[list[Instance]]:
        """The requests that some plans lack, each once, `size` at a time; `running` is then set to those plans."""
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

    def _generation_keys(self, requests: list[Instance]) -> list[str]:
        """The same request asked again (a task that samples) has another key each time."""
        asked: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = self.answers.key("generate_until", *request.args)
            asked[key] += 1
            keys.append(key if asked[key] == 1 else f"{key}-{asked[key]}")
        return keys

    def _room_to_generate(self, requests: list[Instance]) -> int:
        """The most tokens that a prompt and what is generated from it take."""
        widths = [0]
        for request in requests:
            prompt, options = request.args
            new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise UsageError(
                    f"{self.task} generates {new} tokens, but the model's context is {self.max_length}; leave it out"
                )
            widths.append(len(self.tok_encode(prompt)) + new)
        self._check_fit(widths, self.max_length)
        return min(max(widths), self.max_length)

    def _check_fit(self, lengths: Sequence[int], most: int) -> None:
        too_long = sum(length > most for length in lengths)
        if too_long and not self.truncate:
            raise UsageError(
                f"{too_long} requests of {self.task} are longer than the model's context of {self.max_length} tokens "
                f"(up to {max(lengths)}); show fewer examples, or have them cut on the left with truncate"
            )

    def _report(self, done: int, total: int) -> None:
        self.progress(done, total, f"{self.task}: answering")


def origin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what an answer depends on beside request and plan: config, weights (a sample of each), tokenizer."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        if type(weight.data) is Tensor and weight.device.type != "meta":
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // 16)].float().cpu().numpy()
            digest.update(f"{name} {weight.dtype}".encode() + sample.tobytes())
    known = [*sorted(tokenizer.get_vocab().items()), tokenizer.encode("A probe, of 1 line.\n")]
    digest.update(json.dumps(known).encode())
    return digest.hexdigest()


# --- from the harness's outcome to results ----------------------------------------------------------------------------


def _results(
    job: Job, row: str, leaves: list[str], number: int, plan: Plan, outcome: dict[str, Any], dense: dict[str, Any]
) -> Iterator[TaskResult]:
    """A result for each metric to report of a row, which is a task or a group of tasks."""
    figures, dense_figures = outcome["results"][row], dense["results"][row]
    for metric, value in figures.items():
        name, _, kind = metric.partition(",")
        if not kind or name.endswith("_stderr") or job.metric not in (None, metric):
            continue
        documents, base = _documents(outcome, leaves, metric), _documents(dense, leaves, metric)
        delta = value - dense_figures[metric]
        error = _paired_error(job, documents, base, name, delta)
        yield TaskResult(
            task=row,
            metric=metric,
            number=number,
            plan=plan,
            num_fewshot=outcome["n-shot"][leaves[0]],  # a group of groups has none of its own
            value=float(value),
            stderr=_number(figures.get(f"{name}_stderr,{kind}")),
            delta=float(delta),
            delta_stderr=error,
            p_value=_p_value(documents, base, delta, error),
            higher_is_better=outcome["higher_is_better"].get(row, {}).get(name),
            documents=documents,
        )


def _documents(outcome: dict[str, Any], leaves: list[str], metric: str) -> tuple[Document, ...]:
    name, _, kind = metric.partition(",")
    return tuple(
        Document(leaf, sample["doc_id"], sample[name], tuple(answer for answer, *_ in sample["resps"]))
        for leaf in leaves
        for sample in outcome["samples"][leaf]
        if sample["filter"] == kind and name in sample
    )


def _paired_error(job: Job, documents: Sequence[Document], base: Sequence[Document], name: str, delta: float) -> float:
    """The standard error of `delta`: of paired differences where it is their mean, else by leaving documents out."""
    if all(isinstance(document.value, int | float) for document in (*documents, *base)):
        average, error = mean_and_error([ours.value - theirs.value for ours, theirs in zip(documents, base)])
        if math.isclose(average, delta, abs_tol=1e-9):
            return error
    errors = []
    for task in dict.fromkeys(document.task for document in documents):
        pairs = [(d.value, b.value) for d, b in zip(documents, base) if d.task == task]
        aggregate = job.tasks[task].aggregation().get(name, mean)

        def difference(kept: Sequence[Any], aggregate: Callable[[list[Any]], float] = aggregate) -> float:
            ours, theirs = zip(*kept)
            return aggregate(list(ours)) - aggregate(list(theirs))

        errors.append(jackknife_error(difference, pairs))
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)  # a group's plain mean over its tasks


def _p_value(documents: Sequence[Document], base: Sequence[Document], delta: float, error: float) -> float:
    values = [document.value for document in documents], [document.value for document in base]
    if all(value in (0, 1) for value in (*values[0], *values[1])):
        return mcnemar(*values)
    return normal_p_value(delta, error)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
