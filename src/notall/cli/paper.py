"""notall paper: the paper's evaluation."""

from __future__ import annotations

from pathlib import Path

from ..experiments.driver import Subject
from ..experiments.options import ModelOptions, RayOptions, TaskOptions, TextOptions, diagnostic_windows
from ..experiments.paper import CLAIMS, PaperOptions, TimingGrid, run_paper
from ..experiments.similarity import SimilarityRecord, write_similarity
from ..extras import FIGURES, need
from ..models.names import model_in_words
from ..options import Json, OutFolder, Seed
from ..results.ledger import check_folder, read
from ..results.progress_bars import progress_bar
from ..results.provenance import windows_in_words
from ..results.table import table
from ..results.terminal import say, show
from .app import MEASURE, command

OPENLLM = TaskOptions(tasks=("openllm",))


@command(MEASURE, example="notall paper smollm2 --limit 40 --limit mmlu=2 --limit gsm8k=12 --out paper")
def paper(
    model: ModelOptions,
    text: TextOptions,
    how: PaperOptions,
    timing: TimingGrid,
    ray: RayOptions,
    tasks: TaskOptions = OPENLLM,
    out: OutFolder = Path("paper"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the paper's evaluation: Fig. 1, the tables of benchmarks and times, and a check of each claim.

    This needs the extras `eval` and `report`, and hours on a CPU: --limit says how many documents of each task are
    used, and mmlu is 57 tasks. If you interrupt it, the same command continues where it stopped.
    """
    need(*FIGURES, "lm_eval")
    check_folder(out, "paper")
    text.check()
    choice = tasks.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=seed)
    about = model.provenance(net, **described)
    windows = diagnostic_windows(net, tokenizer, text.text, seed) if how.diagnostics else ()
    with ray.workers(net, model) as workers, progress_bar() as progress:
        subject = Subject(net, tokenizer, batches, out, about, seed, workers)
        claims = run_paper(subject, choice, timing, windows=windows, generate_all=how.generate_all, progress=progress)
    name = model_in_words(about.what["model"])
    similarity = read(out / SimilarityRecord.file, SimilarityRecord)
    write_similarity(similarity, out / "similarity", name, windows_in_words(described))
    title = f"The tables are in {out}/paper.md, and as .tex and .csv beside it"
    show({"claims": (table(title, CLAIMS, claims), claims)}, as_json=as_json)
    if not as_json:
        say(f"Next: notall report {out} -o {out / 'report.html'}")
