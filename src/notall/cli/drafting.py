"""The command that measures what a plan brings as a draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..reporting.console import Shown, say, show_all
from ..reporting.progress_bars import progress_bar
from .app import MEASURE, app
from .inputs import Loading, asked_plan, load_model, provenance_of, text_batches
from .options import (
    TIMING,
    Attention,
    Device,
    Dtype,
    Fraction,
    Json,
    Model,
    New,
    PlanFile,
    Prompt,
    Revision,
    Rounds,
    Seed,
    Sequences,
    Skip,
    SkipKeepLast,
    TextSource,
    Trust,
)
from .repairing import warn_of_own_text


@app.command(rich_help_panel=MEASURE, epilog="Example:  notall draft smollm2 --plan plan.json")
def draft(
    model: Model = "smollm2",
    plan: PlanFile = None,
    skip: Skip = None,
    fraction: Fraction = None,
    keep_last: SkipKeepLast = False,
    text: TextSource = "prose",
    sequences: Sequences = 8,
    prompt: Prompt = 128,
    new: New = 64,
    most: Annotated[
        int, typer.Option(help="most tokens that are drafted a round: 1 to this many are tried", rich_help_panel=TIMING)
    ] = 8,
    rounds: Rounds = 3,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="keep the records here, for `notall report`")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict and measure the speedup of a plan as a draft model in speculative decoding.

    Windows of the text are prompts. The dense model continues them itself; its text tells how much of a draft it would
    accept, and the steps of both are timed: that predicts a speedup. At the number of tokens where it is best,
    transformers' own generate measures one, greedy.
    """
    from torch import cat

    from ..measuring.drafting import Drafting, measure_draft
    from ..measuring.speed import machine
    from ..models.loading import dtype_name
    from ..records.drafting import DraftRecord
    from ..records.ledger import refuse_foreign
    from ..reporting.drafts import row_of, said_of
    from ..running.repaired import RepairedPlan
    from ..structure.locating import locate

    if out:
        refuse_foreign(out, "draft")
    asked = asked_plan(plan, skip, fraction, keep_last, needed=True, model=model)
    how = Drafting(prompt, new, most, rounds)
    loading = Loading(model, dtype, device, None, attn_implementation, revision, trust_remote_code)
    net, tokenizer = load_model(loading)
    wanted = asked.of(net)
    windows, described = text_batches(net, tokenizer, text, sequences, prompt + new, 1, seed)
    warn_of_own_text(wanted, described)
    repair = wanted.digest if isinstance(wanted, RepairedPlan) else "none"
    about = provenance_of(net, model, revision, **described, repair=repair, fingerprint=locate(net).fingerprint)
    with progress_bar() as progress:
        found = measure_draft(net, wanted, cat(windows), how, about, out=out, seed=seed, progress=progress)
    here = machine(net.device)
    title = (
        f"{model}, {dtype_name(net)}, skip {wanted}: {sequences} prompts of {prompt} tokens, up to {new} new; "
        f"{here['device_name']}, {here['threads']} threads; median of {rounds} [quartiles]"
    )
    shown = Shown([record.row() for record in found.records], DraftRecord.columns, title)
    show_all({"drafts": shown}, as_json=as_json, also={"verdict": row_of(found.records, found.refused)})
    if not as_json:
        say(said_of(found.records, found.refused))
