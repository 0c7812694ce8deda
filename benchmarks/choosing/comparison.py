"""Every criterion on a model, at every budget, by several objectives, texts and sizes:
one resumable command.

    python benchmarks/choosing/comparison.py --data DATA          # some three hours on one core with AMX
    python benchmarks/choosing/comparison.py --data DATA --quick  # a look, under a quarter of an hour on one core
    python benchmarks/choosing/comparison.py --data DATA --budgets --sequences 4 --model GGUF --name NAME --out OTHER

DATA holds `c4/sample300.jsonl`, `wikitext2/wiki.train.first1MB.txt`,
`wikitext2/wiki.test.raw` and `make_tasks.py`, which writes the task that two rows go
by; see benchmarks/comparison/README.md. Results, table and front land in --out.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from inputs import load_asked, options_of

import notall
from notall.choosing.criteria import suits
from notall.choosing.objective import kl, mix, nll, task
from notall.choosing.space import Space, UnitKind
from notall.experiments.compare.options import AskedChoice, CalibratedObjective
from notall.experiments.compare.run import compare_criteria
from notall.experiments.options.model import ModelOptions
from notall.experiments.subject import Subject
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.report.comparison_tables import write_comparison
from notall.results.terminal import progress_bar

BLOCKS = 30
TASK = "local_arc_challenge"
ONE_SHOT = (
    "deepest",
    "random",
    "cosine",
    "angular",
    "magnitude",
    "first-order",
    "fisher",
    "gate-norm",
)


@dataclass(frozen=True)
class Sizes:
    """What is compared, on how much: `sequences` and `held_out` are of `length` tokens
    each.

    Budgets are of a model of 30 blocks: of another the nearest shares. `special` are
    rows of a criterion, an objective, a space and a count; `other` are sequences and
    tokens each of the objectives "nll, less text" and so on.
    """

    length: int
    sequences: int
    held_out: int
    budgets: dict[str, tuple[int, ...]]
    special: tuple[tuple[str, str, str, int], ...]
    other: dict[str, tuple[int, int]]


FULL = Sizes(
    length=512,
    sequences=8,
    held_out=32,
    budgets={
        "attention": (4, 8, 12),
        "sublayer": (16,),
        "block": (2, 4, 6),
        "portable": (4, 8, 12),
    },
    special=(
        # other objectives, other text, more and less of it
        *(
            ("search", objective, "attention", 8)
            for objective in ("nll, C4", "task", "kl + 0.1*task", "nll, less text")
        ),
        # plain greedy and evolution evaluate so often that they get the least text, and
        # so does the search beside them
        *(
            (name, "nll, least text", "attention", 8)
            for name in ("search", "greedy", "evolution")
        ),
        *((name, "nll, least text", "block", 4) for name in ("search", "greedy")),
        *((name, "nll, least text", "sublayer", 20) for name in ("search", "greedy")),
        ("search", "nll, more text", "attention", 8),
    ),
    other={"least": (4, 128), "less": (4, 512), "more": (64, 512)},
)
QUICK = Sizes(
    length=128,
    sequences=4,
    held_out=8,
    budgets={
        "attention": (4, 8),
        "sublayer": (8,),
        "block": (2, 4),
        "portable": (4, 8),
    },
    special=(),
    other={},
)


def rows(structure: notall.ModelStructure, sizes: Sizes) -> list[AskedChoice]:
    """One-shot criteria, losses one by one and the search by KL at every budget, and
    what is special.
    """
    spaces = {"portable": Space(structure, portable=True)}
    spaces |= {kind: Space(structure, kind) for kind in get_args(UnitKind)}
    by = [(criterion, "nll") for criterion in (*ONE_SHOT, "leave-one-out", "quadratic")]
    by += [("search", "kl")]

    def share(name: str, count: int) -> int:
        step = 2 if name == "portable" else 1
        return max(1, round(count * len(structure.blocks) / BLOCKS / step)) * step

    found = [
        AskedChoice(criterion, objective, spaces[name], share(name, count))
        for name, counts in sizes.budgets.items()
        for criterion, objective in by
        for count in counts
        if suits(criterion, spaces[name])
    ]
    special = [
        AskedChoice(by, objective, spaces[name], share(name, count))
        for by, objective, name, count in sizes.special
    ]
    return found + special


def objectives(
    wanted: set[str],
    model: Any,
    tokenizer: Any,
    data: Path,
    sizes: Sizes,
    task_path: Path,
) -> dict[str, CalibratedObjective]:
    """What the rows go by: NLL and KL on WikiText-2 train, NLL on C4, a task's training
    questions.
    """
    wiki, c4 = (
        read_text(data / name)
        for name in ("wikitext2/wiki.train.first1MB.txt", "c4/sample300.jsonl")
    )

    def batches(
        text: Any, sequences: int = sizes.sequences, length: int = sizes.length
    ) -> list[Any]:
        return token_batches(
            tokenizer, text, sequences=sequences, length=length, batch_size=1
        )

    def questions(weight: float) -> Any:
        return task(model, tokenizer, TASK, task_path, 50, weight)

    many = batches(wiki)
    found = {}
    for name in wanted:
        if name == "nll":
            found[name] = CalibratedObjective(nll(many), many)
        elif name == "kl":
            found[name] = CalibratedObjective(kl(many), many)
        elif name == "task":
            found[name] = CalibratedObjective(questions(1.0), many)
        elif name == "kl + 0.1*task":
            found[name] = CalibratedObjective(mix([kl(many), questions(0.1)]), many)
        elif name == "nll, C4":
            others = batches(c4)
            found[name] = CalibratedObjective(nll(others), others)
        else:
            some = batches(
                wiki, *sizes.other[name.removeprefix("nll, ").removesuffix(" text")]
            )
            found[name] = CalibratedObjective(nll(some), some)
    return found


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, default=None)
    options.add_argument(
        "--name", default="SmolLM2-135M-Instruct", help="the model's, as titles say it"
    )
    options.add_argument("--quick", action="store_true")
    options.add_argument(
        "--budgets",
        action="store_true",
        help="no rows of other texts, tasks, greedy and evolution",
    )
    options.add_argument(
        "--sequences", type=int, help="to choose by, of 512 tokens each (8)"
    )
    arguments = options.parse_args()
    sizes = QUICK if arguments.quick else FULL
    if arguments.budgets:
        sizes = replace(sizes, special=())
    sizes = replace(sizes, sequences=arguments.sequences or sizes.sequences)
    out = arguments.out or Path("results") / (
        "comparison-quick" if arguments.quick else "comparison"
    )
    model, tokenizer = load_asked(arguments)
    task_path = out / "task-files"
    if sizes.special:
        subprocess.run(
            [sys.executable, arguments.data / "make_tasks.py", task_path], check=True
        )
    asked = rows(notall.locate(model), sizes)
    text = read_text(arguments.data / "wikitext2/wiki.test.raw")
    held_out = token_batches(
        tokenizer, text, sequences=sizes.held_out, length=sizes.length, batch_size=2
    )
    about = ModelOptions(arguments.model).provenance(
        model, calibration="WikiText-2 train", held_out=text.name
    )
    with progress_bar() as progress:
        records = compare_criteria(
            Subject(model, tokenizer, held_out, out, about),
            asked,
            objectives(
                {row.objective for row in asked},
                model,
                tokenizer,
                arguments.data,
                sizes,
                task_path,
            ),
            progress=progress,
        )
    made = (
        f"Chosen by {sizes.sequences} windows of {sizes.length} tokens of WikiText-2"
        f" train, where no other text is told, and measured on {sizes.held_out} of its"
        f" test, in {about.what['dtype']}."
    )
    write_comparison(
        records,
        out,
        f"NLL added on WikiText-2 test by what is skipped, {arguments.name}",
        made,
    )
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
