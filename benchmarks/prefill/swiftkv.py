"""What SwiftKV's form costs beside the plan that it is made of: all keys and values of
a tail from one stream.

    python benchmarks/prefill/swiftkv.py --data DATA --out OUT --blocks 8

Judged are the tokens behind the prompts of WikiText-2 test and C4, with the windows of
`measure.py`: of the plan in transformers, whose answers have keys and values of their
own streams, and of the form that `notall export --to swiftkv` writes. notall computes
both; the engine of the form needs a GPU, and is not run. DATA is that of `measure.py`,
as far as texts go. Called again with the same --out, it takes the refit that is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import JUDGED, REFIT, SKIPPED, telling, texts
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notall import Plan, RepairedPlan, deepest, evaluate, load, locate, repair
from notall.experiments.options.text import TextOptions
from notall.exporters.swiftkv import Map, maps_of, one_stream
from notall.measuring.quality import gather
from notall.measuring.speed import machine
from notall.repairing.fit_texts import FitTexts
from notall.repairing.texts import RepairTexts
from notall.results.facts import Quality, Scores
from notall.results.provenance import this_run
from notall.results.record import Fact

PLAN, SWIFTKV = "plan", "swiftkv"


class Judged(Fact):
    """How one plan does on a text, in one form."""

    blocks: int
    state: str  # skipped or refit
    form: str  # the plan's own, or SwiftKV's
    judged: str
    prompt_tokens: int
    quality: Quality


@torch.inference_mode()
def in_one_stream(
    model: PreTrainedModel,
    forms: list[dict[int, dict[str, Map]]],
    windows: list[Tensor],
    prompt_tokens: int,
) -> list[Quality]:
    """SwiftKV's forms beside the original model, behind the prompt of each window,
    (batch, tokens) each.
    """

    def logs(tokens: Tensor) -> Tensor:
        return (
            model(input_ids=tokens)
            .logits[:, prompt_tokens - 1 : -1]
            .float()
            .log_softmax(-1)
        )

    def scores_of(tokens: Tensor) -> list[Scores]:
        found, targets = [logs(tokens)], tokens[:, prompt_tokens:, None]
        for maps in forms:
            with one_stream(model, maps):
                found.append(logs(tokens))
        dense = found[0]  # (batch, judged, vocabulary)
        return [
            Scores(
                nll=tuple((-one.gather(-1, targets)).flatten(1).mean(-1).tolist()),
                kl=tuple((dense.exp() * (dense - one)).sum(-1).mean(-1).tolist()),
                top1_agreement=tuple(
                    (dense.argmax(-1) == one.argmax(-1)).float().mean(-1).tolist()
                ),
            )
            for one in found
        ]

    return gather(scores_of(tokens) for tokens in windows)


def plans_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fitted: list[str],
    asked: argparse.Namespace,
) -> Iterator[tuple[int, str, Plan]]:
    """Each depth as it is, where that is asked for, and refit."""
    structure, drawn = locate(model), None
    for count in asked.blocks:
        plan = deepest(structure, "block", count=count, phase="prefill")
        if SKIPPED in asked.states:
            yield count, SKIPPED, plan
        folder = asked.out / f"{count}-refit"
        if not (folder / "plan.json").is_file():
            wanted = FitTexts(fitted, sequences=asked.windows, length=asked.window)
            drawn = drawn or RepairTexts.draw(model, tokenizer, wanted)
            repair(model, plan, drawn.together(4), out=folder, progress=telling)
        yield count, REFIT, RepairedPlan.load(folder)


def run(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(asked.model, dtype=asked.dtype)
    fitted, files = texts(asked)
    plans, prompt_tokens = (
        list(plans_of(model, tokenizer, fitted, asked)),
        asked.window - JUDGED,
    )
    about = {"machine": machine(model.device), "model": Path(asked.model).name}
    about |= this_run("python", "benchmarks/prefill/swiftkv.py")
    records = [json.dumps(about)]
    for file in files:
        windows, _ = TextOptions(
            str(file), asked.judged_windows, asked.window, 4
        ).windows(model, tokenizer)
        windows = list(windows)
        own = evaluate(
            model, [plan for *_, plan in plans], windows, prompt_tokens=prompt_tokens
        )
        others = in_one_stream(
            model, [maps_of(model, plan) for *_, plan in plans], windows, prompt_tokens
        )
        for (count, state, _), quality, other in zip(plans, own, others):
            for form, one in ((PLAN, quality), (SWIFTKV, other)):
                where = {"judged": file.stem, "prompt_tokens": prompt_tokens}
                record = Judged(
                    blocks=count, state=state, form=form, quality=one, **where
                )
                records.append(record.model_dump_json())
                told = (
                    f"NLL {one.delta_nll:+.3f} ± {one.delta_nll_se:.3f}, KL"
                    f" {one.kl:.3f}"
                )
                print(file.stem, count, state, form, told, flush=True)
        (asked.out / "swiftkv.jsonl").write_text(
            "\n".join(records) + "\n", encoding="utf-8"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--states", nargs="+", choices=[SKIPPED, REFIT], default=[SKIPPED, REFIT]
    )
    parser.add_argument(
        "--blocks", nargs="+", type=int, default=[8], help="how many of the deepest"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=384,
        help=f"tokens of a window; the last {JUDGED} are scored",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=32,
        help="that keys and values are fitted to, of both texts",
    )
    parser.add_argument("--judged-windows", type=int, default=32, help="of each text")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
