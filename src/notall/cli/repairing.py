"""The commands that make up for what a plan skips."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, shortened
from ..records.columns import Row
from ..records.ledger import read
from ..records.lines import refuse_unwritable
from ..records.search import SearchRecord
from ..reporting.console import Shown, show_all
from ..reporting.progress_bars import progress_bar
from .app import REPAIR, app
from .checks import check_folders, check_texts
from .ending import conclude, warn_if_worse
from .inputs import Loading, load_model, provenance_of, read_plan, text_batches
from .options import (
    BatchSize,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Length,
    Model,
    PlanFile,
    Ray,
    RayWorkers,
    Revision,
    Seed,
    Trust,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..progress import Progress
    from ..records.measured import MeasuredRecord, State
    from ..records.plan import Plan
    from ..records.provenance import Provenance
    from ..repairing.spreading import Spread
    from ..reporting.verdict import Verdict
    from ..running.repaired import RepairedPlan

REFIT = "refit"  # the method that is the default
SEQUENCES, LENGTH = 128, 512  # windows that a repair is fitted to, and their tokens
TOKENS = 131_072  # that are trained on
MEASURED = 16  # windows of each text that what came out is measured on


class Train(str, Enum):
    outputs = "outputs"
    all = "all"
    lora = "lora"


@app.command(
    rich_help_panel=REPAIR,
    epilog="Example:  notall repair smollm2 --plan plan.json --text book.txt --text pages.jsonl --out repaired",
)
def repair(
    model: Model = "smollm2",
    plan: PlanFile = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the plan and its weights")] = Path("repaired"),
    text: Annotated[
        list[str] | None,
        typer.Option(help="text to fit to; repeat it, since two kinds repair better than one (default: prose)"),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="text to measure on; repeat it for more (default: other windows of each --text)"),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help=f"windows to fit to, of all texts together (default: up to {SEQUENCES})")
    ] = None,
    length: Length = LENGTH,
    batch_size: BatchSize = 8,
    method: Annotated[
        str,
        typer.Option(help="how: refit, replaceme, prune-and-comp, or a function of your own, as module:function"),
    ] = REFIT,
    streams: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="keep the text's streams in files in this folder, if memory is short"),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Refit what a plan keeps, so that it makes up for what the plan skips.

    Nothing is trained, no tensor is added, and it costs nothing later. OUT is a plan with weights: give it as
    --plan to eval, generate, bench or export. If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.measured import measure
    from ..structure.locating import locate

    check_folders(repair=out)
    if streams:
        refuse_unwritable(streams)
    _refuse_method(method, streams)
    wanted = _given(plan)
    check_texts(*(text or ["prose"]), *(held_out or []))
    loading = Loading(model, dtype, device, device_map, revision=revision, trust_remote_code=trust_remote_code)
    net, tokenizer = load_model(loading)
    wanted.check(locate(net))
    texts = _Texts.drawn(net, tokenizer, text or ["prose"], held_out or [], sequences, length, seed)
    settings = provenance_of(net, model, revision, **texts.described)
    with progress_bar() as progress:
        fit = texts.together(batch_size)
        repaired = _repaired_by(method, net, wanted, fit, out, settings, streams, progress)
        measured = measure(net, {"skipped": wanted, "repaired": repaired}, texts.other, out, settings, progress)
    quality = shown_quality(measured, f"skip {wanted}: before the repair and after it")
    verdict = _verdict_of(quality.rows[-1], model, net, wanted, out)
    tables = {**(_refits(repaired, out, as_json) if method == REFIT else {}), "quality": quality}
    show_all(tables, as_json=as_json, also={"verdict": verdict.row()})
    warn_if_worse(quality.rows)
    conclude(verdict, as_json=as_json)


def _refuse_method(name: str, streams: Path | None) -> None:
    """Raise `UsageError` for a repair that there is none of, that no plan can keep, or that knows no streams."""
    from ..repairing.methods import method

    adds = method(name).adds
    if adds != "nothing":
        raise UsageError(
            f"{shortened(name)} keeps {adds} at run time, which no checkpoint has room for: measure it with `notall "
            f"compare --repair {shortened(name)}`, or leave out --method"
        )
    if streams and name != REFIT:
        raise UsageError(f"--streams goes with --method {REFIT}, the default")


def _repaired_by(
    method: str,
    net: PreTrainedModel,
    plan: Plan,
    fit: list[Tensor],
    out: Path,
    settings: Provenance,
    streams: Path | None,
    progress: Progress,
) -> RepairedPlan:
    if method == REFIT:
        from ..repairing.refitting import repair

        return repair(net, plan, fit, streams=streams, folder=out, settings=settings, progress=progress)
    from ..repairing.methods.keeping import repair_into

    return repair_into(out, method, net, plan, fit, settings, progress)


def _verdict_of(measured: Row, model: str, net: PreTrainedModel, plan: Plan, out: Path) -> Verdict:
    """What a plan comes to with the weights in `out`, as it was measured last; it is healed where it is of no use."""
    from ..reporting.verdict import Verdict, left_out_of, mending, next_command

    exported = next_command("export", model, plan=out, to="hf", out=out.with_name(f"{out.name}-pruned"))
    verdict = Verdict(*left_out_of(net, plan), measured, measured["text"])
    return verdict.then(mending(model, out, repaired=True) if measured["model"] == "repaired" else exported, exported)


def _refits(repaired: RepairedPlan, out: Path, everything: bool) -> dict[str, Shown]:
    """What became of each sublayer; at the terminal only where much did."""
    from ..records.columns import given
    from ..records.repair import LITTLE, RefitRecord

    told = [one for one in repaired.refits if everything or (one.left or 0.0) <= 1 - LITTLE or one.why]
    refits: list[Row] = [one.row() | ({} if everything or one.why else {"why": None}) for one in told]
    columns = given(RefitRecord.columns, refits)
    less = "" if everything else f"; shown are those that mend over {LITTLE:.0%}"
    return {"refits": Shown(refits, columns, f"{out}: {_counted(repaired)}{less}")}


@app.command(
    rich_help_panel=REPAIR,
    epilog="Example:  notall heal smollm2 --plan repaired --text book.txt --text pages.jsonl --out healed",
)
def heal(
    model: Model = "smollm2",
    plan: PlanFile = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the plan and its weights")] = Path("healed"),
    text: Annotated[
        list[str] | None, typer.Option(help="text to train on; repeat it for more (default: prose)")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="text to measure on; repeat it for more (default: other windows of each --text)"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens to train on, of all texts together (default: up to 131,072)")
    ] = None,
    length: Length = 512,
    batch_size: BatchSize = 4,
    train: Annotated[
        Train,
        typer.Option(
            metavar="WHAT",
            help="what to train: outputs (norms and output projections), all (every kept weight), or lora (thin "
            "matrices beside each kept one, added to it in the end)",
        ),
    ] = Train.outputs,
    rank: Annotated[
        int | None, typer.Option(help="rank of the matrices of --train lora (default: 16)", show_default=False)
    ] = None,
    rate: Annotated[float, typer.Option(help="the learning rate to begin with")] = 3e-4,
    warm_up: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="for this share of the tokens, 0 to 1, train each kept sublayer alone to the dense model's stream",
        ),
    ] = 0.0,
    sample: Annotated[
        bool, typer.Option("--sample", help="train on what the dense model writes, from the first words of each window")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train what a plan keeps for some minutes, so that it says what the dense model says.

    The plan may be repaired already. Training stops early when text that it does not train on no longer gains.
    OUT is a plan with weights, like that of `notall repair`.
    If you interrupt it, the same command continues where it stopped.
    """
    from ..records.healing import HealRecord
    from ..repairing.healing import heal as heal_plan
    from ..repairing.measured import measure
    from ..repairing.sampling import sampled
    from ..repairing.students import RANK
    from ..running.repaired import RepairedPlan
    from ..structure.locating import locate

    check_folders(heal=out)
    wanted = _given(plan)
    check_texts(*(text or ["prose"]), *(held_out or []))
    if not 0 < rate < 1:
        raise UsageError(f"--rate {rate} is no learning rate: give one such as 3e-4")
    if rank is not None and (train != Train.lora or rank < 1):
        raise UsageError(f"--rank {shortened(rank)} is of no use here: give 1 or more, with --train lora")
    if tokens is not None and tokens < length:
        raise UsageError(f"--tokens {shortened(tokens)} is less than one window of {length}: give more")
    loading = Loading(model, dtype, device, revision=revision, trust_remote_code=trust_remote_code)
    workers = _workers(loading, ray, ray_workers, batch_size)
    net, tokenizer = load_model(loading)
    wanted.check(locate(net))
    sequences = None if tokens is None else tokens // length
    texts = _Texts.drawn(
        net, tokenizer, text or ["prose"], held_out or [], sequences, length, seed, most=TOKENS // length
    )
    settings = provenance_of(net, model, revision, **texts.described, **({"sampled": True} if sample else {}))
    with progress_bar() as progress:
        fit, stop = texts.together(batch_size), texts.stop(batch_size)
        if sample:
            fit = sampled(net, fit, out, settings, seed=seed, progress=progress)
        healed = heal_plan(
            net,
            wanted,
            fit,
            stop,
            train=train.value,
            rank=rank or RANK,
            rate=rate,
            warm_up=warm_up,
            folder=out,
            settings=settings,
            seed=seed,
            workers=workers,
            progress=progress,
        )
        before: State = "repaired" if isinstance(wanted, RepairedPlan) else "skipped"
        measured = measure(net, {before: wanted, "healed": healed}, texts.other, out, settings, progress)
    looks: list[Row] = [look.row() for look in read(out / HealRecord.file, HealRecord)]
    tables = {
        "healing": Shown(looks, HealRecord.columns, f"{out}: what it loses on text that was not trained on"),
        "quality": shown_quality(measured, f"skip {wanted}: before the healing and after it"),
    }
    verdict = _verdict_of(tables["quality"].rows[-1], model, net, wanted, out)
    show_all(tables, as_json=as_json, also={"verdict": verdict.row()})
    conclude(verdict, as_json=as_json)


def _workers(loading: Loading, address: str | None, count: int | None, batch_size: int) -> Spread | None:
    """Those of `--ray`, which share each batch; None without it."""
    if address is None:
        return None
    from ..repairing.spreading import Spread

    spread = Spread(asdict(loading), address, count)
    spread.check(batch_size)
    return spread


def repaired_by(
    net: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    texts: list[str] | None,
    folder: Path | None,
    settings: Provenance,
    progress: Progress,
    *,
    sequences: int | None = None,
) -> Plan:
    """The plan after a repair, for `--repair` of other commands: of the usual size, unless `sequences` says another."""
    from ..repairing.refitting import repair as repair_plan
    from ..running.repaired import RepairedPlan

    if not plan or isinstance(plan, RepairedPlan):
        return plan
    drawn = _Texts.drawn(net, tokenizer, texts or ["prose"], [], sequences, _usual_length(net), 0)
    about = {**settings.what, **drawn.described}
    return repair_plan(net, plan, drawn.together(8), folder=folder, settings=about, progress=progress)


def other_windows(
    net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[str, list[Tensor]]:
    """Windows of the texts that `repaired_by` does not fit to, by name."""
    return _Texts.drawn(net, tokenizer, texts, [], None, _usual_length(net), 0).other


def _usual_length(net: PreTrainedModel) -> int:
    """Tokens of a window, as many as the model reads."""
    from ..structure.anatomy import positions_of

    return int(min(LENGTH, positions_of(net)))


def warn_of_own_text(plan: Plan, described: dict[str, Any], path: Path | None = None) -> None:
    """Say so where a plan is measured on the text that its repair was fitted to, or that it was chosen by.

    What it was chosen by is in the folder that a search leaves beside the plan at `path`.
    """
    own = {text.text_sha256: "repaired with" for step in getattr(plan, "history", ()) for text in step.texts}
    found = path.with_suffix(".search") / SearchRecord.file if path else None
    if found and found.is_file():
        with suppress(UsageError):  # a damaged file is nothing to stop for
            chosen = [record.provenance for record in read(found, SearchRecord) if record.plan.indices == plan.indices]
            own = {str(about.what.get("text_sha256")): "chosen by" for about in chosen if about} | own
    if how := own.get(described["text_sha256"]):
        text = shortened(described["text"])
        note = f"note: the plan was {how} {text}, where it looks better than it is; measure on another --text"
        typer.echo(note, err=True)


@dataclass(frozen=True)
class _Texts:
    """Windows to fit to, by text, and to measure on, by name; and what they are, for the record."""

    own: list[list[Tensor]]
    other: dict[str, list[Tensor]]
    described: dict[str, Any]

    @classmethod
    def drawn(
        cls,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        held_out: list[str],
        sequences: int | None,
        length: int,
        seed: int,
        *,
        most: int = SEQUENCES,
    ) -> _Texts:
        """As many of each text, `sequences` together, else what there is, up to `most`; and others, to measure on.

        Those are of the `held_out` texts, or, without any, of the same.
        """
        from ..models.texts import read_text, windows_in

        each = -(-(sequences or most) // len(texts))
        if sequences is None:
            fewest = min(windows_in(tokenizer, read_text(source), length) for source in texts)
            each = max(1, min(each, fewest - (0 if held_out else MEASURED)))
        sequences = each * len(texts)
        own, other, told = list[Any](), dict[str, Any](), list[Row]()
        for source in texts:
            wide = each if held_out else each + MEASURED
            rows, about = text_batches(net, tokenizer, source, wide, length, 1, seed)
            own.append(rows[:each])
            told.append({"text": about["text"], "text_sha256": about["text_sha256"]})
            if not held_out:
                other[f"{about['text']}, other windows"] = rows[each:]
        for source in held_out:
            rows, about = text_batches(net, tokenizer, source, MEASURED, length, 2, seed)
            other[about["text"]] = rows
        return cls(own, other, {"texts": told, "sequences": sequences, "length": length, "seed": seed})

    def together(self, size: int) -> list[Tensor]:
        """Windows of all texts in turn, `size` at a time, so that each part of them holds some of each text."""
        return _batched([row for windows in zip(*self.own) for row in windows], size)

    def stop(self, size: int) -> list[Tensor]:
        """A few windows of each text to measure on, to stop a training by."""
        return _batched([row for rows in self.other.values() for row in rows[: MEASURED // 2]], size)


def _batched(rows: list[Tensor], size: int) -> list[Tensor]:
    from torch import cat

    flat = [row for batch in rows for row in batch.split(1)]
    return [cat(flat[start : start + size]) for start in range(0, len(flat), size)]


def _given(path: Path | None) -> Plan:
    if path is None:
        raise UsageError("give the plan with --plan: `notall search` or `notall plan` writes one")
    return read_plan(path)


def shown_quality(measured: list[MeasuredRecord], title: str) -> Shown:
    """A row a text and plan."""
    from ..records.measured import MeasuredRecord

    return Shown([one.row() for one in measured], MeasuredRecord.columns, title)


def _counted(repaired: RepairedPlan) -> str:
    """How many of the sublayers that the repair came to were refit."""
    refit = [len(one.sublayers) for one in repaired.refits if one.ridge is not None]
    total = sum(len(one.sublayers) for one in repaired.refits)
    return f"{sum(refit)} of {total} kept sublayers refit; refitting others did not help on held-out text"
