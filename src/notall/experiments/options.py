"""What commands are given, and what they make of it: each dataclass is a group of
options of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..checkpoint_files import named_weights
from ..errors import UsageError, nearest, shortened
from ..exporters import UNPACKED
from ..exporters.manifest import dense_of, plan_of, weights_beside
from ..extras import need
from ..files import expanded
from ..integrity import MANIFEST
from ..models.names import DEFAULT_MODEL, DEFAULT_TEXT, USE, named_gguf
from ..options import Option, check_sizes, option
from ..plan import PUBLISHED_AS, Phase, Plan, several
from ..results.ledger import as_recorded
from ..results.provenance import Provenance, this_run
from ..results.terminal import progress_bar
from ..strict_json import Settings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..choosing.space import Space
    from ..evaluation.ray_workers import Workers
    from ..evaluation.tasks import Job, Limits, TaskShelf
    from ..models.texts import Text
    from ..models.windows import Drawn

Words = tuple[str, ...]  # of an option that may be repeated
TEXT = (
    "a UTF-8 file, a .jsonl with a `text` column, prose, which ships with Python, mix:"
    " the model's own answers and completions, and retrieval; or answers:FILE, its"
    " answers to your prompts"
)
QUESTIONS = 100  # of a task that is an objective, where nothing else is said
SKIPPED = 0.33  # of the layers, where nothing else is said: the paper's most


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded: the arguments of `notall.load`."""

    PANEL: ClassVar = "Model"

    model: str = option(
        "smollm2",
        "smollm2, a hub id, a folder or a .gguf file",
        (),
        "MODEL",
        argument=True,
    )
    dtype: str = option(
        "auto",
        "dtype to compute in: float32, bfloat16, float16, or auto, which suits the"
        " device",
    )
    device: str = option("auto", "device to run on: auto, cpu, cuda, cuda:1, mps ...")
    device_map: str | None = option(
        None, "spread the model over devices with accelerate: auto, balanced ..."
    )
    attn_implementation: str | None = option(
        None, "attention implementation: sdpa, eager, flash_attention_2 ..."
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run the model's own code from the hub")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer. Raises as `notall.load` does."""
        from ..models.loading import load

        with progress_bar(f"loading {self.model}"):
            return load(**self.arguments)

    def check_plan(self, plan: Plan) -> None:
        """Raise `UsageError` for a plan of another model before any weights are read,
        as far as its config tells.
        """
        from ..structure.locating import locate

        if plan and not self._may_have(plan):
            plan.check(locate(self.empty()))

    def _may_have(self, plan: Plan) -> bool:
        """Whether the model's config has the layers and the shape of a plan, or there
        is no config that is readable.
        """
        from ..models.configs import load_config
        from ..structure.model_structure import fingerprint

        try:
            config = load_config(
                self.model,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
        except UsageError:  # which loading the model tells, too
            return True
        text = config.get_text_config(decoder=True)
        named = (*plan.attention, *plan.mlp, *plan.prefill.attention, *plan.prefill.mlp)
        return max(named) < text.num_hidden_layers and plan.fingerprint in (
            None,
            str(fingerprint(text)),
        )

    def empty(self) -> PreTrainedModel:
        """The model of a config, without weights, in the dtype that is named, or else
        as its checkpoint is stored.
        """
        from ..exporters.tensors import stored_sizes
        from ..models.devices import named_dtype
        from ..models.quantisation import quantisation_of
        from ..models.weightless import load_empty
        from ..structure.weights import count_as_stored

        named = self.own_dtype or (UNPACKED if named_gguf(self.model) else None)
        dtype = named_dtype(named) if named else None
        with progress_bar(f"reading the config of {self.model}"):
            model = load_empty(
                self.model,
                dtype,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
            if quantisation_of(model.config):
                weights = named_weights(self.model, model.config)
                count_as_stored(model, stored_sizes(self.model, self.revision, weights))
            return model

    @property
    def own_dtype(
        self,
    ) -> str | None:  # where a model is read and not run; None: the checkpoint's
        return None if self.dtype == "auto" else self.dtype

    @property
    def arguments(self) -> Settings:
        told = asdict(self)
        return {"spec": told.pop("model"), **told}

    @property
    def for_workers(self) -> Settings:
        """The arguments in processes whose working folder is another: a path is
        absolute.
        """
        path, is_path = expanded(self.model), self.model != DEFAULT_MODEL
        return self.arguments | (
            {"spec": str(path.absolute())} if is_path and path.exists() else {}
        )

    def provenance(self, model: PreTrainedModel, **more: object) -> Provenance:
        """Where figures of this run come from; `more` decides whether a run goes on, as
        the model does.
        """
        from ..measuring.speed import devices_of, machine
        from ..models.identity import identify
        from ..models.loading import dtype_name

        about = machine(*devices_of(model))
        where = (
            {name: about[name] for name in ("device", "threads", "versions")}
            | {"machine": about}
            | this_run()
        )
        what = {
            **identify(self.model, revision=self.revision),
            "dtype": dtype_name(model),
            **more,
        }
        return as_recorded(Provenance(what=what, where=where))


@dataclass(frozen=True)
class PromptOptions:
    PANEL: ClassVar = "Text"

    text: str = option(DEFAULT_TEXT, TEXT)
    sequences: int = option(8, "number of windows")

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        check_sizes(self.sequences)
        check_texts(self.text)

    def for_diagnostics(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        apart: Sequence[Drawn] = (),
    ) -> list[Tensor]:
        """The windows of the text that the diagnostics read, or all that it has, drawn
        apart from others.
        """
        from ..evaluation.diagnostics import WINDOW_TOKENS, WINDOWS
        from ..models.windows import draw
        from ..structure.model_structure import positions_of

        length = int(min(WINDOW_TOKENS, positions_of(model)))
        text = _read(model, tokenizer, self.text, WINDOWS * length)
        take = partial(draw, tokenizer, text, length=length, seed=seed, apart=apart)
        found = take(sequences=WINDOWS, fewer=True)
        if not len(found):
            found = take(sequences=1)  # which says what is wrong
        return found.on(model).batches(1)


@dataclass(frozen=True)
class TextOptions(PromptOptions):
    """Windows of a text: how many, of how many tokens, and how many run at a time."""

    length: int = option(256, "tokens in each window")
    batch_size: int = option(4, "windows to run at a time")

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        check_sizes(self.sequences, self.length, self.batch_size)
        check_texts(self.text)

    def windows(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        apart: Sequence[Drawn] = (),
    ) -> tuple[list[Tensor], Settings]:
        """Token batches on the model's device, drawn apart from others, and what they
        are, for the record.
        """
        from ..models.windows import draw

        self.check_size(model)
        text = _read(model, tokenizer, self.text, self.sequences * self.length)
        size: Settings = {"sequences": self.sequences, "length": self.length}
        found = draw(tokenizer, text, **size, seed=seed, apart=apart).on(model)
        return found.batches(self.batch_size), {
            "text": text.name,
            "text_sha256": text.sha256,
            **size,
        }

    def check_size(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` for windows that the model cannot read."""
        from ..structure.model_structure import positions_of

        if self.length > (most := positions_of(model)):
            raise UsageError(
                f"windows of {self.length} tokens exceed the model's {most} positions:"
                " lower --length"
            )


@dataclass(frozen=True)
class HeldOutOptions(TextOptions):
    """Windows of a text, and others to measure on: of another text, or of the same."""

    text: str = option(USE, TEXT)
    held_out: str | None = option(
        None,
        "text to measure on (default: other windows of --text; they are of a copy of"
        " it, too)",
    )
    held_out_sequences: int | None = option(
        None, "windows to measure on (default: as --sequences)"
    )

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        for count in (self.sequences, self.held_out_sequences or self.sequences):
            check_sizes(count, self.length, self.batch_size)
        check_texts(self.text, self.held_out)

    def split(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        apart: Sequence[Drawn] = (),
        fewer: bool = False,
        calibrates: bool = True,
    ) -> Split:
        """Windows to calibrate on, and others to measure on, drawn `apart` from more; a
        short text may have `fewer`.

        A held-out text of the same content as the other is that text: others of its
        windows are measured on. Where nothing `calibrates`, the text for that, which
        may have to be written first, is not read if there is another.
        """
        from ..models.windows import draw

        self.check_size(model)
        count, is_same = (
            self.held_out_sequences or self.sequences,
            self.held_out
            in (
                None,
                self.text,
            ),
        )
        window = partial(draw, tokenizer, length=self.length, seed=seed)
        if calibrates or is_same:
            text = _read(
                model,
                tokenizer,
                self.text,
                (self.sequences + count * is_same) * self.length,
            )
            judged = (
                text
                if is_same
                else _read(model, tokenizer, str(self.held_out), count * self.length)
            )
            is_same |= judged.sha256 == text.sha256
            own = window(text, sequences=self.sequences)
        else:
            judged = _read(model, tokenizer, str(self.held_out), count * self.length)
            own = window(judged, sequences=1)[:0]
        others = partial(
            window, judged, sequences=count, fewer=fewer and not self.held_out
        )
        apart = [own, *apart]
        return Split(
            own.on(model),
            others(apart=apart).on(model),
            is_same,
            self.batch_size,
            others,
            apart,
        )


@dataclass(frozen=True)
class Split:
    """Windows to choose by and to fit to, `own`, and `held_out` ones to measure on,
    maybe of the same text.
    """

    own: Drawn
    held_out: Drawn
    is_same: bool
    batch_size: int
    others: Callable[..., Drawn]  # draws what is held out
    apart: Sequence[Drawn]  # what that overlaps nothing of

    @property
    def calibration(self) -> list[Tensor]:
        """Token ids, (batch, tokens) each."""
        return self.own.batches(self.batch_size)

    @property
    def evaluation(self) -> list[Tensor]:
        """Token ids, (batch, tokens) each."""
        return self.held_out.batches(self.batch_size)

    @property
    def described(self) -> Settings:
        """What both are, for the record."""
        text, judged = self.own.text, self.held_out.text
        size = {"sequences": len(self.own), "length": self.own.rows.shape[1]}
        held_out = {"held_out": judged.name, "held_out_sha256": judged.sha256}
        if not len(self.own):
            return {"length": size["length"], **held_out}
        if self.is_same:
            held_out = {"held_out": "other windows"} if len(self.held_out) else {}
        return {"text": text.name, "text_sha256": text.sha256, **size, **held_out}

    @property
    def measured_on(self) -> str:
        """The text that is measured on, in words."""
        name = self.held_out.text.name
        return f"other windows of {name}" if self.is_same else name

    def apart_from(self, windows: Sequence[Drawn]) -> Split:
        """The same, with windows to measure on that overlap none of these either."""
        others = self.others(apart=[*self.apart, *windows])
        return replace(
            self,
            held_out=replace(others, rows=others.rows.to(self.held_out.rows.device)),
        )


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    tokens: float,
) -> Text:
    from ..models.mix import text_of

    with progress_bar("reading the text") as progress:
        return text_of(model, tokenizer, source, progress, tokens)


def check_texts(*sources: str | None) -> None:
    """Raise `UsageError` for a text that cannot be read."""
    from ..models.texts import ANSWERS_TO, is_made, read_prompts, read_text

    for source in filter(None, sources):
        if source.startswith(ANSWERS_TO):
            read_prompts(Path(source.removeprefix(ANSWERS_TO)))
        elif not is_made(source):
            read_text(source)


def refuse_judging(
    tasks: TaskChoice, sources: Sequence[str], prompts: Path | None = None
) -> None:
    """Raise `UsageError` where tasks ask for prompts whose answers are in a text, or
    are `prompts` to choose by.
    """
    from ..models.texts import ANSWERS_TO, read_prompts

    files = [
        Path(source.removeprefix(ANSWERS_TO))
        for source in sources
        if source.startswith(ANSWERS_TO)
    ]
    used = {prompt for file in files for prompt in read_prompts(file)[::2]}
    used |= {*read_prompts(prompts)} if prompts else set()
    for name in tasks.names if used else ():
        kind, _, file = name.partition(":")
        if (
            kind in ("answers", "written")
            and file
            and (both := used.intersection(read_prompts(Path(file))[1::2]))
        ):
            told = (
                f"--tasks {shortened(name)} asks for what is chosen by or fitted to,"
                f" such as {shortened(min(both))!r}"
            )
            fix = (
                f"give --text {ANSWERS_TO}{shortened(file)}, which leaves every second"
                " prompt to --tasks"
            )
            raise UsageError(f"{told}: {fix}, or other prompts")


def read_plan(path: Path) -> Plan:
    """The plan of a file, an export, or the folder of a repair, with its weights.

    Raises `UsageError` as their readers do.
    """
    if str(path).startswith(PUBLISHED_AS):  # whatever lies in the working folder
        return Plan.load(path)
    try:
        is_export, is_folder = (path / MANIFEST).is_file(), path.is_dir()
    except OSError as error:  # a name that is too long
        told = f"cannot read the plan {shortened(path)}: {error.strerror}"
        raise UsageError(f"{told}; give another name") from None
    if is_export:
        return plan_of(path)
    if is_folder:
        from ..running.repaired import RepairedPlan

        return RepairedPlan.load(path)
    return Plan.load(path)


def read_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """Plans by the names of their files. Raises `UsageError` for two of one name."""
    names = [
        path.name.removeprefix("published:").removesuffix(".json") for path in paths
    ]
    if len(set(names)) < len(names):
        raise UsageError("two of the plans have the same name: rename one")
    return dict(zip(names, map(read_plan, paths)))


KeepFirst = Annotated[bool, Option("preserve the first layer")]
KeepLast = Annotated[bool, Option("preserve the last layer")]
PHASE = (
    "skip for all tokens, or for a prompt's alone, whose keys and values are kept"
    " (prefill)"
)
LAST_TOKENS = "with --phase prefill: how many last tokens of a prompt run whole"
PromptTokens = Annotated[
    int | None,
    Option(
        "score what follows the first N tokens of each window, its prompt (default:"
        " half, if only a prompt skips)",
        least=1,
        panel="Text",
    ),
]
TaskPath = Annotated[
    Path | None,
    Option("folder with more tasks: YAML files of the harness, which may run code"),
]


@dataclass(frozen=True)
class PlanOptions:
    """What is left out: the plan of a file, or the deepest of a kind."""

    plan: Path | None = option(None, "plan file, folder of a repair, or published:NAME")
    skip: str | None = option(
        None,
        "instead of --plan: the deepest, such as attention:0.33",
        (),
        "KIND[:HOW MANY]",
    )
    keep_last: bool = option(False, "with --skip: preserve the last layer")
    phase: Phase = option("all", PHASE)
    last_tokens: int = option(1, LAST_TOKENS, least=1)

    @property
    def amount(self) -> SkipAmount | None:
        return SkipAmount.parse(self.skip, SKIPPED) if self.skip else None

    @cached_property
    def named(self) -> Plan:
        """The plan of a file; one of nothing where there is none."""
        return read_plan(self.plan) if self.plan else Plan()

    @property
    def words(self) -> dict[str, object]:
        if not self.skip:
            return {"plan": self.plan}
        of_prompt = (
            {"phase": self.phase, "last_tokens": self.last_tokens}
            if self.phase != "all"
            else {}
        )
        return {"skip": self.amount, "keep_last": self.keep_last or None} | of_prompt

    def check(self, *, needed: bool = False, model: str = "") -> None:
        """Raise `UsageError` where two things are said, or too little for what is
        `needed` of `model`.
        """
        if self.plan and self.skip:
            raise UsageError(
                "--plan and --skip both say what to leave out: give one of them"
            )
        if self.keep_last and not self.skip:
            raise UsageError(
                "--keep-last says which of what is left out: add --skip attention, mlp"
                " or block"
            )
        if self.phase != "all" and not self.skip:
            raise UsageError(
                f"--phase {self.phase} says how --skip leaves out: add --skip block:8,"
                " or drop it"
            )
        if self.last_tokens != 1 and self.phase != "prefill":
            raise UsageError(
                "--last-tokens says how much of a prompt runs whole: add --phase"
                " prefill"
            )
        if needed and not (self.plan or self.skip):
            if model and (Path(model) / MANIFEST).is_file():
                beside, dense = (
                    shortened(weights_beside(Path(model)) or model),
                    dense_of(Path(model)),
                )
                wrong = f"{shortened(model)} is what is left of another model"
                raise UsageError(
                    f"{wrong}: name that one, such as {dense}, and give --plan {beside}"
                )
            raise UsageError(
                "say what to leave out: --plan plan.json (of notall search), or --skip"
                " attention:0.25"
            )
        _ = self.amount, self.named

    def of(self, model: PreTrainedModel) -> Plan:
        """The plan that was read, or by the paper's rule the deepest of a kind. Raises
        as `deepest` does.
        """
        from ..choosing.criteria.data_free import SKIPPABLE, deepest
        from ..structure.locating import locate

        skip = self.amount
        if skip is None:
            return self.named
        structure, (amount, *more) = locate(model), skip.amounts
        if skip.kind in {
            "portable",
            "sublayer",
            "period",
            *structure.mixers,
        }.difference(SKIPPABLE):
            raise UsageError(
                f"--skip {skip} has no deepest: choose a set with `notall search --skip"
                f" {skip}`"
            )
        if more:
            raise UsageError(f"--skip {skip} asks for several plans: give one number")
        if amount >= 1 and amount % 1:
            raise UsageError(
                f"--skip {skip} is no number of layers: give a whole one, or a share"
                " below 1"
            )
        share, count = (amount, None) if amount < 1 else (None, int(amount))
        how = {
            "keep_last": self.keep_last,
            "phase": self.phase,
            "last_tokens": self.last_tokens,
        }
        found = deepest(structure, skip.kind, share, count=count, **how)  # type: ignore[arg-type]
        if amount and not found:
            raise UsageError(
                f"{amount:g} of {several(len(structure.blocks), 'layer')} is none of"
                " them: give a larger number"
            )
        return found


@dataclass(frozen=True)
class SkipAmount:
    """A kind of sublayers and how many of them, such as `attention:8`: below 1 a share,
    several with commas between.
    """

    kind: str
    amounts: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, *otherwise: float) -> SkipAmount:
        """Raises `UsageError` for what is no number; where none is given, it is
        `otherwise`.
        """
        kind, colon, told = text.partition(":")
        numbers = told.split(",") if colon else []
        if not kind or not all(
            re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", word)
            for word in numbers
        ):
            raise UsageError(
                f"--skip {shortened(text)} is no kind and number: write attention:8, or"
                " attention:0.33"
            )
        return cls(kind, tuple(map(float, numbers)) or otherwise)

    def __str__(self) -> str:
        return ":".join(
            [
                self.kind,
                *filter(None, [",".join(f"{amount:g}" for amount in self.amounts)]),
            ]
        )


def space_of(
    model: PreTrainedModel,
    kind: str,
    keep_first: bool = False,
    keep_last: bool = False,
    phase: Phase = "all",
    last_tokens: int = 1,
) -> Space:
    """What is chosen among: `portable` is any sublayers whose absence leaves an
    ordinary checkpoint.
    """
    from ..choosing.space import UNIT_KINDS, Space
    from ..structure.locating import locate

    structure, portable = locate(model), kind == "portable"
    names = [*UNIT_KINDS, *structure.mixers, "portable"]
    if kind not in names:
        near = nearest(kind, names)
        raise UsageError(
            f"--skip {shortened(kind)!r}{near} is nothing to choose among: give one of"
            f" {', '.join(names)}"
        )
    among = "sublayer" if portable else kind
    return Space(
        structure, among, portable, int(keep_first), int(keep_last), phase, last_tokens
    )


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks of lm-evaluation-harness, on how many documents, with how many
    examples.
    """

    PANEL: ClassVar = "Benchmarks"

    tasks: Words = option(
        (),
        "needles, passkey, retrieval, answers, written, reasoning, or answers:FILE with"
        " your own prompts; openllm, or tasks of lm-evaluation-harness; separated by"
        " commas; see `notall tasks`",
    )
    limit: Words = option(
        (),
        "documents of each task (default: all; 80 of a check, 100 of an objective),"
        " such as 40; mmlu=2 limits one task, or a group's",
    )
    num_fewshot: int | None = option(
        None, "examples to show (default: the task's own number)", least=0
    )
    task_path: TaskPath = None
    truncate: bool = option(
        False, "cut the beginning of what is longer than the context"
    )
    task_batch_size: str = option(
        "auto", "requests to run at a time: a number, or auto"
    )

    def check(self, *, objectives: Sequence[str] = ()) -> TaskChoice:
        """The tasks that there are; the data of `objectives` is read.

        Raises `UsageError` for names and numbers that are none, and where the harness
        is wanted and not installed.
        """
        word, wanted = self.task_batch_size, words_of(self.tasks)
        if word != "auto" and not re.fullmatch("[0-9]{1,9}", word):
            raise UsageError(
                f"--task-batch-size {shortened(word)} is neither a number nor auto;"
                " give one of them"
            )
        size: int | Literal["auto"] = "auto" if word == "auto" else int(word)
        if not (wanted or objectives):
            return TaskChoice(None, (), self.num_fewshot, size, self.truncate)
        need("lm_eval")
        with progress_bar("reading the harness's tasks"):
            from ..evaluation.tasks import Limits, TaskShelf

            limits = Limits.parse(words_of(self.limit))
            shelf = TaskShelf(self.task_path)
        names = shelf.names(wanted) if wanted else []
        others = shelf.names(objectives) if objectives else []
        limits.check([*names, *others])
        for name in others:
            shelf.build(name, 0, 1)
        return TaskChoice(
            shelf, tuple(names), self.num_fewshot, size, self.truncate, limits
        )


@dataclass(frozen=True)
class TaskChoice:
    """Tasks of the harness, by its names; without any there may be no `shelf` to take
    them from, and no limits.
    """

    shelf: TaskShelf | None
    names: tuple[str, ...]
    num_fewshot: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    truncate: bool = False
    limits: Limits | None = None
    recovery: float | None = (
        None  # the share of the original model's score that each must keep
    )

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def how(self) -> Settings:
        """How requests are run, as `run_tasks` and `PlansLM` take it."""
        return {"batch_size": self.batch_size, "truncate": self.truncate}

    def limit_of(self, task: str) -> int | None:
        return self.limits.of(task) if self.limits else None

    @property
    def questions(self) -> int:
        """How many training questions an objective has of a task."""
        return (self.limits.most if self.limits else None) or QUESTIONS

    def build(self, name: str) -> Job:
        """Its data, loaded, and its requests, built. Raises `UsageError` as
        `TaskShelf.build` does.
        """
        assert self.shelf
        return self.shelf.build(name, self.num_fewshot, self.limit_of(name))

    def jobs(self) -> list[Job]:
        return [self.build(name) for name in self.names]

    def choosing(self) -> list[Job]:
        """Other items of its checks, and few of them, as each plan that is tried is
        asked.
        """
        from ..evaluation.checks import CHOOSING_ITEMS

        assert self.shelf
        most = [
            min(self.limit_of(name) or CHOOSING_ITEMS, CHOOSING_ITEMS)
            for name in self.names
        ]
        pairs = zip(self.names, most)
        return [
            self.shelf.build(name, self.num_fewshot, limit, choosing=True)
            for name, limit in pairs
        ]


HIDDEN = (
    "also measure what accuracy hides: NLL by position, passkey, calibration, writing"
)
Diagnostics = Annotated[bool, Option(HIDDEN, panel="Benchmarks")]


@dataclass(frozen=True)
class ClusterOptions:
    PANEL: ClassVar = "Cluster"

    ray: str | None = option(
        None,
        "run on a Ray cluster: the running one, or a new one. ADDRESS may be local,"
        " auto, HOST:PORT or, except for heal, ray://HOST:PORT",
        metavar="[ADDRESS]",
    )
    ray_workers: int | None = option(
        None, "number of workers (default: one for each GPU)"
    )


@dataclass(frozen=True)
class RayOptions(ClusterOptions):
    """With workers that each have a copy of the model."""

    ray_gpus: int = option(1, "GPUs for each worker")

    def workers(
        self, model: PreTrainedModel, loading: ModelOptions
    ) -> AbstractContextManager[Workers | None]:
        if self.ray is None:
            return nullcontext()
        from ..evaluation.ray_workers import Workers
        from ..structure.locating import locate

        return Workers(
            loading.for_workers,
            locate(model),
            self.ray,
            count=self.ray_workers,
            gpus=self.ray_gpus,
        )


def words_of(values: Sequence[str]) -> list[str]:
    """The words of an option that may be repeated, or hold several with commas between
    them.
    """
    return [word for value in values for word in value.split(",") if word]
