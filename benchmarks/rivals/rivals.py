"""Other ways to make a prompt cheaper, at the same work: what each loses, and its
times.

    pip install --no-deps optipfair
    python benchmarks/rivals/rivals.py quality --data DATA --out OUT --model MODEL.gguf --plans OUT/14-refit
    python benchmarks/rivals/rivals.py times --out OUT --model MODEL.gguf --plans OUT/14-refit OUT/*.json

Each way takes as much out as `--blocks` blocks are, by parameters, and is judged as in
`prefill/measure.py`: on the last tokens of windows of WikiText-2 test and of C4, and by
checks. What it chooses by are windows of WikiText-2 train and of other documents of C4.
optipfair's own code prunes where it is installed; the others are the formulas of the
papers, as notall and `repairing/others.py` have them. `quality` leaves the plan of each
way in OUT, without matrices, and takes those that it finds there. `times` is one run of
interleaved rounds: nothing else may run then. Repaired plans, as `prefill/measure.py`
leaves them, are judged and timed in the same runs. DATA holds
`wikitext2/wiki.train.first1MB.txt`, `wikitext2/wiki.test.raw` and
`c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1] / "prefill"))
sys.path.insert(0, str(Path(__file__).parents[1] / "repairing"))

import others
from measure import JUDGED, telling, texts

from notall import Plan, RepairedPlan, Space, choose_plan, deepest, load, locate, skip
from notall.choosing.budget import by_count, by_footprint
from notall.evaluation.harness import run_tasks
from notall.evaluation.limits import Limits
from notall.evaluation.tasks import TaskShelf
from notall.experiments.options.plan import read_plans
from notall.experiments.options.text import TextOptions
from notall.measuring.quality import Scores, evaluate, gather
from notall.measuring.speed import compare_speeds, machine
from notall.options import Workload
from notall.repairing.fit_texts import FitTexts
from notall.repairing.texts import RepairTexts
from notall.results.facts import Quality, Recovery, Times
from notall.results.provenance import this_run
from notall.results.record import Fact

CHECKS = ["retrieval_copying", "retrieval_stock", "retrieval_facts"]
WIDTH = "optipfair"
DIVISOR = 128  # of the neurons that optipfair keeps
PROMPT_ALONE = "POP"
ADJACENT = "PruneMe"
Batches = Sequence[Tensor]
Choice = Callable[[PreTrainedModel, int, Batches], Plan]
Patch = Callable[[PreTrainedModel, Plan, Batches], RepairedPlan]


class Lost(Fact):
    """What one way loses on a text, or keeps of a check."""

    way: str
    skipped: str
    judged: str
    quality: Quality | None = None
    value: float | None = None
    dense: float | None = None
    recovery: Recovery | None = None


class Timed(Fact):
    """Times of one way in one run of interleaved rounds, at one length of prompts."""

    way: str
    prompt_tokens: int
    times: Times


def by_influence(model: PreTrainedModel, blocks: int, batches: Batches) -> Plan:
    """ShortGPT, arXiv 2403.03853: the blocks that turn the stream least."""
    space = Space(locate(model), "block")
    return choose_plan(model, "cosine", space, by_count(space, blocks), batches).plan


def by_angle(model: PreTrainedModel, blocks: int, batches: Batches) -> Plan:
    """Gromov et al., arXiv 2403.17887, which PruneMe computes and mergekit cuts:
    adjacent blocks.
    """
    space = Space(locate(model), "block")
    return choose_plan(model, "angular", space, by_count(space, blocks), batches).plan


def by_sublayer(model: PreTrainedModel, blocks: int, batches: Batches) -> Plan:
    """LLM-Drop's joint drop, arXiv 2406.15786: attentions and MLPs that turn the stream
    least, until as many parameters are gone.
    """
    structure = locate(model)
    space = Space(structure, "sublayer")
    gone = sum(part.parameters for part in structure.blocks[0].sublayers) * blocks
    budget = by_footprint(model, space, "params", gone)
    return choose_plan(model, "cosine", space, budget, batches).plan


CHOICES: dict[str, Choice] = {
    "ShortGPT": by_influence,
    ADJACENT: by_angle,
    "LLM-Drop": by_sublayer,
}
PATCHES: dict[str, Patch] = {  # a matrix in place of the adjacent blocks
    "LinearPatch": others.linear_patch,
    "LLM-Streamline": others.streamline,
}


def chosen(
    model: PreTrainedModel, asked: argparse.Namespace, batches: Batches
) -> dict[str, Plan]:
    """The plan of each way but the narrower MLPs; POP (arXiv 2602.03295) skips the
    deepest blocks in the prompt alone, unrepaired.
    """
    found = {}
    for name, choose in CHOICES.items():
        file = asked.out / f"{name}.json"
        if not file.is_file():  # as an earlier call left it
            choose(model, asked.blocks, batches).save(file)
        found[name] = Plan.load(file)
    found[PROMPT_ALONE] = deepest(
        locate(model),
        "block",
        count=asked.blocks,
        phase="prefill",
        last_tokens=asked.last_tokens,
    )
    found[PROMPT_ALONE].save(asked.out / f"{PROMPT_ALONE}.json")
    for name, patch in PATCHES.items():
        found[name] = patch(model, found[ADJACENT], batches)
    return found


def narrowed(
    model: PreTrainedModel, blocks: int, batches: Batches = ()
) -> list[nn.Module]:
    """MLPs of as many neurons fewer as `blocks` blocks have parameters, a share of each
    layer's, by optipfair's rule of weights and, of what `batches` it has, activations;
    `model` stays as it is.
    """
    import optipfair

    structure = locate(model)
    of_block = sum(part.parameters for part in structure.blocks[0].sublayers)
    of_mlps = sum(part.parameters for part in structure.sublayers if part.kind == "mlp")
    pruned = copy.deepcopy(model)
    optipfair.prune_model(
        pruned,
        pruning_type="MLP_GLU",
        pruning_percentage=100 * blocks * of_block / of_mlps,
        expansion_divisor=DIVISOR,
        dataloader=[{"input_ids": tokens} for tokens in batches] or None,
        show_progress=False,
    )
    return [layer.mlp for layer in pruned.model.layers]


@contextmanager
def with_mlps(model: PreTrainedModel, mlps: Sequence[nn.Module]) -> Iterator[None]:
    """`model` with these MLPs, one a layer, in place of its own."""
    own = [layer.mlp for layer in model.model.layers]
    for layer, mlp in zip(model.model.layers, mlps):
        layer.mlp = mlp
    try:
        yield
    finally:
        for layer, mlp in zip(model.model.layers, own):
            layer.mlp = mlp


@torch.no_grad()
def compared(
    model: PreTrainedModel, mlps: Sequence[nn.Module], windows: Batches, prompt: int
) -> Quality:
    """The model with other MLPs beside itself, on the tokens behind `prompt` ones."""

    def scores(logits: Tensor, dense: Tensor, targets: Tensor) -> Scores:
        # (batch, scored, vocabulary), likewise, and (batch, scored)
        kl = (dense.exp() * (dense - logits)).sum(-1)
        same = (logits.argmax(-1) == dense.argmax(-1)).float()
        nll = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        by_sequence = [tuple(one.mean(-1).tolist()) for one in (nll, kl, same)]
        return Scores(**dict(zip(("nll", "kl", "top1_agreement"), by_sequence)))

    def predicted(tokens: Tensor) -> Tensor:
        kept = tokens.shape[1] - prompt + 1
        logits = model(tokens, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        return logits.float().log_softmax(-1)

    found = []
    for tokens in windows:
        dense, targets = predicted(tokens), tokens[:, prompt:]
        with with_mlps(model, mlps):
            other = predicted(tokens)
        found.append([scores(dense, dense, targets), scores(other, dense, targets)])
    return gather(found)[0]


def quality(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(asked.model)
    fitted, files = texts(asked)
    drawn = RepairTexts.draw(
        model,
        tokenizer,
        FitTexts(fitted, sequences=asked.windows, length=asked.window),
        training=False,
    )
    batches = drawn.together(1)
    plans = chosen(model, asked, batches) | read_plans(asked.plans)
    mlps = narrowed(model, asked.blocks, batches) if asked.optipfair else []
    narrow = f"{mlps[0].down_proj.in_features} neurons an MLP" if mlps else ""
    found: list[Lost] = []
    for file in files:
        windows, _ = TextOptions(
            str(file), asked.judged_windows, asked.window, 1
        ).windows(model, tokenizer)
        prompt = asked.window - JUDGED
        judged = evaluate(model, [*plans.values()], windows, prompt_tokens=prompt)
        for (name, plan), one in zip(plans.items(), judged):
            found.append(
                Lost(way=name, skipped=str(plan), judged=file.stem, quality=one)
            )
        if mlps:
            one = compared(model, mlps, [*windows], prompt)
            found.append(Lost(way=WIDTH, skipped=narrow, judged=file.stem, quality=one))
        written(asked, found, model)
    for one in checked(model, tokenizer, plans, asked):
        found.append(one)
        written(asked, found, model)
    if mlps and asked.checks:
        with with_mlps(model, mlps):
            for one in checked(model, tokenizer, {WIDTH: Plan()}, asked):
                of_itself = {"skipped": narrow, "recovery": None, "dense": None}
                found.append(one.model_copy(update=of_itself))
                written(asked, found, model)


def checked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, Plan],
    asked: argparse.Namespace,
) -> Iterator[Lost]:
    """What each plan keeps of notall's checks."""
    if not asked.checks:
        return
    shelf, limits = TaskShelf(), Limits(asked.limit)
    names = shelf.names(asked.checks)
    jobs = [shelf.build(name, None, limits.of(name)) for name in names]
    named = [*plans.items()]
    for result in run_tasks(
        model, tokenizer, [*plans.values()], jobs, progress=telling
    ):
        (way, plan), score = named[result.number], result.score
        yield Lost(
            way=way,
            skipped=str(plan),
            judged=score.task,
            value=score.value,
            dense=score.value - score.delta,
            recovery=score.recovery,
        )


def written(
    asked: argparse.Namespace, found: Sequence[Lost], model: PreTrainedModel
) -> None:
    records = [json.dumps(header(asked, model))]
    records += [one.model_dump_json() for one in found]
    (asked.out / "quality.jsonl").write_text(
        "\n".join(records) + "\n", encoding="utf-8"
    )


def header(asked: argparse.Namespace, model: PreTrainedModel) -> dict[str, object]:
    return {
        "machine": machine(model.device),
        "model": Path(asked.model).name,
        **this_run("python", "benchmarks/rivals/rivals.py"),
    }


def times(asked: argparse.Namespace) -> None:
    """One run: the original, the saved plans and narrower MLPs in turn."""
    model, _ = load(asked.model)
    plans = {"dense": Plan(), **read_plans(asked.plans)}
    variants: dict[str, Callable[[], object]] = {
        name: partial(skip, model, plan) for name, plan in plans.items()
    }
    if asked.optipfair:
        mlps = narrowed(model, asked.blocks)
        variants[WIDTH] = partial(with_mlps, model, mlps)
    asked.out.mkdir(parents=True, exist_ok=True)
    with (asked.out / "times.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps(header(asked, model)), file=file)
        for tokens in asked.prompts:
            workload = Workload(
                prompt_tokens=tokens, generation_tokens=asked.new, rounds=asked.rounds
            )
            timings = compare_speeds(model, variants, workload)
            for name, one in timings.items():
                found = one.compared_with(timings["dense"])
                line = Timed(way=name, prompt_tokens=tokens, times=found)
                print(line.model_dump_json(), file=file, flush=True)
                print(tokens, name, found.speedup_prefill, found.speedup_decode)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["quality", "times"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--blocks", type=int, default=10, help="as much work as these")
    parser.add_argument(
        "--last-tokens", type=int, default=64, help="of a prompt that run whole, of POP"
    )
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument(
        "--windows", type=int, default=16, help="to choose by and to fit to"
    )
    parser.add_argument("--judged-windows", type=int, default=16, help="of each text")
    parser.add_argument("--checks", nargs="*", default=CHECKS)
    parser.add_argument("--limit", type=int, default=40, help="items of each check")
    parser.add_argument(
        "--no-optipfair", dest="optipfair", action="store_false", help="leave it out"
    )
    parser.add_argument(
        "--plans",
        nargs="*",
        type=Path,
        default=[],
        help="to judge or time, too",
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    {"quality": quality, "times": times}[asked.what](asked)


if __name__ == "__main__":
    main()
