"""notall inspect, similarity and generate: look at a model."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.live import Live
from rich.table import Column as RichColumn, Table
from rich.text import Text

from ..encodings import printable
from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import PlanOptions
from ..experiments.options.text import TextOptions
from ..extras import FIGURES, need
from ..files import contents, refuse_others
from ..models.gguf_sizes import size_notes
from ..options import Json, Option, RunOptions, Seed
from ..plan import Plan, bound_to_prompt
from ..progress import tracked
from ..report.similarity import write_similarity
from ..results.facts import SIMILARITY
from ..results.lines import refuse_unwritable
from ..results.provenance import windows_in_words
from ..results.record import Count, Fact
from ..results.table import Column, number, size, table, words
from ..results.terminal import progress_bar, show
from .app import command


class SublayerFact(Fact):
    """A sublayer, and its share of the model."""

    sublayer: str
    kind: Literal["attention", "mlp"]
    index: Count
    parameters: Count
    share: float = Field(description="of all parameters, 0 to 1")
    weight_bytes: Count
    kv_bytes_per_token: Count
    state_bytes: Count | None
    read_by: str = Field("", description="sublayers that share its keys and values")
    mixer: str | None = Field(
        None, description="its kind, where the model has several, or states"
    )
    bound: str = Field("", description="why a plan cannot skip it in the prompt alone")


COLUMNS: tuple[Column[SublayerFact], ...] = (
    words("sublayer", lambda one: one.sublayer),
    number("parameters", lambda one: one.parameters, ","),
    number("share", lambda one: one.share, ".2%"),
    size("weights", lambda one: one.weight_bytes),
    size("KV/token", lambda one: one.kv_bytes_per_token),
    size("states", lambda one: one.state_bytes),
    words("mixer", lambda one: one.mixer),
    words("read by", lambda one: one.read_by),
    words("in prompts", lambda one: "always runs" if one.bound else ""),
)


@command(example="notall inspect llama-2-70b")
def inspect(model: ModelOptions, as_json: Json = False) -> None:
    """Show every sublayer: its parameters, share of the weights, KV bytes per token and
    size of its state.

    This needs only a config.
    """
    from ..models.loading import dtype_name
    from ..running.skipping import footprint
    from ..structure.locating import locate

    net = model.empty()
    structure, total = locate(net), footprint(net, Plan())
    several = len(structure.mixers) > 1 or total.state_bytes
    found = [
        SublayerFact(
            sublayer=part.name,
            kind=part.kind,
            index=part.index,
            parameters=part.parameters,
            share=part.parameters / total.params,
            weight_bytes=part.weight_bytes,
            kv_bytes_per_token=part.kv_bytes_per_token,
            state_bytes=part.state_bytes or None,
            read_by=" ".join(part.read_by),
            mixer=part.mixer if several else None,
            bound=bound_to_prompt(structure, part),
        )
        for part in structure.sublayers
    ]
    parallel = any(block.parallel for block in structure.blocks)
    blocks = f"{len(structure.blocks)} {'parallel blocks' if parallel else 'blocks'}"
    sizes = (
        f"{total.params:,} parameters, {total.kv_bytes_per_token:,} KV bytes a token"
    )
    if total.state_bytes:
        sizes += f", {total.state_bytes:,} bytes of states"
    title = f"{structure.fingerprint}: {blocks}, {sizes} in {dtype_name(net)}"
    show(
        {"sublayers": table(title, COLUMNS, found)},
        as_json=as_json,
        then=size_notes(model.model, Plan()),
    )


@command(example="notall similarity smollm2 --out similarity")
def similarity(
    model: ModelOptions,
    text: TextOptions,
    run: RunOptions,
    out: Annotated[
        Path | None,
        Option("also write OUT.csv, .tex, .png, .svg and .html", ("--out", "-o")),
    ] = None,
) -> None:
    """Show how similar each layer's features are to the previous layer's (the paper's
    Fig. 1).
    """
    from ..measuring.quality import measure_similarity

    if out:
        need(*FIGURES)
        _check_writable(out)
    text.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=run.seed)
    with progress_bar() as progress:
        found = measure_similarity(
            net, tracked(batches, "comparing the layers", progress)
        )
    tables = {
        "similarity": table(
            "cosine of the residual stream before and after", SIMILARITY, found
        )
    }
    then = []
    if out:
        text_in_words = windows_in_words(described)
        written = write_similarity(found, out, model.model, text_in_words)
        then = [f"Written: {', '.join(map(str, written))}"]
    show(tables, as_json=run.as_json, then=then)


def _check_writable(out: Path) -> None:
    """Raise `UsageError` where the files of a similarity cannot be written, or others'
    are in their place.
    """
    refuse_unwritable(out.parent)
    csv = Path(f"{out}.csv")
    refuse_others(
        csv, lambda file: b"layer,kind," in contents(file), "table of similarities"
    )
    if not csv.exists():
        for suffix in (".tex", ".png", ".svg", ".html"):
            refuse_others(
                Path(f"{out}{suffix}"), lambda _: False, "figure of similarities"
            )


@command(example='notall generate smollm2 "The capital of France is" --plan plan.json')
def generate(
    *,
    model: ModelOptions = ModelOptions(model=...),  # type: ignore[arg-type]
    prompt: Annotated[str, Option("what to continue", metavar="PROMPT", argument=True)],
    plan: PlanOptions,
    max_new_tokens: Annotated[int, Option("most tokens to generate")] = 64,
    temperature: Annotated[
        float, Option("how freely to choose; 0 takes the most likely token each time")
    ] = 0.0,
    chat: Annotated[
        bool, Option("put the prompt into the model's chat template", ("--chat",))
    ] = False,
    with_original: Annotated[
        bool, Option("show the original model's answer too", ("--beside",))
    ] = False,
    seed: Seed = 0,
) -> None:
    """Continue a prompt with the skipped model. The text is printed as it comes."""
    from ..running.generating import Streamer, generate_text

    plan.check(needed=with_original, model=model.model)
    model.check_plan(plan.named)
    net, tokenizer = model.load()
    write_text = partial(
        generate_text, net, tokenizer, prompt=prompt, max_new_tokens=max_new_tokens
    )
    write_text = partial(write_text, temperature=temperature, chat=chat, seed=seed)
    wanted = plan.of(net)
    if not with_original:
        write_text(plan=wanted, streamer=Streamer(tokenizer, _write))
        print()
        return
    plans = {"dense": Plan(), wanted.state: wanted}
    with side_by_side([*plans]) as write:
        for name, one in plans.items():
            write_text(plan=one, streamer=Streamer(tokenizer, partial(write, name)))


@contextmanager
def side_by_side(names: Sequence[str]) -> Iterator[Callable[[str, str], None]]:
    """What adds text to a column, by name: columns grow at a terminal; elsewhere all
    comes at the end.
    """
    console, written = Console(), dict.fromkeys(names, "")
    live = (
        Live(console=console, auto_refresh=False, vertical_overflow="visible")
        if sys.stdout.isatty()
        else None
    )

    def write(name: str, text: str) -> None:
        written[name] += text
        if live:
            columns = Table(
                *(RichColumn(name, ratio=1) for name in written), expand=True
            )
            columns.add_row(
                *(Text(_printable_lines(text, console)) for text in written.values())
            )
            live.update(columns, refresh=True)

    with live or nullcontext():
        yield write
    if not live:
        for name, text in written.items():
            console.print(
                Text(f"{name}:\n{_printable_lines(text, console)}\n"), soft_wrap=True
            )


def _write(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))), end="", flush=True)


def _printable_lines(text: str, console: Console) -> str:
    """What a model says keeps its lines, and steers no terminal."""
    return "\n".join(
        printable(line, console.encoding) for line in text.strip("\n").split("\n")
    )
