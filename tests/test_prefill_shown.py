"""Where results are shown: plans that differ only in the prompt stay apart, in records,
tables and pages.
"""

import re
from pathlib import Path

import pytest
import torch

import result_folders
import shown_pages
from api import (
    SWEEP_COLUMNS,
    BenchRecord,
    CalibratedObjective,
    ComparisonRecord,
    Folder,
    Ledger,
    MeasuredRecord,
    Measuring,
    PageParts,
    PageStep,
    PlanOptions,
    PlanTimesRecord,
    Provenance,
    RefitRecord,
    Replay,
    ScoresRecord,
    SweepRecord,
    Timed,
    Verdict,
    Workload,
    bench_conclusion,
    compare_criteria,
    comparison_columns,
    driver_Subject as Subject,
    evaluate,
    in_prompt_alone,
    kl,
    mend_of,
    paper_grid,
    parts_of,
    plan_file,
    quality as quality_module,
    read,
    read_folder,
    record,
    records_lines as lines,
    refits_table,
    render,
    runs_of,
    scored_as,
    sweep,
    table,
    timed_once,
    what_next,
    write_comparison,
)
from families import family
from notall import Plan, RepairedPlan, Space, locate, repair
from result_folders import SHAPED, quality, times
from test_reporting import data_of as embedded

pytestmark = pytest.mark.any_transformers  # of pages and words

BATCHES = list((torch.arange(3 * 12).view(3, 12) * 7 % 90 + 3).split(2))
PROMPT = 6
VALUES = "model.layers.8.self_attn.v_proj.weight"
WORKLOAD = Workload(prompt_tokens=4, generation_tokens=2, rounds=1)
ABOUT = Provenance(what={"model": "tiny", "revision": "none"})
PLANS = [
    Plan(),
    Plan([1]),
    Plan(prefill={"attention": [1]}),
    Plan(prefill={"mlp": [1]}),
    Plan(prefill={"attention": [1], "last_tokens": 2}),
    Plan([2], prefill={"attention": [1]}),
]


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=10)


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(Subject(model, None, BATCHES, folder, ABOUT), WORKLOAD)


# --- records
# --------------------------------------------------------------------------------------


def test_plans_that_differ_in_the_prompt_alone_are_scored_apart():
    assert len({scored_as(plan) for plan in PLANS}) == len(PLANS)
    assert (
        scored_as(Plan([1], [2])).skipped == "attn.1 mlp.2"
    )  # as files of before say it
    both = Plan([2], prefill={"attention": [1], "mlp": [3], "last_tokens": 32})
    assert both.skipped == "attn.2 prompt:attn.1 prompt:mlp.3 last:32"


def test_a_record_holds_what_only_the_prompt_skips(swept):
    found = read(swept[0] / ScoresRecord.file, ScoresRecord)
    behind = [one for one in found if one.prompt_tokens]
    assert {one.prompt_tokens for one in behind} == {PROMPT}
    assert all("prompt:" in name for one in behind for name in one.scores if name)
    whole = [one for one in found if not one.prompt_tokens]
    assert [one.batch for one in behind] == [one.batch for one in whole] == [0, 1]


# --- the paper's grid
# --------------------------------------------------------------------------------------


def test_each_configuration_shows_what_its_sublayers_cost_in_the_prompt_alone(
    model, swept
):
    folder, records = swept
    assert records[0].in_prompt is None
    for one in records[1:]:
        twin = Plan(prefill={"attention": one.plan.attention, "mlp": one.plan.mlp})
        (alone,) = evaluate(model, [twin], BATCHES, prompt_tokens=PROMPT)
        assert one.in_prompt.in_prompt_delta_nll == pytest.approx(
            alone.delta_nll, abs=1e-6
        )
        assert one.in_prompt.in_prompt_delta_nll_se == pytest.approx(
            alone.delta_nll_se, abs=1e-6
        )
        assert one.in_prompt.in_prompt_kl == pytest.approx(alone.kl, abs=1e-6)
    shown = table("sweep", SWEEP_COLUMNS, records)
    assert "NLL added in the prompt alone" in shown.headings
    assert "in_prompt_delta_nll" in shown.csv.splitlines()[0]
    assert read(folder / SweepRecord.file, SweepRecord) == records


def test_the_last_block_costs_nothing_in_the_prompt(swept):
    (last,) = (one for one in swept[1] if one.plan == Plan([9], [9]))
    assert abs(last.in_prompt.in_prompt_delta_nll) < 1e-6
    assert last.quality.kl > 1e-4


def test_a_folder_of_before_gets_the_column_and_keeps_its_times(
    model, swept, tmp_path, monkeypatch
):
    for path in swept[0].glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = [one.model_copy(update={"in_prompt": None}) for one in swept[1]]
    (tmp_path / SweepRecord.file).write_text("")
    lines.append(tmp_path / SweepRecord.file, *(one.line() for one in before))
    again = sweep(Subject(model, None, BATCHES, tmp_path, ABOUT), WORKLOAD)
    assert again == swept[1]


def test_it_costs_less_than_the_grid(model):
    """Sublayers run, of which the prompt's count by their share of the tokens."""
    rows = [row.plan for row in paper_grid(locate(model))]
    twins = [
        twin for row in rows if (twin := in_prompt_alone(locate(model), row, PROMPT))
    ]
    assert len(twins) == 18

    def ran(plans, prompt=None):
        replay = Replay(model, plans)
        with torch.inference_mode():
            for _ in replay.hidden_states(record(model, prompt, input_ids=BATCHES[0])):
                pass
        return replay.ran

    assert ran([Plan(), *twins], PROMPT) < 1.5 * ran(rows)
    assert ran([Plan(), *twins], PROMPT) < 0.6 * sum(
        ran([twin], PROMPT) for twin in [Plan(), *twins]
    )


# older ones hold a recurrent state otherwise, and are refused
@pytest.mark.parametrize("name", ["mamba", "gpt_neox"])
def test_a_grid_without_it_has_no_such_column(name):
    structure = locate(family(name).build())
    plan = Plan([1])
    can = in_prompt_alone(structure, plan, PROMPT) is not None
    assert can == (name == "gpt_neox")
    assert in_prompt_alone(structure, plan, 1) is None
    assert in_prompt_alone(structure, Plan(), PROMPT) is None


# --- a comparison
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(model, tmp_path_factory):
    """Plans of which some differ only in the prompt, one repaired, beside a criterion's
    choice.
    """
    deep = {"attention": [7, 8], "mlp": [7, 8]}
    own = {VALUES: 2 * model.get_parameter(VALUES).detach()}
    repaired = RepairedPlan.of(Plan(prefill=deep), prompt_weights=own)
    plans = {
        "deep": Plan(prefill=deep),
        "one": Plan(prefill={"mlp": [8]}),
        "refit": repaired,
    }
    folder = tmp_path_factory.mktemp("comparison")
    runs = runs_of(["deepest"], ["kl"], [(Space(locate(model), "block"), [2])])
    objectives = {"kl": CalibratedObjective(kl(BATCHES), BATCHES)}
    subject = Subject(model, None, BATCHES, folder, ABOUT)

    def compared():
        return compare_criteria(
            subject,
            runs,
            objectives,
            Measuring(
                workload=WORKLOAD,
                given=plans,
                prompt_tokens=PROMPT,
                repairs=["refit"],
                repair_text=BATCHES,
            ),
        )

    return folder, plans, compared(), compared


def test_given_plans_are_compared_behind_the_prompt(model, given):
    folder, plans, records, _ = given
    found = {(one.criterion, one.repair): one for one in records}
    own = f"own-{plans['refit'].digest[:8]}"
    assert [*found] == [
        *(
            ("deepest", "none"),
            ("deepest", "refit"),
            ("deep", "none"),
            ("deep", "refit"),
            ("one", "none"),
        ),
        *(("one", "refit"), ("refit", "none"), ("refit", "refit"), ("refit", own)),
    ]
    for key, plan in {
        ("deepest", "none"): Plan([8, 9], [8, 9]),
        ("deep", "none"): plans["deep"],
        ("one", "none"): plans["one"],
        ("refit", own): plans["refit"],
        ("deep", "refit"): repair(model, plans["deep"], BATCHES),
    }.items():
        (alone,) = evaluate(model, [plan], BATCHES, prompt_tokens=PROMPT)
        assert found[key].quality.delta_nll == pytest.approx(
            alone.delta_nll, abs=1e-6
        ), key
        assert found[key].quality.kl == pytest.approx(alone.kl, abs=1e-6), key
    assert (
        abs(found["refit", own].quality.kl - found["refit", "none"].quality.kl) > 1e-4
    )
    assert read(folder / ComparisonRecord.file, ComparisonRecord) == records
    assert [one.among for one in records][1:3] == ["2 blocks", "plans that were given"]


def test_each_given_plan_has_times_of_its_own(given):
    folder, _, records, _ = given
    found = read(folder / PlanTimesRecord.file, PlanTimesRecord)
    assert len({one.in_prompt for one in found}) == len(found) == 3
    headings = table("comparison", comparison_columns(records), records).headings
    assert {"prefill ms", "decode ms/token", "prefill speedup"} <= {*headings}
    assert not timed_once([one for one in records if one.criterion != "refit"])


def test_a_comparison_asked_again_runs_nothing(given, monkeypatch):
    monkeypatch.setattr(quality_module, "score", None)
    assert given[3]() == given[2]


def test_plan_files_of_a_comparison_keep_what_the_prompt_skips(given, tmp_path):
    _, plans, records, _ = given
    write_comparison(records, tmp_path, "title", "made")
    of = {one.criterion: one for one in records}
    for name in ("deep", "one"):
        assert Plan.load(plan_file(tmp_path, of[name])) == plans[name]
    assert "### plans that were given" in (tmp_path / "table.md").read_text()
    page = render(read_folder(given[0]))
    assert "Loses least: plans that were given" in page


def test_the_command_compares_plan_files(run, folder, tmp_path):
    plan = tmp_path / "prefill.json"
    Plan(prefill={"attention": [4], "mlp": [4]}).save(plan)
    size = ("--sequences", 2, "--length", 16, "--held-out-sequences", 2)
    code, _, err = run(
        "compare", folder, "--plan", plan, *size, "--out", tmp_path / "out"
    )
    assert (code, err) == (0, "")
    assert "behind a prompt of 8 tokens" in (tmp_path / "out" / "table.md").read_text()
    code, _, err = run(
        "compare",
        folder,
        "--plan",
        plan,
        "--repair",
        "replaceme",
        *size,
        "--out",
        tmp_path / "no",
    )
    assert (
        code,
        "a repair by replaceme cannot skip sublayers in the prompt alone" in err,
    ) == (2, True), err
    Plan(prefill={"mlp": [4], "last_tokens": 8}).save(plan)
    code, _, err = run(
        "compare", folder, "--plan", plan, *size, "--out", tmp_path / "no"
    )
    assert (code, "whose last 8 run whole: give a --length of 18 or more" in err) == (
        2,
        True,
    ), err


def test_pareto_names_the_engine_that_cannot(run, folder, tmp_path):
    plan = tmp_path / "prefill.json"
    Plan(prefill={"mlp": [4]}).save(plan)
    for engine in ("transformers", "llama.cpp"):
        code, _, err = run(
            "pareto",
            folder,
            "--engine",
            engine,
            "--plan",
            plan,
            "--out",
            tmp_path / "out",
        )
        assert (
            code,
            f"the engine {engine} cannot skip sublayers in the prompt alone" in err,
        ) == (2, True), err
    assert not (tmp_path / "out").exists()


# --- the page
# --------------------------------------------------------------------------------------


def page_of(*plans):
    steps = tuple(
        PageStep(str(number), plan, quality=quality(0.1))
        for number, plan in enumerate(plans)
    )
    return shown_pages.render(Folder(Path("results"), {}), [PageParts(steps=steps)])


def test_the_page_tells_what_the_prompt_skips_from_what_every_token_does():
    data = embedded(page_of(Plan([1], prefill={"mlp": [30]}), Plan([2])))
    first, second = data["plans"]
    assert (first["skipped"], first["prompt"]) == (["attn.1"], ["mlp.30"])
    assert (second["skipped"], second["prompt"]) == (["attn.2"], [])
    cells = data["specs"]["map"]["data"]["values"]
    assert max(cell["layer"] for cell in cells) == 30  # of which nothing else tells


def test_the_map_has_a_legend_where_a_plan_skips_in_the_prompt_alone():
    both = page_of(Plan([1]), Plan(prefill={"mlp": [3]}))
    assert '<span class="hatch every"></span> skipped for every token,' in both
    assert '<span class="hatch prompt"></span> skipped in the prompt alone.' in both
    assert "skipped for every token" not in page_of(Plan(prefill={"mlp": [3]}))
    assert 'class="hatch' not in page_of(Plan([1]))


# --- words
# --------------------------------------------------------------------------------------

PREFILL = Plan(prefill={"attention": [8, 9], "mlp": [8, 9]})


@pytest.mark.parametrize(
    ("state", "plan", "lost", "says"),
    [
        ("skipped", PREFILL, 0.1, "notall repair m --plan p.json --out repaired"),
        (
            "skipped",
            Plan(prefill={"mlp": [3]}),
            0.1,
            "notall bench m --plan p.json",
        ),  # it has nothing to refit
        ("repaired", PREFILL, 0.1, "notall bench m --plan p.json"),
        ("skipped", PREFILL, 3.0, "notall repair m --plan p.json --out repaired"),
        ("repaired", PREFILL, 3.0, "notall heal m --plan p.json --out healed"),
        (
            "healed",
            PREFILL,
            3.0,
            "notall search m --max-nll 0.1 --phase prefill --out plan.json",
        ),
        ("healed", Plan([1]), 3.0, "notall search m --max-nll 0.1 --out plan.json"),
    ],
)
def test_what_comes_next(state, plan, lost, says):
    verdict = Verdict(plan, quality(lost), state=state)
    assert what_next(verdict, "m", Path("p.json"))[1] == says


def test_a_plan_whose_times_are_known_is_written():
    verdict = Verdict(
        PREFILL, quality(0.1), state="repaired", speedup=result_folders.spread(1.4)
    )
    written = "notall export m --plan a/plan.repaired --to hf --out a/plan-pruned"
    assert what_next(verdict, "m", Path("a/plan.repaired"))[1] == written
    assert (
        "notall bench" in what_next(verdict, "m.gguf", Path("a/plan.repaired"))[1]
    )  # no released one runs it


def test_plan_tells_what_the_prompt_saves(run, folder, tmp_path):
    plan = ("plan", folder, "--skip", "block:3", "-o", tmp_path / "plan.json")
    _, out, _ = run(*plan, "--phase", "prefill")
    said = (
        "A prompt skips 50% of the layers' parameters, but for keys and values, up to"
        " its last token."
    )
    assert said in " ".join(out.split())
    assert "A prompt skips" not in run(*plan)[1]


def test_a_better_one_of_the_same_phase_is_asked_for():
    asked = PlanOptions(skip="block:2", phase="prefill", last_tokens=3)
    command = (
        "notall search m --skip block:2 --phase prefill --last-tokens 3 --out"
        " better.json"
    )
    assert mend_of("m", asked, PREFILL) == command
    assert (
        mend_of("m", PlanOptions(skip="mlp:2"), Plan([], [1]))
        == "notall search m --skip mlp:2 --out better.json"
    )


def test_a_table_of_refits_names_keys_and_values():
    refits = (
        RefitRecord(
            sublayers=("attn.8",),
            ridge=None,
            left=1.0,
            seconds=0.1,
            why="nothing is skipped before it",
        ),
        RefitRecord(sublayers=("attn.9",), ridge=1.0, left=0.5, seconds=0.1),
    )
    told = refits_table(
        RepairedPlan(prefill=PREFILL.prefill, refits=refits), Path("out")
    ).title
    assert told.startswith("out: 1 of 2 sublayers of the prompt refit; shown are")
    in_vain = refits[0].model_copy(update={"why": ""})
    told = refits_table(
        RepairedPlan(prefill=PREFILL.prefill, refits=(in_vain, refits[1])), Path("out")
    ).title
    assert "refit; refitting others did not help on held-out text" in told


def bench_record(plan, faster):
    one = Timed(times=times(1.0), footprint=result_folders.footprint(Plan()))
    timed = one.times.model_copy(
        update={"speedup_prefill": result_folders.spread(faster)}
    )
    counts = {
        "prompt_tokens": 512,
        "generation_tokens": 8,
        "concurrency": 1,
        "rounds": 5,
    }
    skipped = one.model_copy(update={"times": timed})
    return BenchRecord(
        plan=plan, **counts, dense=one, skipped=skipped, provenance=SHAPED
    )


def test_bench_tells_the_time_to_the_first_token():
    said = bench_conclusion(bench_record(PREFILL, 1.4))
    assert re.search(
        r"The first token comes after [\d,]+ ms, not [\d,]+: 1\.40 times as fast"
        r" \[1\.33 to 1\.54\];",
        said,
    )
    assert "first token" not in bench_conclusion(bench_record(Plan([1]), 1.4))


# --- a page that leads with a plan to take
# --------------------------------------------------------------------------------------


@pytest.fixture
def demo(tmp_path):
    """A sweep, and in its folder a repair of a prefill-only plan with its times."""
    result_folders.WRITERS["sweep"](tmp_path)
    on = "t, behind a prompt of 256 tokens"
    measured = [
        MeasuredRecord(
            text=on, model=state, plan=PREFILL, quality=quality(lost), provenance=SHAPED
        )
        for state, lost in (("skipped", 0.09), ("repaired", 0.03))
    ]
    refit = RefitRecord(sublayers=("attn.9",), ridge=1.0, left=0.5, seconds=0.1)
    Ledger(tmp_path / "plan.repaired", MeasuredRecord).add(*measured)
    Ledger(tmp_path / "plan.repaired", RefitRecord, SHAPED).add(refit)
    Ledger(tmp_path / "plan.bench", BenchRecord).add(bench_record(PREFILL, 1.4))
    return tmp_path


def test_a_repair_in_a_folder_leads_its_page(demo):
    folder = read_folder(demo)
    first, chosen, *_ = parts_of(folder)
    assert first.steps[first.first].plan == PREFILL
    assert (
        "Without 2 blocks in the prompt (it has 12 layers), the repaired tiny: +0.030 ±"
        " 0.003 nats" in first.message.sentence
    )
    assert "on t, behind a prompt of 256 tokens" in first.message.sentence
    assert (
        "reads a prompt 1.40× as fast (quartiles 1.33 to 1.54)"
        in first.message.sentence
    )
    assert [card.title for card in chosen.cards] == [
        "The first token, 512 prompt tokens",
        "t, behind a prompt of 256 tokens",
    ]
    assert chosen.cards[0].figure == "1.40×"
    assert "95 % interval +0.023 to +0.037" in chosen.cards[1].text
    titles = [section.title for section in chosen.sections]
    assert (
        "What became of the prompt's keys and values, and of what stands in for its MLPs"
        in titles
    )
    page = render(folder)
    assert page.index("The first token, 512 prompt tokens") < page.index(
        "The model, plan by plan"
    )
    assert len(first.steps) == 1 + len(folder.of(SweepRecord))


def test_times_of_another_plan_are_not_shown(demo):
    (demo / "plan.bench" / BenchRecord.file).unlink()
    Ledger(demo / "plan.bench", BenchRecord).add(
        bench_record(Plan(prefill={"mlp": [1]}), 1.4)
    )
    first, chosen, *_ = parts_of(read_folder(demo))
    assert "as fast" not in first.message.sentence
    assert [card.title for card in chosen.cards] == ["t, behind a prompt of 256 tokens"]


def test_a_search_tells_of_its_own_repair(demo):
    (demo / "plan.search").mkdir()
    first, *_ = parts_of(read_folder(demo))
    assert PREFILL not in [step.plan for step in first.steps]
