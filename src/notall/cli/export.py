"""notall export: turn a plan into files for engines."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import read_plan
from ..experiments.options.tasks import TaskChoice, refuse_judging
from ..experiments.options.text import TextOptions
from ..experiments.recovery import RecoveryOptions, judge_recovery, last_state
from ..experiments.repair import RepairOptions
from ..experiments.used import Use, uses_of, windows_of
from ..experiments.verdict import Verdict
from ..exporters import check_export, export as export_model
from ..exporters.manifest import read_manifest, verification_of
from ..options import Json, Option
from ..plan import Plan
from ..progress import Progress
from ..report.plans import scores_table
from ..results.facts import DELTA_NLL, KL, PERPLEXITY, RECOVERED, TOP1, State
from ..results.provenance import this_run
from ..results.record import Count, Fact
from ..results.repairs import MEASURED, MeasuredRecord
from ..results.table import Column, in_bytes, size, table, words
from ..results.terminal import progress_bar, show
from .app import command, conclude, warn

BROKEN = (
    "kinds of layers no longer come again every {} layers; an engine that counts them"
    " so, as MLX-LM and llama.cpp do for some models, runs this wrong: choose with"
    " --skip period"
)


class FileFact(Fact):
    """A file of an export."""

    file: str
    bytes: Count


IN_PROMPTS = (
    "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) and its"
    " `generate`; it saves time to the first token, and neither memory nor time of"
    " decoding"
)
PATCHED = (
    "of llama.cpp with docs/upstream/llamacpp-prefill.patch; it saves time to the first"
    " token, and neither memory nor time of decoding"
)

COLUMNS: tuple[Column[FileFact], ...] = (
    words("file", lambda one: one.file),
    size("size", lambda one: one.bytes),
)

BATCHES = 8  # of a text that a repair is measured on, at most


@command(example="notall export smollm2 --plan plan.json --to hf --out smollm2-pruned")
def export(
    plan: Annotated[Path, Option("plan file, folder of a repair, or published:NAME")],
    to: Annotated[
        str,
        Option(
            "hf, nemotron-nas, gguf, executorch (or -8da4w), swiftkv, or a"
            " module:Class",
            metavar="FORM",
        ),
    ],
    out: Annotated[
        Path, Option("folder to write, which does not exist yet", ("--out", "-o"))
    ],
    repair: RepairOptions,
    tasks: RecoveryOptions,
    model: ModelOptions = ModelOptions(model=...),  # type: ignore[arg-type]
    measure: Annotated[
        str | None, Option("measure the plan on this text, for the model card")
    ] = None,
    verify: Annotated[
        bool,
        Option(
            "run it, and compare it with the pruned model", ("--verify/--no-verify",)
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Write the model without what the plan skips, as files that engines load.

    OUT appears whole or not at all. `hf upload` puts it on the hub.
    """
    repair_folder = out.with_name(f"{out.name}.repaired")
    wanted = read_plan(plan)
    repair.check(repair_folder)
    if measure:
        TextOptions(text=measure).check()
    choice = tasks.check()
    refuse_judging(choice, repair.sources if repair else ())
    if repair or measure or choice:
        check_export(model.source, wanted, to, out)
    with progress_bar() as progress:
        wanted, measured = _repaired(
            model, plan, wanted, repair, repair_folder, progress
        )
        used = uses_of(wanted, plan)
        card, verdict = None, None
        if measure or choice:
            card, verdict = _measure_plan(
                model, wanted, measure, used, choice, progress
            )
        export_model(
            model.source,
            wanted,
            to,
            out,
            measured=card,
            verify=verify,
            command=str(this_run()["command"]),
            progress=progress,
        )
    files = [
        FileFact(file=file.name, bytes=file.stat().st_size)
        for file in sorted(out.iterdir())
    ]
    ending = conclusion_of(out, to)
    tables = {"files": table(f"{out}: skips {wanted}", COLUMNS, files)}
    if verdict and verdict.scores:
        tables = {"tasks": scores_table(verdict.scores)} | tables
    if measured:
        title = f"skip {wanted}: before the repair and after it"
        tables = {"quality": table(title, MEASURED, measured)} | tables
    also: dict[str, object] = {name.lower(): line for name, line in ending.items()}
    also |= {"verdict": verdict.in_numbers()} if verdict else {}
    show(tables, as_json=as_json, also=also)
    if not wanted:
        print(
            f"note: the plan skips nothing, so {out} is the original model",
            file=sys.stderr,
        )
    warn(measured)
    if verdict:
        conclude(verdict, as_json=as_json)
    for name, line in ending.items():
        print(f"{name + ':':9}{line}", file=sys.stderr if as_json else sys.stdout)


def _repaired(
    model: ModelOptions,
    path: Path,
    plan: Plan,
    repair: RepairOptions,
    folder: Path,
    progress: Progress,
) -> tuple[Plan, list[MeasuredRecord]]:
    """The plan after a repair, which is in `folder`, and what it costs before and
    after; none without one.
    """
    from ..repairing.texts import measure_on_texts

    if not repair or not plan or plan.state == "repaired":
        return plan, []
    # as its files have it: `--dtype` is that of the export
    net, tokenizer = replace(model, dtype="auto").load()
    settings = model.provenance(net)
    used = windows_of(uses_of(plan, path), net, tokenizer, repair.sources)
    texts = repair.texts(net, tokenizer, progress, used=used)
    repaired = repair.apply(net, plan, texts, folder, settings, progress)
    others = {name: batches[:BATCHES] for name, batches in texts.other.items()}
    plans: dict[State, Plan] = {"skipped": plan, "repaired": repaired}
    return repaired, measure_on_texts(net, plans, others, folder, settings, progress)


def conclusion_of(out: Path, to: str) -> dict[str, str]:
    """Whether an export was verified, how small it is, and how it is run and served."""
    manifest, config = read_manifest(out), out / "config.json"
    dense, written = (manifest["weight_bytes"][name] for name in ("dense", "written"))
    weights = f"{in_bytes(written)}, {written / dense:.0%} of the original model's"
    weights += f" {in_bytes(dense)}"
    # a GGUF has types for each tensor
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    if dtype := settings.get("dtype") or settings.get("torch_dtype"):
        weights += f" in {dtype}"
    lines = {"Check": str(verification_of(manifest)), "Weights": weights}
    if period := manifest.get("breaks_period"):
        lines["Period"] = BROKEN.format(period)
    return lines | _how_to_run(out, to, manifest)


def _how_to_run(out: Path, to: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The commands that run and serve an export; none of a target of someone's own,
    whose model card has them.
    """
    folder, prompt = shlex.quote(str(out)), "'The capital of France is'"
    in_prompts = "prefill" in manifest["plan"]
    if to == "gguf":
        file = shlex.quote(str(next(out.glob("*.gguf"))))
        run = f"llama-cli -m {file} -fa on"
        return {"Next": f"{run}, {PATCHED}" if in_prompts else run}
    if to == "nemotron-nas":
        return {"Next": f"mlx_lm.generate --model {folder} --prompt {prompt}"}
    if to == "swiftkv":
        serve = f"ARCTIC_INFERENCE_ENABLED=1 vllm serve {folder}   # with a GPU"
        return {"Serve": serve}
    if to != "hf":
        return {}
    if in_prompts:
        return {"Next": IN_PROMPTS}
    lines = {
        "Next": f"notall generate {folder} {prompt}",
        "Serve": f"vllm serve {folder}",
    }
    # served with notall next to vLLM, and by vLLM alone
    if manifest["model_type"].startswith("notall_"):
        lines["Alone"] = f"vllm serve {folder} --trust-remote-code"
    return lines


def _measure_plan(
    model: ModelOptions,
    plan: Plan,
    text: str | None,
    used: Sequence[Use],
    tasks: TaskChoice,
    progress: Progress,
) -> tuple[Mapping[str, str], Verdict]:
    """What the plan costs on 8 windows of 256 tokens of a text, none of them `used` to
    make it, and on tasks.

    For the model card, and in words.
    """
    from ..measuring.quality import evaluate
    from ..structure.model_structure import positions_of

    net, tokenizer = replace(model, dtype="auto").load()
    plans: dict[State, Plan] = {"skipped": plan.unrepaired, plan.state: plan}
    card, quality, named = dict[str, str](), None, ""
    if text:
        length = int(min(256, positions_of(net)))
        apart = windows_of(used, net, tokenizer, [text])
        windows = TextOptions(text, 8, length)
        batches, described = windows.windows(net, tokenizer, apart=apart)
        # of one plan without a repair, of two with one
        dense, *unrepaired, quality = evaluate(net, [Plan(), *plans.values()], batches)
        named = described["text"]
        card["text"] = f"{named}, 8 windows of {length} tokens"
        card[f"{PERPLEXITY.heading} of the original model"] = PERPLEXITY.text(dense)
        for column in (PERPLEXITY, DELTA_NLL, KL, TOP1):
            card[column.titled] = column.text(quality)
        for one in unrepaired:
            card[f"{DELTA_NLL.titled}, before the repair"] = DELTA_NLL.text(one)
    scores = judge_recovery(net, tokenizer, plans, tasks.jobs(), tasks, None, progress)
    for score in last_state(scores):
        if score.recovery:
            name = f"Recovery, {score.task} ({score.usual_metric})"
            card[name] = RECOVERED.text(score)
    verdict = Verdict.on(net, plan, quality, named, spec=model.model)
    return card, verdict.judged(scores, tasks.recovery)
