"""notall draft: what a plan brings as a draft model."""

from __future__ import annotations

from ..experiments.draft import COLUMNS, DraftOptions, measure_draft, verdict
from ..experiments.options import ModelOptions, PlanOptions, PromptOptions, windows_of
from ..options import Json, KeepIn, Seed
from ..results.ledger import check_folder
from ..results.progress_bars import progress_bar
from ..results.table import table
from ..results.terminal import say, show
from .app import MEASURE, command


@command(MEASURE, example="notall draft smollm2 --plan plan.json")
def draft(
    model: ModelOptions,
    plan: PlanOptions,
    text: PromptOptions,
    how: DraftOptions,
    out: KeepIn = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict and measure the speedup of a plan as a draft model in speculative decoding.

    Windows of the text are prompts. The dense model continues them itself; its text tells how much of a draft it would
    accept, and the steps of both are timed: that predicts a speedup. At the number of tokens where it is best,
    transformers' own generate measures one, greedy.
    """
    from torch import cat

    from ..structure.locating import locate

    check_folder(out, "draft")
    text.check()
    plan.check(needed=True, model=model.model)
    net, tokenizer = model.load()
    wanted = plan.of(net)
    windows, described = windows_of(
        net, tokenizer, text.text, text.sequences, how.prompt_tokens + how.generation_tokens, seed=seed
    )
    about = model.provenance(net, **described, repair=wanted.digest, fingerprint=locate(net).fingerprint)
    with progress_bar() as progress:
        found = measure_draft(net, wanted, cat(windows), how, about, out=out, seed=seed, progress=progress)
    title = f"{about.in_words}, skip {wanted}: {text.sequences} prompts; median of {how.rounds} [quartiles]"
    told = verdict(found)
    show({"drafts": (table(title, COLUMNS, found.records), found.records)}, as_json=as_json, also={"verdict": told})
    if not as_json:
        say(told.said)
