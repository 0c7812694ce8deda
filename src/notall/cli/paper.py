"""The paper's evaluation of a model, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models.names import model_in_words
from ..records.provenance import windows_of
from ..reporting.console import say, show
from ..reporting.extras import FIGURES, need
from ..reporting.progress_bars import progress_bar
from ..reporting.similarity_files import write_similarity
from .app import MEASURE, OnRay, app
from .checks import check_folders, check_tasks, check_texts
from .inputs import (
    Loading,
    batch_size_of,
    battery_windows,
    load_model,
    provenance_of,
    text_batches,
    words_of,
    workers_on,
)
from .options import (
    Attention,
    Battery,
    Device,
    DeviceMap,
    Dtype,
    FewShot,
    Json,
    Length,
    Limit,
    Model,
    Ray,
    RayGpus,
    RayWorkers,
    Revision,
    Seed,
    Sequences,
    TaskBatch,
    TaskPath,
    Tasks,
    TextSource,
    Truncate,
    Trust,
)


@app.command(
    cls=OnRay,
    rich_help_panel=MEASURE,
    epilog="Example:  notall paper smollm2 --limit 40 --limit mmlu=2 --limit gsm8k=12 --out paper",
)
def paper(
    model: Model = "smollm2",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for records, tables and the figure")] = Path("paper"),
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    task_path: TaskPath = None,
    truncate: Truncate = False,
    battery: Battery = False,
    batch_size: TaskBatch = "auto",
    generate_all: Annotated[
        bool,
        typer.Option(
            "--generate-all", help="run tasks that generate text on all configurations, not only those of 33 %"
        ),
    ] = False,
    prompt: Annotated[
        list[int] | None, typer.Option(help="prompt length to time; repeat it for more (default: 128 and 512)")
    ] = None,
    bench_batch: Annotated[
        list[int] | None, typer.Option(help="batch size to time; repeat it for more (default: 1)")
    ] = None,
    new: Annotated[int, typer.Option("--new", help="new tokens when timing")] = 16,
    rounds: Annotated[int, typer.Option(help="timed rounds; each times all configurations in turn")] = 5,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_gpus: RayGpus = 1,
    text: TextSource = "prose",
    sequences: Sequences = 8,
    length: Length = 256,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the paper's evaluation: Fig. 1, the tables of benchmarks and times, and a check of each claim.

    This needs the extra `eval`, and hours on a CPU: --limit says how many documents of each task are used, and mmlu is
    57 tasks. If you interrupt it, the same command continues where it stopped.
    """
    need(*FIGURES, "lm_eval", "pandas", "tabulate")
    from ..evaluation.paper.running import Evaluation, TimeGrid, run_paper
    from ..evaluation.tasks import Limits
    from ..records.claims import ClaimRecord
    from ..records.ledger import read
    from ..records.similarity import SimilarityRecord

    check_folders(paper=out)
    check_texts(text)
    size, asked, limits = batch_size_of(batch_size), words_of(tasks) or ["openllm"], words_of(limit)
    evaluation = Evaluation(
        tasks=asked,
        limits=Limits.parse(limits),
        num_fewshot=num_fewshot,
        task_path=check_tasks(asked, task_path, num_fewshot=num_fewshot, limits=limits),
        batch_size=size,
        truncate=truncate,
        generate_all=generate_all,
    )
    timing = TimeGrid(tuple(prompt or (128, 512)), tuple(bench_batch or (1,)), new, rounds)
    loading = Loading(model, dtype, device, device_map, attn_implementation, revision, trust_remote_code)
    net, tokenizer = load_model(loading)
    batches, described = text_batches(net, tokenizer, text, sequences, length, 4, seed)
    about = provenance_of(net, model, revision, **described)
    with workers_on(ray, ray_workers, ray_gpus, net, loading) as workers, progress_bar() as progress:
        claims = run_paper(
            net,
            tokenizer,
            batches,
            out,
            about,
            evaluation=evaluation,
            timing=timing,
            battery=battery_windows(net, tokenizer, text, seed) if battery else (),
            seed=seed,
            progress=progress,
            workers=workers,
        )
    rows = [record.row() for record in read(out / SimilarityRecord.file, SimilarityRecord)]
    write_similarity(rows, out / "similarity", model_in_words(about.what["model"]), windows_of(about.what))
    show(
        [claim.row() for claim in claims],
        ClaimRecord.columns,
        as_json=as_json,
        title=f"The tables are in {out}/paper.md, and as .tex and .csv beside it",
    )
    if not as_json:
        say(f"Next: notall report {out} -o {out / 'report.html'}")
