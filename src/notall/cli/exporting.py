"""The command that turns a plan into files for engines."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..records.columns import Row, in_bytes
from ..records.strict_json import read_json
from ..reporting.console import Shown, show_all
from ..reporting.progress_bars import progress_bar
from .app import TAKE, app
from .checks import check_folders, check_texts
from .ending import conclude, warn_if_worse
from .inputs import Loading, load_model, provenance_of, read_plan, text_batches
from .options import Json, Model, OwnDtype, Repair, RepairSequences, RepairText, Revision, Trust

if TYPE_CHECKING:
    from ..records.plan import Plan
    from ..reporting.verdict import Verdict


class Target(str, Enum):
    hf = "hf"
    nemotron_nas = "nemotron-nas"
    gguf = "gguf"


@app.command(
    rich_help_panel=TAKE, epilog="Example:  notall export smollm2 --plan plan.json --to hf --out smollm2-pruned"
)
def export(
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", help="plan file, or the folder of a repair")],
    to: Annotated[Target, typer.Option("--to", metavar="FORM", help="hf, nemotron-nas or gguf: see docs/engines.md")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write, which does not exist yet")],
    measure: Annotated[
        str | None, typer.Option(help="measure the plan on this text, as --text of eval, for the model card")
    ] = None,
    repair: Repair = False,
    repair_text: RepairText = None,
    repair_sequences: RepairSequences = None,
    verify: Annotated[bool, typer.Option(help="run what was written, and compare it with the skipped model")] = True,
    push_to_hub: Annotated[str | None, typer.Option(help="upload the export to this repository of the hub")] = None,
    dtype: OwnDtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write the model without what the plan skips, as files that engines load.

    OUT appears whole or not at all.
    """
    from ..exporters import check_export
    from ..exporters import export as export_model
    from .columns import FILE_COLUMNS

    kept = out.with_name(f"{out.name}.repaired")
    check_folders(repair=kept if repair else None)
    wanted = read_plan(plan)
    check_texts(measure, *(repair_text or []))
    if repair or measure:
        how: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
        check_export(model, wanted, to.value, out, **how)
    quality = None
    if repair:
        wanted, quality = _repaired(model, wanted, repair_text, repair_sequences, kept, revision, trust_remote_code)
    measured, verdict = _measured(model, wanted, measure, revision, trust_remote_code) if measure else (None, None)
    with progress_bar() as progress:
        export_model(
            model,
            wanted,
            to.value,
            out,
            measured=measured,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            verify=verify,
            push_to_hub=push_to_hub,
            progress=progress,
        )
    rows = [{"file": file.name, "bytes": file.stat().st_size} for file in sorted(out.iterdir())]
    ending = _conclusion(out, to)
    tables = ({"quality": quality} if quality else {}) | {"files": Shown(rows, FILE_COLUMNS, f"{out}: skips {wanted}")}
    also = {name.lower(): line for name, line in ending.items()} | ({"verdict": verdict.row()} if verdict else {})
    show_all(tables, as_json=as_json, also=also)
    if not wanted:
        typer.echo(f"note: the plan skips nothing, so {out} is the dense model", err=True)
    warn_if_worse(quality.rows if quality else ())
    if verdict:
        conclude(verdict, as_json=as_json)
    for name, line in ending.items():
        typer.echo(f"{name + ':':9}{line}", err=as_json)


BROKEN = (
    "kinds of layers no longer come again every {} layers; an engine that counts them so, as MLX-LM and llama.cpp do "
    "for some models, runs this wrong: choose with --kind period"
)


def _repaired(
    model: str,
    plan: Plan,
    texts: list[str] | None,
    sequences: int | None,
    kept: Path,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Plan, Shown | None]:
    """The plan after a repair, which is in the folder `kept`, and what it costs before and after; None without one."""
    from ..repairing.measured import measure
    from ..running.repaired import RepairedPlan
    from .repairing import other_windows, repaired_by, shown_quality

    if not plan or isinstance(plan, RepairedPlan):
        return plan, None
    net, tokenizer = load_model(Loading(model, revision=revision, trust_remote_code=trust_remote_code))
    settings = provenance_of(net, model, revision)
    with progress_bar() as progress:
        repaired = repaired_by(net, tokenizer, plan, texts, kept, settings, progress, sequences=sequences)
        others = {name: rows[:8] for name, rows in other_windows(net, tokenizer, texts or ["prose"]).items()}
        measured = measure(net, {"skipped": plan, "repaired": repaired}, others, kept, settings, progress)
    return repaired, shown_quality(measured, f"skip {plan}: before the repair and after it")


def _conclusion(out: Path, to: Target) -> dict[str, str]:
    """What one wants to know of an export: was it checked, how small is it, how is it run and served."""
    from ..exporters.manifest import read_manifest, verdict_of

    manifest = read_manifest(out)
    dense, written = (manifest["weight_bytes"][name] for name in ("dense", "written"))
    in_dtype = f" in {named}" if (named := _dtype_of(out)) else ""
    return {
        "Check": str(verdict_of(manifest)),
        "Weights": f"{in_bytes(written)}, {written / dense:.0%} of the dense model's {in_bytes(dense)}{in_dtype}",
        **({"Period": BROKEN.format(period)} if (period := manifest.get("breaks_period")) else {}),
        **_commands(out, to, manifest["model_type"].startswith("notall_")),
    }


def _dtype_of(out: Path) -> str | None:
    """What a checkpoint's config says of its numbers; a GGUF has types for each tensor."""
    config = out / "config.json"
    told = read_json(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return next((str(told[name]) for name in ("dtype", "torch_dtype") if told.get(name)), None)


def _commands(out: Path, to: Target, own_code: bool) -> dict[str, str]:
    """What to type next; `own_code`: the checkpoint brings a modeling file along."""
    folder, prompt = shlex.quote(str(out)), "'The capital of France is'"
    if to is Target.gguf:
        return {"Next": f"llama-cli -m {shlex.quote(str(next(out.glob('*.gguf'))))} -fa on"}
    if to is Target.nemotron_nas:
        return {"Next": f"mlx_lm.generate --model {folder} --prompt {prompt}"}
    served = {"Serve": f"vllm serve {folder}"}
    if own_code:  # with notall beside vLLM, and with vLLM alone
        served["Alone"] = f"vllm serve {folder} --trust-remote-code"
    return {"Next": f"notall generate {folder} {prompt}", **served}


def _measured(model: str, plan: Plan, text: str, revision: str | None, trust_remote_code: bool) -> tuple[Row, Verdict]:
    """What the plan costs on 8 windows of 256 tokens of a text: for the model card, and in words."""
    from ..measuring.quality import evaluate
    from ..records.plan import Plan
    from ..records.record import DELTA_NLL, KL, PERPLEXITY, TOP1
    from ..reporting.verdict import Verdict, left_out_of
    from ..structure.anatomy import positions_of

    net, tokenizer = load_model(Loading(model, revision=revision, trust_remote_code=trust_remote_code))
    length = int(min(256, positions_of(net)))
    batches, described = text_batches(net, tokenizer, text, 8, length, 4, 0)
    before = [plan.unrepaired] if hasattr(plan, "unrepaired") else []
    dense, *unrepaired, skipped = evaluate(net, [Plan(), *before, plan], batches)
    card = {
        "text": f"{described['text']}, 8 windows of {length} tokens",
        f"{PERPLEXITY.heading} of the dense model": PERPLEXITY.text(asdict(dense)),
        **{column.titled: column.text(asdict(skipped)) for column in (PERPLEXITY, DELTA_NLL, KL, TOP1)},
        **{f"{DELTA_NLL.titled}, before the repair": DELTA_NLL.text(asdict(one)) for one in unrepaired},
    }
    return card, Verdict(*left_out_of(net, plan), quality=asdict(skipped), text=described["text"])
