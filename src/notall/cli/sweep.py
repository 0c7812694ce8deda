"""notall sweep: the paper's grid on a text."""

from __future__ import annotations

from pathlib import Path

from ..experiments.driver import Subject
from ..experiments.options import ModelOptions, RayOptions, TextOptions
from ..experiments.similarity import SimilarityRecord, write_similarity
from ..experiments.sweep import COLUMNS, write_sweep
from ..experiments.sweep import sweep as sweep_grid
from ..models.names import model_in_words
from ..options import Json, OutFolder, Seed, Workload
from ..results.ledger import check_folder, read
from ..results.progress_bars import progress_bar
from ..results.provenance import windows_in_words
from ..results.table import table
from ..results.terminal import say, show
from .app import MEASURE, command


@command(MEASURE, example="notall sweep smollm2 --out results")
def sweep(
    model: ModelOptions,
    text: TextOptions,
    workload: Workload,
    ray: RayOptions,
    out: OutFolder = Path("results"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the paper's grid: skip 10, 25 and 33 % of the attentions, MLPs or blocks, with the last layer and without.

    If you interrupt it, the same command continues where it stopped.
    """
    check_folder(out, "sweep")
    text.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=seed)
    about = model.provenance(net, **described)
    with ray.workers(net, model) as workers, progress_bar() as progress:
        records = sweep_grid(Subject(net, tokenizer, batches, out, about, seed, workers), workload, progress)
    name = model_in_words(about.what["model"])
    write_sweep(records, out, name)
    write_similarity(
        read(out / SimilarityRecord.file, SimilarityRecord), out / "similarity", name, windows_in_words(described)
    )
    title = f"{about.what['model']}: {len(records)} configurations in {out}"
    show({"results": (table(title, COLUMNS, records), records)}, as_json=as_json)
    if not as_json:
        say(f"The tables are in {out / 'table.md'}, .tex and .csv, and {out / 'similarity'}.tex and .csv.")
        say(f"Next: notall report {out} -o {out / 'report.html'}")
