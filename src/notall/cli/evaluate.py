"""notall eval: what a plan costs."""

from __future__ import annotations

from typing import Any

from ..experiments.evaluate import GSM8K, QUALITIES, Evaluation, keep, mend_of, records_of
from ..experiments.measured import warn_if_worse, warn_of_own_text
from ..experiments.options import Diagnostics, ModelOptions, PlanOptions, TaskOptions, TextOptions, diagnostic_windows
from ..experiments.repair import RepairOptions
from ..experiments.verdict import Verdict, next_command
from ..options import KeepIn, RunOptions
from ..results.facts import PLAN_CHECKS, PLAN_SCORES
from ..results.ledger import check_folder
from ..results.progress_bars import progress_bar
from ..results.table import table
from ..results.terminal import show
from .app import MEASURE, command
from .ending import conclude


@command(MEASURE, name="eval", example="notall eval smollm2 --plan plan.json --tasks arc_easy --limit 50")
def evaluate(
    model: ModelOptions,
    plan: PlanOptions,
    text: TextOptions,
    tasks: TaskOptions,
    repair: RepairOptions,
    run: RunOptions,
    diagnostics: Diagnostics = False,
    out: KeepIn = None,
) -> None:
    """Measure what a plan costs: NLL, KL to the dense model and agreement on a text, and benchmarks if you name some.

    Each figure comes with its standard error, and differences are paired with the dense model's.
    """
    from ..repairing.texts import about_measured
    from ..structure.locating import locate

    kept = out.with_name(f"{out.name}.repaired") if out and repair else None
    check_folder(out, "eval")
    check_folder(kept, "repair")
    plan.check(needed=True, model=model.model)
    text.check()
    repair.check()
    asked = tasks.check(also=(GSM8K,) if diagnostics else ())
    net, tokenizer = model.load()
    wanted = plan.of(net)
    wanted.check(locate(net))
    batches, described = text.windows(net, tokenizer, seed=run.seed)
    windows = diagnostic_windows(net, tokenizer, text.text, run.seed) if diagnostics else None
    with progress_bar() as progress:
        if repair:
            wanted, _ = repair.apply(net, tokenizer, wanted, kept, model.provenance(net), progress)
        warn_of_own_text(wanted, described, plan.plan)
        evaluation = Evaluation(net, tokenizer, wanted, asked, windows, out, progress)
        found = evaluation.run(batches)
    settings = model.provenance(net, **described, fingerprint=locate(net).fingerprint)
    abouts = {name: (one, about_measured(net, settings, one, batches)) for name, one in evaluation.states.items()}
    records = records_of(found, described["text"], abouts)
    if out:
        keep(out, records)
    tables: dict[str, Any] = {"quality": (table(f"skip {wanted}", QUALITIES, found.quality), found.quality)}
    if found.scores:
        title = "benchmarks, differences paired by document; worse: p < 0.05"
        tables["tasks"] = (table(title, PLAN_SCORES, found.scores), found.scores)
    if found.checks:
        tables["diagnostics"] = (table("what accuracy hides; worse: p < 0.05", PLAN_CHECKS, found.checks), found.checks)
    timed = next_command("bench", model.model, **plan.words)
    verdict = Verdict.on(net, wanted, found.quality[-1].quality, described["text"])
    verdict = verdict.then(timed if locate(net).stubbed else mend_of(model.model, plan, wanted), timed)
    show(tables, as_json=run.as_json, also={"verdict": verdict.fact()})
    warn_if_worse(records)
    conclude(verdict, as_json=run.as_json)
