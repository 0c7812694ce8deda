"""The command line: each command reads its options, calls one function, and prints what it answers."""

from __future__ import annotations

import errno
import logging
import os
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Column, number, plain, progress_bar, show, size, with_error, with_spread
from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .plan import Plan

app = typer.Typer(
    name="notall",
    help="Leave out what a language model does not need: attentions, MLPs or whole blocks, without training.\n\n"
    "First run:  [bold]notall sweep --out results[/bold]  (the paper's experiment on a small model that ships along)",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2, a hub id, a folder, or a .gguf file")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
DeviceMap = Annotated[str | None, typer.Option(help="spread over devices with accelerate: auto, balanced ...")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own code from the hub")]
Attention = Annotated[str | None, typer.Option(help="attention implementation: sdpa, eager, flash_attention_2 ...")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="plan file, as `notall plan` writes it")]
TextSource = Annotated[
    str, typer.Option("--text", help="UTF-8 file or .jsonl with a `text` column; prose: ships with Python")
]
Sequences = Annotated[int, typer.Option(help="how many windows of text")]
Length = Annotated[int, typer.Option(help="tokens a window")]
BatchSize = Annotated[int, typer.Option(help="windows at a time")]
Seed = Annotated[int, typer.Option(help="seed of what is drawn")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Prompt = Annotated[int, typer.Option("--prompt", help="prompt tokens when timing")]
New = Annotated[int, typer.Option("--new", help="new tokens when timing")]
Rounds = Annotated[int, typer.Option(help="timed rounds, dense and skipped in turn")]


class Skippable(str, Enum):
    attention = "attention"
    mlp = "mlp"
    block = "block"


@app.command(epilog="Example:  notall sweep smollm2 --out results")
def sweep(
    model: Model = "smollm2",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for results.jsonl and figures")] = Path("results"),
    text: TextSource = "prose",
    sequences: Sequences = 8,
    length: Length = 256,
    batch_size: BatchSize = 4,
    prompt: Prompt = 128,
    new: New = 16,
    rounds: Rounds = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the paper's grid: dense and attention, mlp, block x 10, 25, 33 % x keep the last layer or not.

    Interrupted, the same command goes on where it stopped.
    """
    from . import grid, plots, similarity

    net, tokenizer = _load(model, dtype, device, device_map, attn_implementation, revision, trust_remote_code)
    batches, described = _batches(net, tokenizer, text, sequences, length, batch_size, seed)
    provenance = _provenance(net, model, revision) | described
    timed = grid.Timed(prompt, new, rounds=rounds)
    with progress_bar() as progress:
        records = grid.sweep(net, batches, out, provenance, timed=timed, seed=seed, progress=progress)
    rows = [asdict(row) for row in similarity.measure_similarity(net, batches)]
    name = provenance["model"]
    plots.save(plots.similarity_chart(rows, f"Similarity by depth, {name}"), out / "similarity")
    plots.save(plots.tradeoff_chart(records, f"Quality lost against decode speedup, {name}"), out / "tradeoff")
    show(
        records,
        GRID_COLUMNS,
        as_json=as_json,
        title=f"{name}: {len(records)} configurations in {out / grid.RESULTS}",
    )


@app.command(epilog="Example:  notall inspect llama-2-70b")
def inspect(
    model: Model = "smollm2",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show every sublayer: kind, index, parameters, share of the weights, KV bytes a token. Needs only a config."""
    from .anatomy import locate
    from .footprint import footprint
    from .plan import Plan

    net = _empty(model, revision, trust_remote_code)
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
        }
        for part in anatomy.sublayers
    ]
    shape = "parallel blocks" if any(block.parallel for block in anatomy.blocks) else "blocks"
    title = (
        f"{anatomy.fingerprint}: {len(anatomy.blocks)} {shape}, {total.params:,} parameters, "
        f"{total.kv_bytes_per_token:,} KV bytes a token"
    )
    show(rows, INSPECT_COLUMNS, as_json=as_json, title=title)


@app.command(epilog="Example:  notall similarity smollm2 --out similarity")
def similarity(
    model: Model = "smollm2",
    text: TextSource = "prose",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="draw it to OUT.png, OUT.svg and OUT.html")] = None,
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
    from .similarity import measure_similarity

    net, tokenizer = _load(model, dtype, device, None, None, revision, trust_remote_code)
    batches, _ = _batches(net, tokenizer, text, sequences, length, batch_size, seed)
    rows = [asdict(row) for row in measure_similarity(net, batches)]
    if out:
        from . import plots

        plots.save(plots.similarity_chart(rows, f"Similarity by depth, {model}"), out)
    show(rows, SIMILARITY_COLUMNS, as_json=as_json, title="cosine of the residual stream before and after")


@app.command(epilog="Example:  notall plan smollm2 --skip attention --fraction 0.33 --keep-last -o plan.json")
def plan(
    model: Model = "smollm2",
    skip: Annotated[Skippable, typer.Option(help="what to leave out")] = Skippable.attention,
    fraction: Annotated[
        float, typer.Option(help="share of the layers, 0 to 1; round(fraction x layers) are skipped")
    ] = 0.33,
    keep_last: Annotated[bool, typer.Option("--keep-last", help="preserve the last layer")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write the paper's plan: skip the deepest sublayers. Needs only a config."""
    from .footprint import footprint
    from .plan import Plan

    net = _empty(model, revision, trust_remote_code)
    chosen = _deepest(net, skip, fraction, keep_last)
    chosen.save(out)
    rows = [
        {"model": name, **asdict(footprint(net, which))} for name, which in (("dense", Plan()), ("skipped", chosen))
    ]
    show(rows, FOOTPRINT_COLUMNS, as_json=as_json, title=f"{out}: skip {chosen}")


@app.command(name="eval", epilog="Example:  notall eval smollm2 --plan plan.json --text book.txt")
def evaluate(
    model: Model = "smollm2",
    plan: PlanFile = None,
    text: TextSource = "prose",
    sequences: Sequences = 8,
    length: Length = 256,
    batch_size: BatchSize = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure what a plan costs on a text: NLL, KL to the dense model, agreement, each with its standard error."""
    from .plan import Plan
    from .quality import evaluate as evaluate_plans

    wanted = _plan(plan)
    net, tokenizer = _load(model, dtype, device, device_map, attn_implementation, revision, trust_remote_code)
    batches, _ = _batches(net, tokenizer, text, sequences, length, batch_size, seed)
    found = evaluate_plans(net, [Plan(), wanted], batches)
    rows = [{"model": name, **asdict(row)} for name, row in zip(("dense", "skipped"), found)]
    show(rows, QUALITY_COLUMNS, as_json=as_json, title=f"skip {wanted}")


@app.command(epilog="Example:  notall bench --shape llama-2-7b --dummy-weights --skip attention --fraction 0.33")
def bench(
    model: Model = "smollm2",
    plan: PlanFile = None,
    skip: Annotated[Skippable | None, typer.Option(help="or: skip the deepest of these")] = None,
    fraction: Annotated[float, typer.Option(help="with --skip: share of the layers")] = 0.33,
    keep_last: Annotated[bool, typer.Option("--keep-last", help="with --skip: preserve the last layer")] = False,
    shape: Annotated[
        str | None,
        typer.Option(help="llama-2-7b, llama-2-13b, llama-2-70b or a config.json, instead of MODEL"),
    ] = None,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="random weights: nothing is downloaded")
    ] = False,
    prompt: Prompt = 128,
    new: New = 32,
    batch_size: Annotated[int, typer.Option(help="sequences at once")] = 1,
    rounds: Rounds = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time prefill and decode, dense and skipped in turn, with a real KV cache."""
    from .speed import machine
    from .timing import time_plan

    if dummy_weights or shape:
        net = _dummy(shape or model, dummy_weights, dtype, device, revision, trust_remote_code, seed)
    else:
        net, _ = _load(model, dtype, device, None, attn_implementation, revision, trust_remote_code)
    wanted = _deepest(net, skip, fraction, keep_last) if skip else _plan(plan)
    rows = time_plan(net, wanted, prompt_tokens=prompt, new_tokens=new, batch_size=batch_size, rounds=rounds, seed=seed)
    about = machine(net.device)
    title = (
        f"{shape or model}, {str(net.dtype).removeprefix('torch.')}, batch {batch_size}, "
        f"prompt {prompt}, {new} new tokens; "
        f"{about['device_name']}, {about['threads']} threads; median of {rounds} [quartiles]"
    )
    show(rows, TIMING_COLUMNS, as_json=as_json, title=title)


@app.command(epilog='Example:  notall generate smollm2 --plan plan.json "The capital of France is"')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="what to continue")],
    plan: PlanFile = None,
    max_new_tokens: Annotated[int, typer.Option(help="how many tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
) -> None:
    """Continue a prompt with the skipped model."""
    from transformers import TextStreamer

    from .generating import generate_text

    wanted = _plan(plan)
    net, tokenizer = _load(model, dtype, device, device_map, None, revision, trust_remote_code)
    generate_text(
        net,
        tokenizer,
        wanted,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        seed=seed,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


# --- the columns of each table ----------------------------------------------------------------------------------------

QUALITY: list[Column] = [
    with_error("nll", "NLL"),
    with_error("delta_nll", "ΔNLL"),
    number("perplexity", "perplexity", ".1f"),
    with_error("kl", "KL"),
    with_error("top1_agreement", "top-1 agreement", ".2f"),
]
SPEEDS: list[Column] = [
    with_spread("prefill_ms", "prefill ms"),
    with_spread("decode_ms_per_token", "decode ms/token"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
    with_spread("speedup_decode", "decode speedup", ".2f"),
]
WEIGHTS: list[Column] = [
    number("params", "parameters", ","),
    size("weight_bytes", "weights"),
    size("kv_bytes_per_token", "KV/token"),
]
GRID_COLUMNS = [
    plain("variant", "skip"),
    number("fraction", "fraction", ".0%"),
    Column("keep last", lambda row: "yes" if row["keep_last"] else "no", right=False),
    with_error("delta_nll", "ΔNLL"),
    number("perplexity", "perplexity", ".1f"),
    number("kl", "KL"),
    number("top1_agreement", "top-1", ".2f"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
    with_spread("speedup_decode", "decode speedup", ".2f"),
    *WEIGHTS,
]
INSPECT_COLUMNS = [
    plain("sublayer"),
    number("parameters", "parameters", ","),
    number("share", "share", ".2%"),
    size("weight_bytes", "weights"),
    size("kv_bytes_per_token", "KV/token"),
]
SIMILARITY_COLUMNS = [number("layer", "layer", "d"), plain("kind"), with_error("cosine", "cosine", ".4f")]
FOOTPRINT_COLUMNS = [plain("model"), *WEIGHTS]
QUALITY_COLUMNS = [plain("model"), *QUALITY, number("sequences", "sequences", "d")]
TIMING_COLUMNS = [plain("model"), *SPEEDS, *WEIGHTS, size("peak_bytes", "peak memory")]


# --- what commands share ----------------------------------------------------------------------------------------------


def _load(
    spec: str,
    dtype: str,
    device: str,
    device_map: str | None,
    attn_implementation: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .models import load

    return load(
        spec,
        dtype=dtype,
        device=device,
        device_map=device_map,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _empty(spec: str, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    from .models import build_empty, load_config

    return build_empty(load_config(spec, revision=revision, trust_remote_code=trust_remote_code))


def _dummy(
    spec: str,
    dummy_weights: bool,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    seed: int,
) -> PreTrainedModel:
    from .models import build_random, load_config, resolve_device, resolve_dtype

    if not dummy_weights:
        raise UsageError("--shape has no weights of its own: add --dummy-weights")
    place = resolve_device(device)
    config = load_config(spec, revision=revision, trust_remote_code=trust_remote_code)
    return build_random(config, dtype=resolve_dtype(dtype, place), device=place, seed=seed)


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    sequences: int,
    length: int,
    batch_size: int,
    seed: int,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Token batches on the model's device, and what they are, for the record."""
    from .texts import read_text, token_batches

    text = read_text(source)
    batches = token_batches(tokenizer, text, sequences=sequences, length=length, batch_size=batch_size, seed=seed)
    described = {"text": text.name, "text_sha256": text.sha256, "sequences": sequences, "length": length}
    return [batch.to(model.device) for batch in batches], described


def _provenance(model: PreTrainedModel, spec: str, revision: str | None) -> dict[str, Any]:
    from .models import identify
    from .speed import machine

    about = machine(model.device)
    return identify(spec, revision=revision) | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": about["device"],
        "threads": about["threads"],
        "versions": about["versions"],
        "machine": about,
    }


def _plan(path: Path | None) -> Plan:
    from .plan import Plan

    return Plan.load(path) if path else Plan()


def _deepest(model: PreTrainedModel, skip: Skippable, fraction: float, keep_last: bool) -> Plan:
    from .anatomy import locate
    from .criteria import deepest

    return deepest(locate(model), skip.value, fraction, keep_last=keep_last)


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2; interrupted, 130."""
    for talker in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is, which then warns
        logging.getLogger(talker).setLevel(logging.ERROR)
    try:
        app()
    except UsageError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{os.strerror(error.errno)}{where}: what is finished is kept; choose another folder or free some space")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
