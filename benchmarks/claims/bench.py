"""What the claims are tested on: a model, texts, and losses of plans by window, each
computed once and kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial, reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from rules import Floats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notall import ModelStructure, Plan, Space, load, locate, skip
from notall.choosing.budget import by_count
from notall.choosing.criteria import Setting, choose
from notall.choosing.criteria.quadratic import measure_program
from notall.choosing.evaluator import RIDGES, Evaluator
from notall.choosing.objective import kl
from notall.choosing.space import plan_of
from notall.measuring.acceptance import write_texts
from notall.measuring.quality import measure_similarity, score
from notall.models.texts import Text, read_text
from notall.models.windows import token_batches
from notall.progress import silent
from notall.repairing.refitting import Refitting
from notall.repairing.streams import DenseStream
from notall.results import lines
from notall.results.facts import Scores
from notall.running.skipping import remove
from notall.strict_json import Settings
from notall.structure.locating import decoder_layers

WAYS = ("cosine", "magnitude", "fisher", "leave-one-out", "search")
CALIBRATION = ("WikiText-2 train", "C4, first half", "prose")
JUDGED = ("WikiText-2 test", "C4, second half")
TRAIN = CALIBRATION[:1]
SEEDS = (0, 1)
PLAN_SIZES = (2, 3, 4, 6, 8)  # sublayers of a random plan
# blocks that no random plan touches, and the last: without one of them alone most
# models are ruined
FIRST = 2
AT_ONCE = 10  # plans that are run together
DIGITS = 6


class NotRun(Exception):
    """Why a claim was not tested."""


@dataclass(frozen=True)
class Sizes:
    """How much text, and how many plans."""

    windows: int = 8  # of each text, to judge by
    length: int = 256  # tokens of a window
    to_choose: int = 3  # windows that sublayers are chosen by
    to_repair: int = 16  # windows that a repair is fitted to
    prompts: int = 8
    prompt: int = 32  # tokens
    new: int = 96  # tokens that the original model writes behind each
    plans: int = 24  # random ones
    steps: int = 48  # of tuning, two windows each
    share: float = 8 / 30  # of the attentions in a set

    @property
    def in_words(self) -> str:
        return f"{self.windows} windows of {self.length} tokens"


@dataclass(eq=False)
class Kept:
    """Rows by their keys in a file that is only added to, with CPU seconds: a run that
    is called again goes on.
    """

    path: Path
    about: Settings
    rows: dict[str, Settings] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        first, *rows = lines.read_lines(self.path) or [{"about": self.about}]
        if first["about"] != self.about:
            raise SystemExit(
                f"{self.path} was made with {first['about']}, not {self.about}: choose"
                " another --out"
            )
        self.rows = {row["key"]: row for row in rows}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> Settings:
        self.used.add(key)
        return self.rows[key]

    def add(self, *rows: Settings) -> None:
        lines.append(
            self.path, *([] if self.path.exists() else [{"about": self.about}]), *rows
        )
        self.rows |= {row["key"]: row for row in rows}

    def get(self, key: str, make: Callable[[], Settings]) -> Settings:
        if key not in self:
            start = time.process_time()
            made = make()
            self.add({"key": key, "seconds": time.process_time() - start, **made})
        return self[key]

    def seconds(self) -> float:
        """The CPU seconds of all rows that were read since the last call."""
        used, self.used = self.used, set()
        return sum(self.rows[key]["seconds"] for key in used)


@dataclass(frozen=True)
class Losses:
    """Of plans on windows, (plans, windows) each: NLL added, and KL."""

    added: Floats
    kl: Floats


@dataclass(eq=False)
class Bench:
    """A model and texts; all that is measured goes through `kept`."""

    data: Path
    model_name: str
    dtype: str
    sizes: Sizes
    kept: Kept

    @classmethod
    def at(cls, data: Path, model: str, dtype: str, sizes: Sizes, out: Path) -> Bench:
        about = {"model": Path(model).name, "dtype": dtype, **asdict(sizes)}
        return cls(data, model, dtype, sizes, Kept(out / "measured.jsonl", about))

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load(self.model_name, dtype=self.dtype, device="cpu")

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @cached_property
    def structure(self) -> ModelStructure:
        return locate(self.model)

    @property
    def blocks(self) -> int:
        return len(self.structure.blocks)

    @property
    def skipped(self) -> int:
        """Attentions of a set."""
        return max(1, round(self.sizes.share * self.blocks))

    def batches(
        self,
        text: str,
        windows: int,
        size: int = 4,
        seed: int = 0,
        length: int | None = None,
    ) -> list[Tensor]:
        shape = {
            "sequences": windows,
            "length": length or self.sizes.length,
            "batch_size": size,
        }
        return token_batches(self._loaded[1], self._text(text), seed=seed, **shape)

    def _text(self, name: str) -> Text:
        if name == "prose":
            return read_text()
        if name.startswith("WikiText-2"):
            file = (
                "wiki.train.first1MB.txt" if name.endswith("train") else "wiki.test.raw"
            )
            return read_text(self.data / "wikitext2" / file)
        c4 = read_text(self.data / "c4/sample300.jsonl")
        half = c4.content.find("\n\n", len(c4.content) // 2)
        part = c4.content[:half] if name.endswith("first half") else c4.content[half:]
        return Text(name, f"{c4.sha256} {name}", part)

    def losses(
        self,
        plans: Sequence[Plan],
        texts: Sequence[str] = JUDGED,
        repaired: bool = False,
    ) -> Losses:
        """What plans lose on the windows of some texts, as they are or after a quick
        repair.
        """
        state = "repaired" if repaired else "skipped"

        def key(plan: Plan) -> str:
            return (
                f"{state if plan else 'original'}: {' '.join(plan.names)} on"
                f" {', '.join(texts)}"
            )

        wanted = list(dict.fromkeys([Plan(), *plans]))
        lacking = [plan for plan in wanted if key(plan) not in self.kept]
        at_once = 1 if repaired else AT_ONCE
        for some in (
            lacking[start : start + at_once]
            for start in range(0, len(lacking), at_once)
        ):
            start = time.process_time()
            ready = [
                self._repaired(plan) if repaired and plan else plan for plan in some
            ]
            _, *found = self._scores(ready, texts)
            seconds = (time.process_time() - start) / len(some)
            self.kept.add(
                *(
                    {"key": key(plan), "seconds": seconds, **row(one)}
                    for plan, one in zip(some, found)
                )
            )
        original = self.kept[key(Plan())]["nll"]
        rows = [self.kept[key(plan)] for plan in plans]
        return Losses(
            np.array([row["nll"] for row in rows]) - original,
            np.array([row["kl"] for row in rows]),
        )

    def _scores(self, plans: Sequence[Plan], texts: Sequence[str]) -> list[Scores]:
        batches = [
            batch for text in texts for batch in self.batches(text, self.sizes.windows)
        ]
        return [
            reduce(add, parts)
            for parts in zip(*(score(self.model, plans, batch) for batch in batches))
        ]

    @cached_property
    def _to_repair(self) -> DenseStream:
        each = self.sizes.to_repair // 2
        batches = [
            batch for text in CALIBRATION[:2] for batch in self.batches(text, each)
        ]
        return DenseStream(
            self.model, batches, keep_all=True
        )  # it is read again for each plan

    @torch.no_grad()
    def _repaired(self, plan: Plan) -> Plan:
        """The quick repair of `notall search --repair`: a refit of the sublayers before
        gaps alone.
        """
        return (
            Refitting(self._to_repair, plan, ridges=RIDGES, near=True)
            .run(silent)
            .knowing(self.model)
        )

    def chosen(
        self, text: str, seed: int, kind: str = "attention", ways: Sequence[str] = WAYS
    ) -> dict[str, Plan]:
        """What each way skips, by windows of a text; sets are judged by KL to the
        original model on them.
        """
        space = Space(self.structure, kind)
        share = self.sizes.share if kind == "attention" else 0.2
        count = max(1, round(share * self.blocks))
        setting: list[
            Setting
        ] = []  # one for all ways, so that none evaluates a set again

        def made(way: str) -> Settings:
            if not setting:
                setting.append(self._setting(space, text, seed))
            return {
                "set": space.sorted(
                    choose(way, setting[0], by_count(space, count)).skipped
                )
            }

        found = {}
        for way in ways:
            row = self.kept.get(
                f"{count} {kind} by {way} on {text}, seed {seed}", partial(made, way)
            )
            found[way] = plan_of(row["set"])
        return found

    def _setting(self, space: Space, text: str, seed: int = 0) -> Setting:
        batches = self.batches(text, self.sizes.to_choose, 1, seed)
        return Setting(
            self.model, space, batches, Evaluator(self.model, kl(batches)), seed
        )

    def singles(self) -> dict[str, Floats]:
        """NLL added without each sublayer alone, by window of WikiText-2 train."""
        names = [part.name for part in self.structure.sublayers]
        return dict(
            zip(names, self.losses([plan_of([name]) for name in names], TRAIN).added)
        )

    def cosines(self) -> dict[str, float]:
        """Of the stream before and behind each sublayer, on the same windows."""

        def made() -> Settings:
            found = measure_similarity(
                self.model, self.batches(TRAIN[0], self.sizes.windows)
            )
            short = {"attention": "attn", "mlp": "mlp"}
            return {
                "cosine": {
                    f"{short[one.kind]}.{one.layer}": one.cosine
                    for one in found
                    if one.kind in short
                }
            }

        found: dict[str, float] = self.kept.get("cosines on WikiText-2 train", made)[
            "cosine"
        ]
        return found

    def random_plans(self) -> list[Plan]:
        rng = np.random.default_rng(0)
        names = [
            part.name
            for part in self.structure.sublayers
            if FIRST <= part.index < self.blocks - 1
        ]
        sizes = [
            min(PLAN_SIZES[number % len(PLAN_SIZES)], len(names) // 2)
            for number in range(self.sizes.plans)
        ]
        return [
            plan_of(rng.choice(names, size, replace=False).tolist()) for size in sizes
        ]

    def acceptance(self, plans: Sequence[Plan]) -> Floats:
        """How likely a token drafted by each plan is accepted, (plans, prompts), by
        texts that the original sampled.

        The sum of min(p, q) over the vocabulary, teacher-forced: the mean over tokens.
        """
        prompts, texts = self._sampled()
        rows = []
        for number, (prompt, text) in enumerate(zip(prompts, texts)):
            key = f"acceptance of {len(plans)} plans on sampled text {number}"
            rows.append(
                self.kept.get(key, partial(self._expected, plans, prompt, text))[
                    "expected"
                ]
            )
        return np.array(rows).T

    def _sampled(self) -> tuple[Tensor, list[Tensor]]:
        sizes = self.sizes

        def made() -> Settings:
            prompts = torch.cat(
                self.batches(
                    TRAIN[0], sizes.prompts, sizes.prompts, length=sizes.prompt
                )
            )
            written = write_texts(self.model, prompts, sizes.new, "sampled")
            return {
                "prompts": prompts.tolist(),
                "texts": [text.tolist() for text in written],
            }

        found = self.kept.get("texts that the original sampled", made)
        return torch.tensor(found["prompts"]), [
            torch.tensor(text) for text in found["texts"]
        ]

    @torch.inference_mode()
    def _expected(
        self, plans: Sequence[Plan], prompt: Tensor, text: Tensor
    ) -> Settings:
        ids, count = torch.cat([prompt, text])[None, :-1], len(text)

        def distributions() -> Tensor:
            return (
                self.model(input_ids=ids, use_cache=False, logits_to_keep=count)
                .logits[0]
                .float()
                .softmax(-1)
            )

        original, found = distributions(), []
        for plan in plans:
            with skip(self.model, plan):
                found.append(
                    round(
                        float(torch.minimum(original, distributions()).sum(-1).mean()),
                        DIGITS,
                    )
                )
        return {"expected": found}

    def quadratic(self) -> tuple[Floats, Floats]:
        """KL without each attention alone, and what each two lose more than that
        together.
        """
        space = Space(self.structure, "attention")

        def made() -> Settings:
            program = measure_program(self._setting(space, TRAIN[0]), space.units)
            return {
                "alone": program.alone.tolist(),
                "together": program.together.tolist(),
            }

        found = self.kept.get("quadratic estimate on WikiText-2 train", made)
        return np.array(found["alone"]), np.array(found["together"])

    def tuned(self, plan: Plan) -> Floats:
        """NLL by window of the model without `plan`, its head and last three layers
        tuned on calibration text.
        """

        def made() -> Settings:
            student = self._tuned(plan)
            batches = [
                batch
                for text in JUDGED
                for batch in self.batches(text, self.sizes.windows)
            ]
            return {
                "nll": [
                    round(one, DIGITS)
                    for batch in batches
                    for one in nll_of(student, batch)
                ]
            }

        return np.array(
            self.kept.get(
                f"head and last three layers tuned without {' '.join(plan.names)}", made
            )["nll"]
        )

    def _tuned(self, plan: Plan) -> PreTrainedModel:
        """After 2411.15558: next-token loss, AdamW at 2e-4 with a linear fall to
        none.
        """
        student = copy.deepcopy(self.model)
        remove(student, plan)
        head = student.get_output_embeddings()
        head.weight = nn.Parameter(
            head.weight.detach().clone()
        )  # a tied embedding stays as it is
        student.requires_grad_(False)
        trained = [
            head.weight,
            *(
                one
                for layer in decoder_layers(student)[1][-3:]
                for one in layer.parameters()
            ),
        ]
        for one in trained:
            one.data = one.data.float()  # steps are too small for bfloat16
            one.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        texts = [self.batches(text, self.sizes.steps, 1) for text in CALIBRATION[:2]]
        for step, pair in enumerate(zip(*texts)):
            for group in optimizer.param_groups:
                group["lr"] = 2e-4 * (1 - step / self.sizes.steps)
            ids = torch.cat(pair)
            with torch.autocast("cpu", torch.bfloat16):
                logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return student


@torch.no_grad()
def nll_of(model: PreTrainedModel, ids: Tensor) -> Iterator[float]:
    """Of each window, the mean over its tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    for one, targets in zip(logits, ids[:, 1:]):
        yield float(cross_entropy(one.float(), targets))


def row(scores: Scores) -> Settings:
    return {
        name: [round(one, DIGITS) for one in getattr(scores, name)]
        for name in ("nll", "kl")
    }
