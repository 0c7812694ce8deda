"""notall sweep and paper: the grid of arXiv 2407.15516 on any model."""

from pathlib import Path

from ..experiments import sweep as sweeping
from ..experiments.folder import check_folder
from ..experiments.options.cluster import RayOptions
from ..experiments.options.model import ModelOptions
from ..experiments.options.tasks import TaskOptions
from ..experiments.options.text import TextOptions
from ..experiments.paper.run import PaperOptions, run_paper
from ..experiments.paper.timing import TimingGrid
from ..experiments.similarity import SimilarityRecord
from ..experiments.subject import Subject
from ..extras import FIGURES, need
from ..models.names import model_in_words
from ..options import GridOptions, OutFolder, RunOptions, Workload
from ..report.paper_tables import CLAIMS, write_tables
from ..report.similarity import write_similarity
from ..report.sweep import COLUMNS, write_sweep
from ..results.ledger import read_records
from ..results.provenance import windows_in_words
from ..results.table import table
from ..results.terminal import next_report, progress_bar, show
from .app import command


@command(example="notall sweep smollm2 --out results")
def sweep(
    model: ModelOptions,
    text: TextOptions,
    workload: Workload,
    grid: GridOptions,
    ray: RayOptions,
    run: RunOptions,
    out: OutFolder = Path("results"),
) -> None:
    """Run the paper's grid: skip the deepest 10, 25 and 33 % of the attentions, MLPs or
    blocks, with the last layer and without.

    If you interrupt it, the same command continues where it stopped.
    """
    check_folder(out, "sweep")
    grid.check()
    text.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=run.seed)
    about = model.provenance(net, **described)
    with ray.workers(net, model) as workers, progress_bar() as progress:
        subject = Subject(net, tokenizer, batches, out, about, run.seed, workers)
        records = sweeping.sweep(subject, workload, grid, progress)
    write_sweep(records, out, model_in_words(about.what["model"]))
    _write_similarity(out, about.what)
    title = f"{about.what['model']}: {len(records)} configurations in {out}"
    where = (
        f"The tables are in {out / 'table.md'}, .tex and .csv, and"
        f" {out / 'similarity'}.tex and .csv."
    )
    tables = {"results": table(title, COLUMNS, records)}
    show(tables, as_json=run.as_json, then=(where, next_report(out)))


@command(
    example=(
        "notall paper smollm2 --limit 40 --limit mmlu=2 --limit gsm8k=12 --out paper"
    )
)
def paper(
    model: ModelOptions,
    text: TextOptions,
    how: PaperOptions,
    timing: TimingGrid,
    grid: GridOptions,
    ray: RayOptions,
    run: RunOptions,
    tasks: TaskOptions = TaskOptions(tasks=("openllm",)),
    out: OutFolder = Path("paper"),
) -> None:
    """Run the paper's evaluation: Fig. 1, the tables of benchmarks and times, and a
    check of each claim.

    This needs the extras `eval` and `report`, and hours on a CPU: --limit says how many
    documents of each task are used, and mmlu is 57 tasks. If you interrupt it, the same
    command continues where it stopped.
    """
    need(*FIGURES, "lm_eval")
    check_folder(out, "paper")
    grid.check()
    text.check()
    choice = tasks.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=run.seed)
    about = model.provenance(net, **described)
    windows = text.for_diagnostics(net, tokenizer, run.seed) if how.diagnostics else ()
    with ray.workers(net, model) as workers, progress_bar() as progress:
        subject = Subject(net, tokenizer, batches, out, about, run.seed, workers)
        found = run_paper(
            subject,
            choice,
            timing,
            grid,
            windows=windows,
            generate_all=how.generate_all,
            progress=progress,
        )
    write_tables(found, out)
    _write_similarity(out, about.what)
    title = f"The tables are in {out}/paper.md, and as .tex and .csv beside it"
    tables = {"claims": table(title, CLAIMS, found.claims)}
    show(tables, as_json=run.as_json, then=[next_report(out)])


def _write_similarity(out: Path, what: dict[str, object]) -> None:
    found = read_records(out / SimilarityRecord.file, SimilarityRecord)
    write_similarity(
        found,
        out / "similarity",
        model_in_words(str(what["model"])),
        windows_in_words(what),
    )
