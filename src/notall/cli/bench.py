"""notall bench: how much time and memory a plan saves."""

from __future__ import annotations

from ..experiments.bench import COLUMNS, ShapeOptions, conclusion, rows_of
from ..experiments.bench import bench as time_plan
from ..experiments.options import ModelOptions, PlanOptions
from ..options import KeepIn, RunOptions, Workload
from ..results.ledger import check_folder
from ..results.progress_bars import progress_bar
from ..results.table import table
from ..results.terminal import say, show
from .app import MEASURE, command


@command(MEASURE, example="notall bench --shape llama-2-7b --dummy-weights --skip attention:0.33")
def bench(
    model: ModelOptions,
    shape: ShapeOptions,
    plan: PlanOptions,
    run: RunOptions,
    workload: Workload = Workload(generation_tokens=32),
    out: KeepIn = None,
) -> None:
    """Time prefill and decode of the dense and the skipped model, interleaved, with a real KV cache."""
    from ..structure.locating import locate

    check_folder(out, "bench")
    plan.check()
    net = shape.load(model, run.seed)
    wanted, spec = plan.of(net), shape.shape or model.model
    about = model.named(spec).provenance(net, dummy_weights=shape.dummy_weights, fingerprint=locate(net).fingerprint)
    with progress_bar() as progress:
        record = time_plan(net, wanted, workload, about, out=out, seed=run.seed, progress=progress)
    title = f"{about.in_words}; {record.told}; median of {workload.rounds} [quartiles]"
    show({"bench": (table(title, COLUMNS, rows_of([record])), [record])}, as_json=run.as_json)
    if record.skipped and not run.as_json:
        say(conclusion(record))
