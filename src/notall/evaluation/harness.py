"""lm-evaluation-harness for many plans in one pass: each request is computed once, and
answered for every plan.

The harness builds the requests, encodes and cuts them, filters the answers and makes
the metrics. Plans share their first sublayers, and requests that begin alike their
tokens. Needs the extra `eval`.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, raised_by
from ..models.load_errors import quiet
from ..models.mix import origin
from ..plan import Plan, several
from ..progress import Progress, Stages, silent
from ..results.ledger import working_in
from ..running.generating import as_asked, greedily, greedy_each, reporting
from ..running.skipping import skip
from ..structure.model_structure import inputs_device
from ..structure.undoing import Undo
from .scoring import BatchSize, Request, Scorer, unless_out_of_memory

try:
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    from .tasks import HARNESS, Job, in_empty_folder, no_bars
except ModuleNotFoundError as error:
    raise UsageError(
        f"benchmarks need {error.name}; pip install 'notall[eval]'"
    ) from None

if TYPE_CHECKING:
    from .ray_workers import Workers
from .answers import Answers
from .task_scores import TaskResult, scores_of

LM_EVAL_VERSION = version("lm_eval")
CHUNK = 1024  # requests whose tokens are in memory together
PROMPTS_AT_ONCE = 32  # prompts that the original model answers at once
CHATS = ("chat", "first_choices")  # our own kinds of requests


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
        reports = [stages.stage(share) for share in steps]
        return [
            result
            for job, lm.progress in zip(jobs, reports)
            for result in evaluate_job(lm, job)
        ]


def evaluate_job(lm: "PlansLM", job: Job) -> list[TaskResult]:
    """All plans of `lm` on one task; the first evaluation computes what is missing for
    all of them.
    """
    outcomes = []
    place = in_empty_folder() if job.is_stock else nullcontext()
    named = raised_by("lm_eval", f"cannot score {job.name}", "check its data")
    with quiet(*HARNESS), no_bars(), place, named:
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
        for score, samples in scores_of(job, *row, outcome, dense)
    ]


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
        with quiet(*HARNESS):  # batches are cut here, not in HFLM
            super().__init__(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=CHUNK
            )
        # HFLM takes the first weight's, which may be elsewhere
        self._device = inputs_device(self.model)
        self.plans = (Plan(), *plans)  # the original is first
        self.scorer = Scorer(model, batch_size)
        self.score = self.scorer.score
        if workers:
            self.score = partial(workers.score_requests, batch_size=batch_size)
        self.answers = Answers(folder, origin(model, tokenizer), self.plans)
        self.truncate = truncate
        self.progress = progress
        self.number = 0  # of the plan to answer as
        self.task = ""  # its name, for people
        # the plans that what is being computed is for
        self.running: tuple[int, ...] = ()
        # requests answered before what is being computed, of how many
        self.before = self.of = 0

    def check(self, job: Job) -> None:
        """Raise `UsageError` where the model's context is too short for a request of
        `job`.
        """
        self.task = job.name
        by_kind: dict[str, list[Instance]] = {}
        for task in job.tasks.values():
            for request in task.instances:
                by_kind.setdefault(request.request_type, []).append(request)
        texts = ["".join(one.args) for one in by_kind.get("loglikelihood", ())]
        lengths = [len(self.tok_encode(text)) for text in texts]
        self._check_fit(lengths, self.max_length + 1)  # the last is predicted
        self._room_to_generate(by_kind.get("generate_until", []))
        chats = [one for kind in CHATS for one in by_kind.get(kind, ())]
        self._room_to_generate(self._as_chat(chats))

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
        for chunk in self._missing(keys, asked, PROMPTS_AT_ONCE):
            prompts = [self.tok_encode(request.args[0]) for request in chunk]
            stages = Stages(self.progress, self.of)
            new = chunk[0].args[1]["max_gen_toks"]
            stages.stage(self.before)  # which is done
            doing = f"{self.task}: answering"
            reports = reporting(stages.stage(len(chunk)), doing, new)
            with skip(self.model, Plan()):
                written = greedy_each(self.model, prompts, new, **reports)
            answers = [
                Request((*prompt, *answer[:-1]), tuple(answer))
                for prompt, answer in zip(prompts, written)
            ]
            plans = [self.plans[number] for number in self.running]
            for scores in self.score(plans, answers):
                asked_of = [answers[number] for number in scores.requests]
                lengths = [len(request.continuation) for request in asked_of]
                # of (plans, requests): a list per request
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
        """The log-likelihood of each continuation in nats, and whether it is the greedy one."""
        keys = [
            self.answers.key("loglikelihood", *request.args) for request in requests
        ]
        for chunk in self._missing(keys, requests, CHUNK):
            super().loglikelihood(chunk, disable_tqdm=True)
        return [self.answers.get(key, self.number, tuple) for key in keys]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-likelihood of each whole text, in nats."""
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
        """What the plan writes behind each prompt, by the task's own settings."""
        return self._written("generate_until", requests)

    def _written(self, kind: str, requests: list[Instance]) -> list[str]:
        """What the plan writes, by the settings that the model has now; it is kept as
        of this kind of request.
        """
        # the same request asked again (a task that samples) has another key each time
        asked: Counter[str] = Counter()
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
        width = self._room_to_generate([request for _, request in waiting])
        generate = super().generate_until
        place = self.answers.place(self.number)
        total = len(keys) * len(self.answers.distinct)
        with skip(self.model, self.plans[self.number]):
            while waiting:
                self._report(place * len(keys) - len(waiting), total)
                fitting = self.scorer.fitting(width, len(waiting), written=True)
                chunk = waiting[:fitting]
                some = [request for _, request in chunk]
                texts = unless_out_of_memory(partial(generate, some, disable_tqdm=True))
                if texts is None:
                    self.scorer.shrink(len(chunk), width)
                    continue
                found = {key: [text] for (key, _), text in zip(chunk, texts)}
                self.answers.add([self.number], found)
                waiting = waiting[len(chunk) :]
        self._report(place * len(keys), total)
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
            values = scores.log_likelihoods.T.numpy()  # (requests, plans)
            greedy = scores.greedy.T.numpy()  # (requests, plans)
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
            problem = (
                f"an answer of {self.task} has {several(len(continuation), 'token')}"
            )
            raise UsageError(
                f"{problem}, and the model takes 1 to {self.max_length}; leave the task"
                " out, or mend it"
            )
        whole = (context + continuation)[-(self.max_length + 1) :]
        return Request(tuple(whole[:-1]), tuple(continuation))

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
                problem = (
                    f"{self.task} generates {new} tokens, but the model's context is"
                    f" {self.max_length}"
                )
                raise UsageError(f"{problem}; name the other tasks alone")
            widths.append(len(self.tok_encode(prompt)) + new)
        self._check_fit(widths, self.max_length)
        return min(max(widths), self.max_length)

    def _check_fit(self, lengths: Sequence[int], most: int) -> None:
        too_long = sum(length > most for length in lengths)
        if too_long and not self.truncate:
            requests = several(too_long, "request")
            problem = (
                f"the model's context of {self.max_length} tokens is too short for"
                f" {requests} of {self.task}"
            )
            fix = (
                "show fewer examples (num_fewshot), or cut them on the left (truncate)"
            )
            raise UsageError(f"{problem} (up to {max(lengths)}); {fix}")

    def _report(self, done: int, total: int) -> None:
        self.progress(done, total, f"{self.task}: answering")
