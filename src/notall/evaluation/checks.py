"""Checks of what people serve a model for, as tasks of the harness, made without a data
set.

Retrieval by form and length, the model's own answers, and questions of reasoning-gym
with its verifiers. The items are the same for every model; none is among what texts to
fit to are made of, but for prompts of a file.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig

from ..digests import digest_of
from ..entry_points import installed_names, named
from ..errors import UsageError, expect, nearest, shortened
from ..extras import need
from ..models.prompts import prompts
from ..models.retrieval import CONTEXTS, UNSEEN, Episode, RetrievalForm, episode
from ..models.texts import ANSWERS_TO, read_prompts
from ..strict_json import read_json
from .scoring import common

# of a check, unless a limit says otherwise: 73 are the fewest that 0.95 can be seen to
# be kept of
ITEMS = 80
CHOOSING_ITEMS = 24  # of a check that chooses, at most
# Seeds of what judges, and of what chooses; those of what is fitted to count from 0.
SEED = 2_000_003
CHOOSING = 1_000_003
LENGTH = 512  # of other retrieval
ANSWERED = 128  # tokens of an own answer
GYM = "gym_"  # before the name of a generator of reasoning-gym
GYM_DEFAULT = (
    "basic_arithmetic",
    "chain_sum",
    "letter_counting",
    "number_sorting",
    "spell_backward",
)
REASONED = 512  # tokens of an answer to a question of it

Doc = dict[str, Any]  # of the harness: `prompt` and `answer`, and what a verifier needs


class MadeTask(Task):
    """A task of documents that are at hand; plug-ins know it as `notall.plugins.Task`.

    A document has a `prompt` and an `answer`, and what `judge` needs. `kind` is how the
    model is asked: "loglikelihood" of the answer, (nats, whether it is the greedy one);
    "generate_until" with up to `tokens` new ones (a key of the document), the text; or
    "chat", the same in chat form, the pair of texts of the plan and of the original.
    `judge` makes the metrics of a document and that result; `metrics` has for each
    whether higher is better.
    """

    VERSION = 3

    def __init__(
        self,
        name: str,
        docs: Sequence[Doc],
        kind: str,
        metrics: Mapping[str, bool],
        judge: Callable[[Doc, Any], dict[str, float]],
    ) -> None:
        super().__init__()
        self._config = TaskConfig(
            task=name, num_fewshot=0, metadata={"version": self.VERSION}
        )
        self.docs, self.kind, self.metrics, self.judge = docs, kind, metrics, judge
        self.OUTPUT_TYPE = "generate_until" if kind == "chat" else kind

    def download(self, *_: object, **__: object) -> None:
        """Nothing: the documents are at hand."""

    def has_training_docs(self) -> bool:
        """No: nothing is shown before a question."""
        return False

    has_validation_docs = has_training_docs

    def has_test_docs(self) -> bool:
        """Yes: all documents."""
        return True

    def test_docs(self) -> Sequence[Doc]:
        """All documents, in the order they were made."""
        return self.docs

    def doc_to_text(self, doc: Doc) -> str:
        """The prompt."""
        return str(doc["prompt"])

    def doc_to_target(self, doc: Doc) -> str:
        """The answer; empty where a verifier judges."""
        return str(doc["answer"])

    def fewshot_context(self, doc: Doc, num_fewshot: int, **_: object) -> str:
        """The prompt alone, whatever `num_fewshot` is."""
        return self.doc_to_text(doc)

    def construct_requests(
        self, doc: Doc, ctx: str, metadata: Any = None, **_: object
    ) -> list[Instance]:
        """One request: the likelihood of the answer, or so many tokens behind the prompt."""
        if self.kind == "loglikelihood":
            asked = doc["answer"]
        else:
            asked = {"until": [], "max_gen_toks": doc["tokens"]}
        return [Instance(self.kind, doc, (ctx, asked), 0, metadata=metadata)]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, float]:
        """What `judge` makes of the one answer, by metric."""
        return self.judge(doc, results[0])

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        """The mean, for each metric."""
        return dict.fromkeys(self.metrics, mean)

    def higher_is_better(self) -> dict[str, bool]:
        """The metrics of which more is better."""
        return {name: True for name, better in self.metrics.items() if better}


NUMBER_IN_ANSWER = re.compile(r"\d+(?:[.,]\d+)*")


def json_keys(text: str) -> list[str]:
    """The fields of the JSON object in a text, sorted; none where there is no sound
    one.
    """
    begin, end = text.find("{"), text.rfind("}") + 1
    with suppress(ValueError, UsageError):
        found = read_json(text[begin:end]) if begin >= 0 else None
        return sorted(found) if isinstance(found, dict) else []
    return []


def own_prompts(name: str, items: int, seed: int) -> list[Doc]:
    """Ours, or those of the file behind the colon of `name`: its first, third ... to
    choose by, others to judge by.
    """
    _, colon, file = name.partition(":")
    if colon:
        asked = read_prompts(Path(file))[seed != CHOOSING :: 2]
    else:
        asked = prompts(items, seed=seed, held_out=True)
    if not asked:
        raise UsageError(
            f"{shortened(Path(file))} has one prompt: give two or more, every second"
            " one to judge by"
        )
    return [{"prompt": one, "answer": "", "tokens": ANSWERED} for one in asked[:items]]


def prompts_digest(name: str) -> dict[str, str]:
    """The digest of the prompts that a task takes from a file, for what is kept of
    it.
    """
    file = name.partition(":")[2] if name.startswith(ASKING) else ""
    return {"prompts": digest_of(read_prompts(Path(file)))} if file else {}


def retrieval(
    form: RetrievalForm, tokens: int, name: str, items: int, seed: int
) -> MadeTask:
    """Whether greedy decoding says what stands far back in a text of about so many
    tokens.
    """
    draw = random.Random(f"{seed} {form} {tokens}")
    return _found(name, [episode(form, tokens, draw) for _ in range(items)])


def needles(name: str, items: int, seed: int) -> MadeTask:
    """Retrieval of each form and length in turn: one score, where `passkey` and
    `retrieval` have one for each.
    """
    asked: list[tuple[RetrievalForm, int]] = [
        ("passkey", tokens) for tokens in CONTEXTS
    ]
    asked += [(form, LENGTH) for form in UNSEEN]
    draw = random.Random(f"{seed} needles")
    made = [episode(*asked[number % len(asked)], draw) for number in range(items)]
    return _found(name, made)


def _found(name: str, episodes: Sequence[Episode]) -> MadeTask:
    docs = [{"prompt": one.text, "answer": one.answer} for one in episodes]
    return MadeTask(
        name,
        docs,
        "loglikelihood",
        {"found": True},
        lambda _, answer: {"found": float(answer[1])},
    )


def answers(name: str, items: int, seed: int) -> MadeTask:
    """The share of tokens of the original model's own greedy answers that stay the
    first choice, given those before.
    """
    metric = "first_choices"
    return MadeTask(
        name,
        own_prompts(name, items, seed),
        metric,
        {metric: True},
        lambda _, share: {metric: share},
    )


def written(name: str, items: int, seed: int) -> MadeTask:
    """What a plan writes to prompts, compared with what the original model writes."""
    metrics = {
        "same_beginning": True,
        "same_number": True,
        "valid_json": True,
        "words": False,
    }
    return MadeTask(name, own_prompts(name, items, seed), "chat", metrics, compared)


def compared(_: Doc, texts: tuple[str, str]) -> dict[str, float]:
    """Of what a plan and the original model wrote: the share of words up to the first
    other one, and the plan's words.

    Where the original model's has a number, whether the last one is the same; where it
    has a JSON object, whether the plan's has one with the same fields.
    """
    ours, theirs = texts
    words, base = ours.split(), theirs.split()
    found = {
        "same_beginning": common(words, base) / max(1, len(base)),
        "words": float(len(words)),
    }
    if numbers := NUMBER_IN_ANSWER.findall(theirs):
        found["same_number"] = float(
            NUMBER_IN_ANSWER.findall(ours)[-1:] == numbers[-1:]
        )
    if keys := json_keys(theirs):
        found["valid_json"] = float(json_keys(ours) == keys)
    return found


def reasoning(generator: str, name: str, items: int, seed: int) -> MadeTask:
    """Questions of a generator of reasoning-gym, answered greedily in chat form and
    judged by its verifier.
    """
    need("reasoning_gym")
    import reasoning_gym

    questions = reasoning_gym.create_dataset(generator, size=items, seed=seed)
    asked = (
        "{}\n\nAfter your reasoning, write the final answer on a line of its own,"
        ' behind "Answer:".'
    )
    docs = [
        {
            "prompt": asked.format(one["question"]),
            "answer": one["answer"],
            "tokens": REASONED,
            "entry": dict(one),
        }
        for one in questions
    ]

    def verify(doc: Doc, texts: tuple[str, str]) -> dict[str, float]:
        text = texts[0].strip()
        last = text.rpartition("Answer:")[2].strip() or text
        first = last.splitlines()[0].strip(" *.`$") if last else None
        found = questions.score_answer(first, doc["entry"]) == 1
        return {"exact_match": float(found), "words": float(len(texts[0].split()))}

    return MadeTask(name, docs, "chat", {"exact_match": True, "words": False}, verify)


TASK_MAKERS: Mapping[str, Callable[[str, int, int], MadeTask]] = {
    **{
        f"passkey_{tokens}": partial(retrieval, "passkey", tokens)
        for tokens in CONTEXTS
    },
    **{f"retrieval_{form}": partial(retrieval, form, LENGTH) for form in UNSEEN},
    "needles": needles,
    "answers": answers,
    "written": written,
}
ASKING = (ANSWERS_TO, "written:")  # before a file of prompts
GROUPS: Mapping[str, tuple[str, ...]] = {
    "passkey": tuple(f"passkey_{tokens}" for tokens in CONTEXTS),
    "retrieval": tuple(f"retrieval_{form}" for form in UNSEEN),
    "reasoning": tuple(f"{GYM}{name}" for name in GYM_DEFAULT),
}


PLUGINS = "notall.tasks"  # the group of entry points of tasks


def check_names() -> list[str]:
    """notall's own checks, and those of installed packages."""
    return [*TASK_MAKERS, *installed_names(PLUGINS)]


def is_check(name: str) -> bool:
    """Whether a name is of a check: notall's own or a plug-in's, and no harness task's."""
    return name.startswith((GYM, *ASKING)) or name in check_names()


def made(name: str, items: int = ITEMS, seed: int = SEED) -> MadeTask:
    """The task of a name.

    Raises `UsageError` where reasoning-gym is absent, or has no such generator, where
    prompts of a file are missing, and where a plug-in makes something else.
    """
    if not name.startswith(GYM):
        maker = named(name.partition(":")[0], TASK_MAKERS, PLUGINS, "task")
        task = maker(name, items, seed)
        expect(task, MadeTask, f"back a notall.plugins.Task for {shortened(name)}")
        return task
    generator = name.removeprefix(GYM)
    if generator not in generators():
        raise UsageError(
            "reasoning-gym has no generator"
            f" {shortened(generator)!r}{nearest(generator, generators())}: `notall tasks"
            " gym` lists them"
        )
    return reasoning(generator, name, items, seed)


def generators() -> list[str]:
    """The names of reasoning-gym's generators. Raises `UsageError` where it is not
    installed.
    """
    need("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)
