"""Criteria side by side: every row against its parts computed alone; stopped and asked
again; table and front.
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from api import (
    CRITERIA,
    AskedChoice,
    CalibratedObjective,
    ChoiceRecord,
    ComparisonRecord,
    Criterion,
    Evaluator,
    Limits,
    Measuring,
    Provenance,
    Setting,
    Space,
    TaskChoice,
    TaskShelf,
    Workload,
    by_count,
    choose,
    compare_choosing,
    compare_criteria,
    compare_module,
    comparison_points,
    comparison_table,
    driver_Subject as Subject,
    evaluate,
    kl,
    nll,
    quality,
    read,
    runs_of,
    silent,
    write_comparison,
)
from families import family
from notall import UsageError, locate, skip
from tiny_tasks import byte_tokenizer, tiny_llama, write_tasks

pytestmark = pytest.mark.any_transformers  # it is about choices among choices

CALIBRATION = list((torch.arange(6 * 9).view(6, 9) * 7 % 90 + 3).split(2))
HELD_OUT = list((torch.arange(5 * 9).view(5, 9) * 11 % 90 + 3).split(2))
OBJECTIVES = {
    "nll": CalibratedObjective(nll(CALIBRATION), CALIBRATION),
    "kl": CalibratedObjective(kl(CALIBRATION[:2]), CALIBRATION[:2]),
}
ABOUT = {"model": "tiny"}
WORKLOAD = Workload(4, 2, rounds=1)


def run(
    model,
    runs,
    out,
    objectives=OBJECTIVES,
    about=ABOUT,
    tokenizer=None,
    progress=silent,
    **how,
):
    return compare_criteria(
        Subject(model, tokenizer, HELD_OUT, out, Provenance(what=about)),
        runs,
        objectives,
        Measuring(**how),
        progress=progress,
    )


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=6)


def all_rows(model, criteria=tuple(CRITERIA)):
    structure = locate(model)
    spaces = [
        (Space(structure, "attention"), [2, 3]),
        (Space(structure, "block"), [1]),
        (Space(structure, portable=True), [2]),
    ]
    return runs_of(criteria, list(OBJECTIVES), spaces)


FEW = (
    "deepest",
    "gate-norm",
    "cosine",
    "angular",
    "leave-one-out",
    "search",
)  # of each kind, and quick


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, run(model, all_rows(model, FEW), out, workload=WORKLOAD)


def test_every_criterion_is_asked_at_every_budget_it_can(model):
    rows = all_rows(model)
    asked = {(row.criterion, row.objective) for row in rows}
    assert {name for name, _ in asked} == set(CRITERIA)
    assert ("search", "kl") in asked
    assert ("cosine", "kl") not in asked
    assert sum(row.criterion == "cosine" for row in rows) == 4
    assert sum(row.criterion == "gate-norm" for row in rows) == 2
    assert sum(row.criterion == "angular" for row in rows) == 1


@pytest.mark.slow
def test_each_row_is_its_parts_alone(model, tmp_path):
    out, records = tmp_path, run(model, all_rows(model), tmp_path, workload=WORKLOAD)
    assert read(out / ComparisonRecord.file, ComparisonRecord) == records
    for row, record in zip(all_rows(model), records):
        objective = OBJECTIVES[row.objective]
        evaluator = Evaluator(model, objective.objective)
        chosen = choose(
            row.criterion,
            Setting(model, row.space, objective.batches, evaluator),
            by_count(row.space, row.count),
        )
        assert record.plan.indices == row.space.plan(chosen.skipped).indices, row.name
        assert record.order == chosen.order
        (alone,) = evaluate(model, [row.space.plan(chosen.skipped)], HELD_OUT)
        assert record.quality.delta_nll == pytest.approx(alone.delta_nll, abs=1e-5)
        assert record.quality.delta_nll_se == pytest.approx(
            alone.delta_nll_se, rel=1e-3
        )
        assert record.quality.kl == pytest.approx(alone.kl, abs=1e-5)
        assert record.spent.evaluations == evaluator.spent.evaluations
        assert record.provenance.what == ABOUT | {
            "seed": 0,
            "fingerprint": locate(model).fingerprint,
        }
        if row.criterion in ("greedy", "evolution", "quadratic", "search"):
            rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
            assert record.calibration_delta == pytest.approx(rise)
        else:
            assert math.isnan(record.calibration_delta)
        assert record.times.speedup_decode.median > 0


def test_asked_again_it_runs_nothing(model, compared, monkeypatch):
    out, records = compared
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    monkeypatch.setattr(quality, "score", None)
    monkeypatch.setattr(compare_module, "time_plan", None)
    again = run(model, all_rows(model, FEW), out, workload=WORKLOAD)
    assert again == records
    assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "time_plan", "_choose"])
def test_stopped_at_any_stage_it_goes_on(model, compared, tmp_path, monkeypatch, stage):
    _, records = compared
    rows = all_rows(model, ("cosine", "search"))
    owner = {
        "score": quality,
        "time_plan": compare_module,
        "_choose": compare_choosing.Choosing,
    }[stage]
    kept = getattr(owner, stage)
    calls = []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(*arguments, **options)

    monkeypatch.setattr(owner, stage, stopping)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, tmp_path, workload=WORKLOAD)
    found = run(model, rows, tmp_path, workload=WORKLOAD)
    whole = {record.key: record for record in records}
    for record in found:
        other = whole[record.key]
        assert record.plan == other.plan
        assert record.quality.delta_nll == pytest.approx(
            other.quality.delta_nll, abs=1e-6
        )
        assert record.spent.evaluations == other.spent.evaluations
    lines = read(tmp_path / ChoiceRecord.file, ChoiceRecord)
    assert len(lines) == len(rows)


def test_rows_may_be_added_and_other_settings_may_not(model, tmp_path):
    space = Space(locate(model), "attention")
    first = [AskedChoice("cosine", "nll", space, 2)]
    run(model, first, tmp_path)
    records = run(model, [*first, AskedChoice("deepest", "nll", space, 2)], tmp_path)
    assert [record.criterion for record in records] == ["cosine", "deepest"]
    assert len(read(tmp_path / ComparisonRecord.file, ComparisonRecord)) == 2
    with pytest.raises(UsageError, match="results with model"):
        run(model, first, tmp_path, about={"model": "other"})
    with pytest.raises(UsageError, match="results with by"):
        run(
            model,
            first,
            tmp_path,
            {"nll": CalibratedObjective(nll(HELD_OUT), HELD_OUT)},
        )


@pytest.mark.usefixtures("own_tasks_only")
def test_tasks_are_answered_for_every_plan(tmp_path):
    from tiny_tasks import run_tasks

    model, tokenizer = tiny_llama(), byte_tokenizer()
    folder = write_tasks(tmp_path / "tasks", documents=12)
    space = Space(locate(model), "attention")
    rows = [AskedChoice(name, "nll", space, 1) for name in ("deepest", "shallowest")]
    asked = TaskChoice(TaskShelf(folder), ("tiny_choice",), limits=Limits(10))
    records = run(model, rows, tmp_path / "out", tokenizer=tokenizer, tasks=asked)
    plans = [record.plan for record in records]
    for result in run_tasks(
        model, tokenizer, plans, ["tiny_choice"], limit=10, task_path=folder
    ):
        assert result.score in records[result.number].tasks
        assert result.score.documents == 10
    assert "tiny_choice acc" in comparison_table(records)


def test_the_table_has_a_part_for_each_budget_and_the_best_first(compared):
    text = comparison_table(compared[1])
    assert text.count("###") == 4
    part = text.partition("### 2 attentions")[2].partition("###")[0]
    rows = [
        line
        for line in part.splitlines()
        if line.startswith("| ") and "±" in line and "criterion" not in line
    ]
    losses = [float(row.split("|")[3].split("±")[0]) for row in rows]
    assert len(losses) == len(
        [r for r in compared[1] if r.space == "attention" and r.count == 2]
    )
    assert losses == sorted(losses)


def test_each_choice_stands_beside_the_best_of_as_many(model, compared):
    """Paired by window, by hand: what both lose over the original model is of no
    account.
    """
    _, records = compared
    for (space, count), group in groups_of(records).items():
        best, *others = sorted(group, key=lambda record: record.quality.delta_nll)
        assert math.isnan(best.behind), (space, count)
        assert math.isnan(best.behind_se)
        for record in others:
            mine, least = (nll_by_window(model, one.plan) for one in (record, best))
            assert record.behind == pytest.approx(
                float((mine - least).mean()), abs=1e-5
            )
            assert record.behind_se == pytest.approx(
                float((mine - least).std() / len(mine) ** 0.5), abs=1e-5
            )


def nll_by_window(model, plan):
    """One window at a time."""
    with skip(model, plan), torch.no_grad():
        windows = [row[None] for batch in HELD_OUT for row in batch]
        return torch.stack(
            [cross_entropy(model(row).logits[0, :-1], row[0, 1:]) for row in windows]
        )


def test_what_is_pasted_has_few_columns_and_says_what_they_are(compared, tmp_path):
    _, records = compared
    write_comparison(records, tmp_path, "Ways to choose", "Measured.")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    heads = [line for line in text.splitlines() if line.startswith("criterion &")]
    told = (
        "criterion & by & NLL added & KL & top-1 agreement & behind the best & decode"
        " speedup & forward passes \\\\"
    )
    assert heads == [told] * len(groups_of(records))
    assert "By: the objective that a criterion goes by, if by one." in text
    deepest = next(line for line in text.splitlines() if line.startswith("deepest &"))
    assert deepest.split(" & ")[1] == "-"  # it goes by no objective


def groups_of(records):
    found = {}
    for record in records:
        found.setdefault((record.space, record.count), []).append(record)
    return found


def test_the_figure_holds_every_choice(compared):
    points = comparison_points(compared[1])
    assert len(points) == len(compared[1])
    assert {point.panel for point in points} == {"attention", "block", "portable"}
    assert "search, kl" in {point.colour for point in points}
    assert [point.plan for point in points] == list(range(len(points)))


def test_objectives_whose_names_look_alike_in_a_file_name_are_kept_apart(
    model, tmp_path
):
    space = Space(locate(model), "attention")
    alike = {"nll 1": OBJECTIVES["nll"], "nll-1": OBJECTIVES["kl"]}
    rows = [AskedChoice("leave-one-out", name, space, 1) for name in alike]
    records = run(model, rows, tmp_path, alike)
    assert len({path.name for path in (tmp_path / "evaluations").iterdir()}) == 2
    write_comparison(records, tmp_path, "", "")
    assert len({*(tmp_path / "plans").iterdir()}) == 2


def test_a_criterion_says_what_it_takes_and_progress_goes_by_it(model, tmp_path):
    def scores(setting):
        setting.progress(1, 2, "half")
        return dict.fromkeys(setting.space.units, 0.0)

    space, seen = Space(locate(model), "attention"), {}
    for name, passes in (
        ("cheap", None),
        ("dear", lambda units, count: 7 * units * count),
    ):
        one = Criterion(name, "", scores, passes=passes)
        assert one.cost(space, 3) == (7 * 6 * 3 if passes else 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CRITERIA, name, one)
            row = [AskedChoice(name, "nll", space, 3)]

            def half(done: float, total: float, doing: str, name: str = name) -> None:
                if doing.endswith("half"):
                    seen[name] = total

            run(model, row, tmp_path / name, progress=half)
    assert seen["dear"] == 126 * seen["cheap"]


def test_progress_never_goes_back(model, tmp_path):
    seen = []
    rows = all_rows(model, ("cosine", "leave-one-out", "search"))
    run(model, rows, tmp_path, progress=lambda *state: seen.append(state[:2]))
    done = [state[0] for state in seen]
    assert done == sorted(done)
    assert seen[-1][0] == pytest.approx(seen[-1][1])
