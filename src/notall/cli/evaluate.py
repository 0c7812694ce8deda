"""notall eval: what a plan costs on a text, on benchmarks and in diagnostics."""

from ..experiments.evaluate import EvalOptions, Evaluation
from ..experiments.folder import check_folder
from ..experiments.next_commands import mend_of, next_command
from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import PlanOptions
from ..experiments.options.tasks import refuse_judging
from ..experiments.options.text import TextOptions
from ..experiments.recovery import RecoveryOptions
from ..experiments.repair import RepairOptions
from ..experiments.used import uses_of, windows_of
from ..experiments.verdict import Verdict
from ..options import RunOptions
from ..report.measured import tables_of
from ..results.provenance import behind
from ..results.terminal import progress_bar
from .app import command, conclude


@command(
    name="eval",
    example="notall eval smollm2 --plan plan.json --tasks arc_easy --limit 50",
)
def evaluate(
    model: ModelOptions,
    plan: PlanOptions,
    text: TextOptions,
    tasks: RecoveryOptions,
    repair: RepairOptions,
    run: RunOptions,
    how: EvalOptions,
) -> None:
    """Measure the loss of a plan: NLL, KL to the original model and agreement on a
    text, and benchmarks.

    Each figure comes with its standard error, and differences are paired with the
    original model's. A plan that skips in the prompt alone is scored on what follows
    the prompt.
    """
    from ..measuring.quality import check_prompt
    from ..structure.locating import locate

    out = how.out
    kept = out.with_name(f"{out.name}.repaired") if out else None
    check_folder(out, "eval")
    plan.check(needed=True, model=model.model)
    text.check()
    repair.check(kept)
    model.check_plan(plan.named)
    asked = tasks.check()
    refuse_judging(asked, repair.sources if repair else ())
    net, tokenizer = model.load()
    wanted, structure = plan.of(net), locate(net)
    wanted.check(structure)
    prompt = how.prompt_of(wanted, text.length)
    check_prompt([wanted], text.length, prompt)
    with progress_bar() as progress:
        apart = windows_of(uses_of(wanted, plan.plan), net, tokenizer, [text.text])
        if repair:
            texts = repair.texts(net, tokenizer, progress, seed=run.seed)
            about = model.provenance(net)
            wanted = repair.apply(net, wanted, texts, kept, about, progress)
            apart += texts.fitted
        batches, described = text.windows(net, tokenizer, seed=run.seed, apart=apart)
        if prompt:
            described["prompt_tokens"] = prompt
        windows = None
        if how.diagnostics:
            windows = text.for_diagnostics(net, tokenizer, run.seed, apart)
        settings = model.provenance(net, **described, fingerprint=structure.fingerprint)
        evaluation = Evaluation(
            net, tokenizer, wanted, asked, windows, out, run.seed, progress, prompt
        )
        found = evaluation.run(batches)
    records = evaluation.records(found, batches, settings)
    verdict = Verdict.on(
        net,
        wanted,
        found.quality[-1].quality,
        f"{described['text']}{behind(prompt)}",
        spec=model.model,
    ).judged(found.scores, asked.recovery)
    bench = next_command("bench", model.model, **plan.words)
    mend = bench if structure.stubbed else mend_of(model.model, plan, wanted)
    conclude(
        verdict.then(mend, bench),
        tables_of(found, f"skip {wanted}{behind(prompt)}"),
        records,
        as_json=run.as_json,
    )
