"""Criteria side by side: every row against its parts computed alone; stopped and asked again; table and front."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from api import (
    CRITERIA,
    Aim,
    ChoiceRecord,
    ComparisonRecord,
    Evaluator,
    Question,
    Setting,
    Space,
    Timed,
    by_count,
    choose,
    compare_criteria,
    comparison,
    comparison_table,
    evaluate,
    kl,
    nll,
    plots,
    questions_of,
    read,
    write_comparison,
)
from families import family
from notall import UsageError, locate, skip
from tiny_tasks import byte_tokenizer, tiny_llama, write_tasks

pytestmark = pytest.mark.any_transformers  # it is about choices among choices

CALIBRATION = list((torch.arange(6 * 9).view(6, 9) * 7 % 90 + 3).split(2))
HELD_OUT = list((torch.arange(5 * 9).view(5, 9) * 11 % 90 + 3).split(2))
AIMS = {"nll": Aim(nll(CALIBRATION), CALIBRATION), "kl": Aim(kl(CALIBRATION[:2]), CALIBRATION[:2])}
ABOUT = {"model": "tiny"}


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=6)


def all_rows(model, criteria=tuple(CRITERIA)):
    anatomy = locate(model)
    spaces = [
        (Space(anatomy, "attention"), [2, 3]),
        (Space(anatomy, "block"), [1]),
        (Space(anatomy, portable=True), [2]),
    ]
    return questions_of(criteria, list(AIMS), spaces)


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, compare_criteria(model, all_rows(model), AIMS, HELD_OUT, out, ABOUT, timed=Timed(4, 2, rounds=1))


def test_every_criterion_is_asked_at_every_budget_it_can(model):
    rows = all_rows(model)
    asked = {(row.criterion, row.aim) for row in rows}
    assert {name for name, _ in asked} == set(CRITERIA)
    assert ("search", "kl") in asked
    assert ("cosine", "kl") not in asked
    assert sum(row.criterion == "cosine" for row in rows) == 4
    assert sum(row.criterion == "gate-norm" for row in rows) == 2
    assert sum(row.criterion == "angular" for row in rows) == 1


def test_each_row_is_its_parts_alone(model, compared):
    out, records = compared
    assert read(out / ComparisonRecord.file, ComparisonRecord) == records
    for row, record in zip(all_rows(model), records):
        aim = AIMS[row.aim]
        evaluator = Evaluator(model, aim.objective)
        chosen = choose(
            row.criterion, Setting(model, row.space, aim.batches, evaluator), by_count(row.space, row.count)
        )
        assert record.skipped == " ".join(row.space.sorted(chosen.skipped)), row.name
        assert record.order == chosen.order
        (quality,) = evaluate(model, [row.space.plan(chosen.skipped)], HELD_OUT)
        assert record.delta_nll == pytest.approx(quality.delta_nll, abs=1e-5)
        assert record.delta_nll_se == pytest.approx(quality.delta_nll_se, rel=1e-3)
        assert record.kl == pytest.approx(quality.kl, abs=1e-5)
        assert record.evaluations == evaluator.spent.evaluations
        assert record.provenance.what == ABOUT | {"seed": 0, "fingerprint": locate(model).fingerprint}
        assert record.forwards_in_full == pytest.approx(evaluator.spent.one_by_one / evaluator.forward)
        if row.criterion in ("greedy", "evolution", "quadratic", "search"):
            rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
            assert record.calibration_delta == pytest.approx(rise)
        else:
            assert record.calibration_delta is None
        assert record.times.speedup_decode > 0


def test_asked_again_it_runs_nothing(model, compared, monkeypatch):
    out, records = compared
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    monkeypatch.setattr(comparison, "score", None)
    monkeypatch.setattr(comparison, "time_plan", None)
    again = compare_criteria(model, all_rows(model), AIMS, HELD_OUT, out, ABOUT, timed=Timed(4, 2, rounds=1))
    assert again == records
    assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before


@pytest.mark.parametrize("stage", ["score", "time_plan", "_choose"])
def test_stopped_at_any_stage_it_goes_on(model, compared, tmp_path, monkeypatch, stage):
    _, records = compared
    rows, owner = all_rows(model, ("cosine", "search")), comparison._Choosing if stage == "_choose" else comparison
    kept = getattr(owner, stage)
    calls = []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(*arguments, **options)

    timed = Timed(4, 2, rounds=1)
    monkeypatch.setattr(owner, stage, stopping)
    with pytest.raises(KeyboardInterrupt):
        compare_criteria(model, rows, AIMS, HELD_OUT, tmp_path, ABOUT, timed=timed)
    found = compare_criteria(model, rows, AIMS, HELD_OUT, tmp_path, ABOUT, timed=timed)
    whole = {record.key: record for record in records}
    for record in found:
        other = whole[record.key]
        assert record.skipped == other.skipped
        assert record.delta_nll == pytest.approx(other.delta_nll, abs=1e-6)
        assert record.evaluations == other.evaluations
    lines = read(tmp_path / ChoiceRecord.file, ChoiceRecord)
    assert len(lines) == len(rows)


def test_rows_may_be_added_and_other_settings_may_not(model, tmp_path):
    space = Space(locate(model), "attention")
    first = [Question("cosine", "nll", space, 2)]
    compare_criteria(model, first, AIMS, HELD_OUT, tmp_path, ABOUT)
    records = compare_criteria(model, [*first, Question("deepest", "nll", space, 2)], AIMS, HELD_OUT, tmp_path, ABOUT)
    assert [record.criterion for record in records] == ["cosine", "deepest"]
    assert len(read(tmp_path / ComparisonRecord.file, ComparisonRecord)) == 2
    with pytest.raises(UsageError, match="results with model"):
        compare_criteria(model, first, AIMS, HELD_OUT, tmp_path, {"model": "other"})
    with pytest.raises(UsageError, match="results with by"):
        compare_criteria(model, first, {"nll": Aim(nll(HELD_OUT), HELD_OUT)}, HELD_OUT, tmp_path, ABOUT)


@pytest.mark.usefixtures("own_tasks_only")
def test_tasks_are_answered_for_every_plan(tmp_path):
    from api import run_tasks

    model, tokenizer = tiny_llama(), byte_tokenizer()
    folder = write_tasks(tmp_path / "tasks", documents=12)
    space = Space(locate(model), "attention")
    rows = [Question(name, "nll", space, 1) for name in ("deepest", "shallowest")]
    asked = comparison.Tasks(("tiny_choice",), tokenizer, limit=10, folder=folder)
    records = compare_criteria(model, rows, AIMS, HELD_OUT, tmp_path / "out", ABOUT, tasks=asked)
    plans = [record.plan for record in records]
    for result in run_tasks(model, tokenizer, plans, ["tiny_choice"], limit=10, task_path=folder):
        entry = records[result.number].tasks[f"tiny_choice {result.metric.partition(',')[0]}"]
        assert (entry.value, entry.delta) == (result.value, result.delta)
        assert entry.documents == 10
    assert "tiny_choice acc" in comparison_table([record.row() for record in records])


def test_the_table_has_a_part_for_each_budget_and_the_best_first(compared):
    text = comparison_table([record.row() for record in compared[1]])
    assert text.count("###") == 4
    part = text.partition("### 2 attentions")[2].partition("###")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ") and "±" in line and "criterion" not in line]
    losses = [float(row.split("|")[3].split("±")[0]) for row in rows]
    assert len(losses) == len([r for r in compared[1] if r.space == "attention" and r.count == 2])
    assert losses == sorted(losses)


def test_each_choice_stands_beside_the_best_of_as_many(model, compared):
    """Paired by window, by hand: what both lose over the dense model is of no account."""
    _, records = compared
    for (space, count), group in groups_of(records).items():
        best, *others = sorted(group, key=lambda record: record.delta_nll)
        assert (best.behind, best.behind_se) == (None, None), (space, count)
        for record in others:
            mine, least = (nll_by_window(model, one.plan) for one in (record, best))
            assert record.behind == pytest.approx(float((mine - least).mean()), abs=1e-5)
            assert record.behind_se == pytest.approx(float((mine - least).std() / len(mine) ** 0.5), abs=1e-5)


def nll_by_window(model, plan):
    """One window at a time."""
    with skip(model, plan), torch.no_grad():
        windows = [row[None] for batch in HELD_OUT for row in batch]
        return torch.stack([cross_entropy(model(row).logits[0, :-1], row[0, 1:]) for row in windows])


def test_what_is_pasted_has_few_columns_and_says_what_they_are(compared, tmp_path):
    _, records = compared
    write_comparison(records, tmp_path, "Ways to choose", "Measured.")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    heads = [line for line in text.splitlines() if line.startswith("criterion &")]
    told = "criterion & by & NLL added & KL & top-1 agreement & behind the best & decode speedup & forward passes \\\\"
    assert heads == [told] * len(groups_of(records))
    assert "By: the objective that a criterion goes by, if by one." in text
    deepest = next(line for line in text.splitlines() if line.startswith("deepest &"))
    assert deepest.split(" & ")[1] == "-"  # it goes by no objective


def groups_of(records):
    found = {}
    for record in records:
        found.setdefault((record.space, record.count), []).append(record)
    return found


def test_the_front_holds_every_choice(compared, tmp_path):
    chart = plots.front_chart([record.row() for record in compared[1]], "front")
    whole = chart.to_dict()
    rows = whole.get("data", whole["spec"].get("data"))["values"]
    assert len(rows) == len(compared[1])
    assert {row["space"] for row in rows} == {"attention", "block", "portable"}
    assert "search, kl" in {row["criterion"] for row in rows}
    plots.save(chart, tmp_path / "front")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_progress_never_goes_back(model, tmp_path):
    seen = []
    rows = all_rows(model, ("cosine", "leave-one-out", "search"))
    compare_criteria(model, rows, AIMS, HELD_OUT, tmp_path, ABOUT, progress=lambda *state: seen.append(state[:2]))
    done = [state[0] for state in seen]
    assert done == sorted(done)
    assert seen[-1][0] == pytest.approx(seen[-1][1])
