"""Commands that look at a model: its sublayers, its similarity by depth, what it says."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..progress import tracked
from ..records.lines import refuse_unwritable
from ..records.provenance import windows_of
from ..reporting.console import say, show
from ..reporting.extras import FIGURES, need
from ..reporting.progress_bars import progress_bar
from ..reporting.similarity_files import write_similarity
from .app import LOOK, app
from .checks import check_texts
from .inputs import Loading, asked_plan, empty_model, load_model, text_batches
from .options import (
    BatchSize,
    Device,
    DeviceMap,
    Dtype,
    Fraction,
    Json,
    Length,
    Model,
    OwnDtype,
    PlanFile,
    Revision,
    Seed,
    Sequences,
    Skip,
    SkipKeepLast,
    TextSource,
    Trust,
)


@app.command(rich_help_panel=LOOK, epilog="Example:  notall inspect llama-2-70b")
def inspect(
    model: Model = "smollm2",
    dtype: OwnDtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show every sublayer: its parameters, share of the weights, KV bytes per token and size of its state.

    This needs only a config.
    """
    from ..models.loading import dtype_name
    from ..records.plan import Plan
    from ..running.footprint import footprint
    from ..structure.locating import locate
    from .columns import INSPECT_COLUMNS

    net = empty_model(model, dtype, revision, trust_remote_code)
    anatomy = locate(net)
    total = footprint(net, Plan())
    rows = [
        {
            "sublayer": part.name,
            "kind": part.kind,
            "index": part.index,
            "parameters": part.parameters,
            "share": part.parameters / total.params,
            "weight_bytes": part.weight_bytes,
            "kv_bytes_per_token": part.kv_bytes_per_token,
            "state_bytes": part.state_bytes or None,
            "read_by": " ".join(part.lends) or None,
            "mixer": part.mixer if len(anatomy.mixers) > 1 or total.state_bytes else None,
        }
        for part in anatomy.sublayers
    ]
    shape = "parallel blocks" if any(block.parallel for block in anatomy.blocks) else "blocks"
    states = f", {total.state_bytes:,} bytes of states" if total.state_bytes else ""
    title = (
        f"{anatomy.fingerprint}: {len(anatomy.blocks)} {shape}, {total.params:,} parameters, "
        f"{total.kv_bytes_per_token:,} KV bytes a token{states} in {dtype_name(net)}"
    )
    show(rows, INSPECT_COLUMNS, as_json=as_json, title=title)


@app.command(rich_help_panel=LOOK, epilog="Example:  notall similarity smollm2 --out similarity")
def similarity(
    model: Model = "smollm2",
    text: TextSource = "prose",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="also write OUT.csv and .tex, and draw OUT.png, .svg and .html"),
    ] = None,
    sequences: Sequences = 8,
    length: Length = 256,
    batch_size: BatchSize = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show how similar each layer's features are to the previous layer's (the paper's Fig. 1)."""
    from ..measuring.similarity import measure_similarity
    from ..records.similarity import SimilarityRecord

    if out:
        need(*FIGURES)
        refuse_unwritable(out.parent)
    check_texts(text)
    net, tokenizer = load_model(Loading(model, dtype, device, revision=revision, trust_remote_code=trust_remote_code))
    batches, described = text_batches(net, tokenizer, text, sequences, length, batch_size, seed)
    with progress_bar() as progress:
        rows = [asdict(row) for row in measure_similarity(net, tracked(batches, "comparing the layers", progress))]
    written = write_similarity(rows, out, model, windows_of(described)) if out else []
    show(rows, SimilarityRecord.columns, as_json=as_json, title="cosine of the residual stream before and after")
    if written and not as_json:
        say(f"Written: {', '.join(map(str, written))}")


@app.command(
    rich_help_panel=LOOK, epilog='Example:  notall generate smollm2 --plan plan.json "The capital of France is"'
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="what to continue")],
    plan: PlanFile = None,
    skip: Skip = None,
    fraction: Fraction = None,
    keep_last: SkipKeepLast = False,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens to generate")] = 64,
    temperature: Annotated[
        float, typer.Option(help="how freely to choose; 0 takes the most likely token each time")
    ] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="show the dense model's answer and the skipped one's side by side")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
) -> None:
    """Continue a prompt with the skipped model. The text is printed as it comes."""
    from transformers import TextStreamer

    from ..records.plan import Plan
    from ..reporting.side_by_side import side_by_side
    from ..running.generating import Streamer, generate_text

    asked = asked_plan(plan, skip, fraction, keep_last, needed=beside, model=model)
    net, tokenizer = load_model(
        Loading(model, dtype, device, device_map, revision=revision, trust_remote_code=trust_remote_code)
    )
    say = partial(
        generate_text,
        net,
        tokenizer,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        seed=seed,
    )
    if not beside:
        say(plan=asked.of(net), streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        return
    wanted = asked.of(net)
    plans = {"dense": Plan(), "repaired" if hasattr(wanted, "unrepaired") else "skipped": wanted}
    with side_by_side([*plans]) as write:
        for name, wanted in plans.items():
            say(plan=wanted, streamer=Streamer(tokenizer, partial(write, name)))
