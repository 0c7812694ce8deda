"""The sweep: 19 configurations, each checked against a slow twin; killed anywhere, it
goes on.
"""

import json
import re

import pytest
import torch
from torch.nn.functional import cross_entropy

import forked
from api import (
    GridOptions,
    LeaveOneOutRecord,
    Provenance,
    ScoresRecord,
    SimilarityRecord,
    SweepRecord,
    Workload,
    driver_Subject as Subject,
    least_lost,
    leave_one_out,
    quality,
    read,
    records_lines as lines,
    score,
    silent,
    sweep,
)
from families import family, silenced
from notall import Plan, UsageError, skip

pytestmark = (
    pytest.mark.any_transformers
)  # what a line holds is tested on both, with `Replay`

BATCHES = list((torch.arange(3 * 9).view(3, 9) * 7 % 90 + 3).split(2))
TIMED = Workload(prompt_tokens=4, generation_tokens=2, rounds=1)
ABOUT = {"model": "tiny", "revision": "none"}
DEPTH = 10


def run(model, out, batches=BATCHES, about=ABOUT, seed=0, workload=TIMED, **options):
    return sweep(
        Subject(model, None, batches, out, Provenance(what=about), seed),
        workload,
        **options,
    )


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(model, folder)


def test_a_grid_of_other_fractions(model, swept, tmp_path):
    folder, grid = swept[0], GridOptions((0.5, 0.2, 0.5))
    records = run(model, tmp_path, grid=grid)
    keys = [(r.variant, r.fraction, r.keep_last) for r in records]
    assert len(keys) == len(set(keys)) == 1 + 3 * 2 * 2
    assert [fraction for _, fraction, _ in keys[1:5]] == [0.2, 0.2, 0.5, 0.5]
    assert {len(r.plan.indices[r.variant]) for r in records if r.variant == "mlp"} == {
        2,
        5,
    }
    half = next(r for r in records if r.configuration == ("mlp", 0.5, False))
    tokens = torch.cat(BATCHES)
    with torch.no_grad(), skip(model, Plan(mlp=range(5, 10))):
        logits = model(tokens).logits[:, :-1]
    nll = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert half.quality.nll == pytest.approx(nll.item(), abs=1e-5)
    assert read(folder / SweepRecord.file, SweepRecord) == swept[1]


@pytest.mark.parametrize("fractions", [(), (0.0,), (0.33, 1.5), (-0.1,)])
def test_fractions_that_make_no_grid_are_refused(model, tmp_path, fractions):
    with pytest.raises(UsageError, match="give"):
        run(model, tmp_path / "out", grid=GridOptions(fractions))
    assert not (tmp_path / "out").exists()


def test_the_papers_nineteen_configurations(model, swept):
    folder, records = swept
    assert read(folder / SweepRecord.file, SweepRecord) == records
    keys = [(r.variant, r.fraction, r.keep_last) for r in records]
    assert len(keys) == len(set(keys)) == 19
    assert keys[0] == ("dense", 0.0, False)
    assert {v for v, _, _ in keys} == {"dense", "attention", "mlp", "block"}
    assert {f for _, f, _ in keys[1:]} == {0.10, 0.25, 0.33}
    for record in records[1:]:
        count = round(record.fraction * DEPTH)
        last = DEPTH - 1 if record.keep_last else DEPTH
        window = list(range(last - count, last))
        assert record.plan.indices["attention"] == (
            window if record.variant != "mlp" else []
        )
        assert record.plan.indices["mlp"] == (
            window if record.variant != "attention" else []
        )


def test_examples_are_of_what_loses_least_of_each_variant(swept):
    overflown = swept[1][1].quality.model_copy(
        update={"nll": float("nan")}
    )  # a loss beyond all numbers comes last
    records = [swept[1][1].model_copy(update={"quality": overflown}), *swept[1]]
    best = {record.variant: record.quality.nll for record in least_lost(records)}
    assert best == {
        name: min(r.quality.nll for r in swept[1] if r.variant == name) for name in best
    }
    assert len(best) == 4


@torch.no_grad()
def test_every_line_equals_its_slow_twin(model, swept):
    """The plain model, uncached, with the contributions of the skipped sublayers
    silenced.
    """
    for record in swept[1]:
        losses = []
        with silenced(model, family("llama"), **record.plan.indices):
            for tokens in BATCHES:
                for row in tokens:
                    losses.append(
                        float(cross_entropy(model(row[None]).logits[0, :-1], row[1:]))
                    )
        assert record.quality.nll == pytest.approx(
            sum(losses) / len(losses), rel=1e-5
        ), record.variant
        assert record.quality.sequences == 3


@torch.no_grad()
def test_each_sublayer_alone_costs_what_its_slow_twin_says(model, swept):
    """The model that `skip` leaves, uncached, on the first two sequences alone."""
    found = lines.read_lines(swept[0] / LeaveOneOutRecord.file)
    assert [line["sublayer"] for line in found] == [
        f"{kind}.{layer}" for layer in range(DEPTH) for kind in ("attn", "mlp")
    ]

    def losses():
        return torch.stack(
            [
                cross_entropy(model(row[None]).logits[0, :-1], row[1:])
                for row in BATCHES[0]
            ]
        )

    dense = losses()
    for line in found:
        kind, layer = line["sublayer"].split(".")
        with skip(model, Plan(**{{"attn": "attention"}.get(kind, kind): [int(layer)]})):
            delta = losses() - dense
        assert line["delta_nll"] == pytest.approx(float(delta.mean()), abs=1e-5), line
        assert line["delta_nll_se"] == pytest.approx(
            float(delta.std() / 2**0.5), abs=1e-5
        ), line
        assert line["sequences"] == 2


def test_sublayers_are_left_out_on_two_sequences_however_they_are_batched(
    model, swept, tmp_path
):
    rows = torch.cat(BATCHES)
    run(model, tmp_path, [rows[:1], rows[1:]])
    found, again = (
        lines.read_lines(folder / LeaveOneOutRecord.file)
        for folder in (swept[0], tmp_path)
    )
    assert [line["sequences"] for line in again] == [2] * 2 * DEPTH
    assert [line["delta_nll"] for line in again] == pytest.approx(
        [line["delta_nll"] for line in found], abs=1e-5
    )


def test_what_sublayers_cost_is_not_measured_twice(model, swept, tmp_path, monkeypatch):
    folder, _ = swept
    for path in folder.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / LeaveOneOutRecord.file).read_text()
    scored = []
    monkeypatch.setattr(
        quality, "score", lambda *arguments: scored.append(1) or score(*arguments)
    )
    run(model, tmp_path)
    assert scored == []
    (tmp_path / LeaveOneOutRecord.file).write_text(
        "".join(whole.splitlines(keepends=True)[:7])
    )
    run(model, tmp_path)
    assert scored == [1]
    assert (tmp_path / LeaveOneOutRecord.file).read_text() == whole
    other = re.sub(', "sealed": "[0-9a-f]+"', "", whole).replace(
        '"seed": 0', '"seed": 1'
    )
    (tmp_path / LeaveOneOutRecord.file).write_text(other)
    with pytest.raises(UsageError, match="results with seed"):
        run(model, tmp_path)


def test_the_only_attention_of_a_model_is_not_left_out(tmp_path):
    model, about = family("llama").build(num_hidden_layers=1), Provenance(what=ABOUT)
    leave_one_out(Subject(model, None, BATCHES, tmp_path, about), about, silent)
    assert [
        one.sublayer
        for one in read(tmp_path / LeaveOneOutRecord.file, LeaveOneOutRecord)
    ] == ["mlp.0"]


def test_a_finished_sweep_does_nothing_again(model, swept):
    folder, records = swept
    before = (folder / SweepRecord.file).read_bytes()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    again = run(model, folder)
    handle.remove()
    assert again == records
    assert not calls
    assert (folder / SweepRecord.file).read_bytes() == before


def test_a_torn_last_line_is_done_again_and_no_other(model, swept, tmp_path):
    folder, records = swept
    whole = (folder / SweepRecord.file).read_bytes().splitlines(keepends=True)
    (tmp_path / SweepRecord.file).write_bytes(b"".join(whole[:7]) + whole[7][:50])
    (tmp_path / ScoresRecord.file).write_bytes(
        (folder / ScoresRecord.file).read_bytes()
    )
    with pytest.warns(UserWarning, match="torn"):
        run(model, tmp_path)
    again = (tmp_path / SweepRecord.file).read_bytes().splitlines(keepends=True)
    assert again[:7] == whole[:7]
    assert len(again) == 19
    assert [json.loads(line)["quality"]["nll"] for line in again] == [
        record.quality.nll for record in records
    ]


def test_what_is_of_no_row_and_no_layer_is_measured_again(model, swept, tmp_path):
    folder, records = swept
    for file in folder.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = records[5].model_copy(
        update={
            "plan": Plan([0]),
            "quality": records[5].quality.model_copy(update={"nll": 9.0}),
        }
    )
    similarities = lines.read_lines(folder / SimilarityRecord.file)
    for name, held in (
        (
            SweepRecord.file,
            [
                *(record.line() for record in records[:5]),
                other.line(),
                *(r.line() for r in records[6:]),
            ],
        ),
        (
            SimilarityRecord.file,
            [
                *similarities[:4],
                similarities[4] | {"layer": DEPTH + 1},
                *similarities[5:],
            ],
        ),
    ):
        (tmp_path / name).unlink()
        lines.append(tmp_path / name, *held)
    again = run(model, tmp_path)
    assert [(one.plan, one.quality.nll) for one in again] == [
        (one.plan, one.quality.nll) for one in records
    ]
    assert lines.read_lines(tmp_path / SimilarityRecord.file)[-1][
        "cosine"
    ] == pytest.approx(similarities[4]["cosine"])


def test_scores_of_other_sequences_are_not_taken(model, swept, tmp_path):
    first, *others = lines.read_lines(swept[0] / ScoresRecord.file)
    cut = {
        name: {field: row[:1] for field, row in one.items() if isinstance(row, list)}
        for name, one in first["scores"].items()
    }
    lines.append(tmp_path / ScoresRecord.file, first | {"scores": cut}, *others)
    with pytest.raises(UsageError, match=r"of 1 sequence, not 2; delete that file"):
        run(model, tmp_path)


def test_what_scores_are_missing_is_computed_and_no_other(
    model, swept, tmp_path, monkeypatch
):
    first, *others = lines.read_lines(swept[0] / ScoresRecord.file)
    lacking = list(first["scores"])[3:5]
    kept = {name: one for name, one in first["scores"].items() if name not in lacking}
    lines.append(tmp_path / ScoresRecord.file, first | {"scores": kept}, *others)
    asked = []
    monkeypatch.setattr(
        quality, "score", lambda *given: asked.append(given[1]) or score(*given)
    )
    again = run(model, tmp_path)
    assert [" ".join(plan.names) for plan in asked[0]] == lacking
    assert [one.quality for one in again] == [one.quality for one in swept[1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"about": {"model": "other", "revision": "none"}}, "model"),
        ({"workload": Workload(5, 2, rounds=1)}, "workload"),
        ({"seed": 1}, "seed"),
        ({"batches": BATCHES[:1]}, "batches"),
    ],
)
def test_results_of_other_settings_are_not_mixed_in(model, swept, change, says):
    with pytest.raises(UsageError, match=f"results with {says}") as error:
        run(model, swept[0], **change)
    assert "--out" in str(error.value)


def test_a_second_sweep_on_the_folder_is_told_so(model, swept):
    with lines.lock(swept[0]), pytest.raises(UsageError, match="another run"):
        run(model, swept[0])


def test_progress_reaches_its_total(model, tmp_path):
    seen = []
    run(model, tmp_path, progress=lambda *state: seen.append(state))
    done = [state[0] for state in seen]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(seen[-1][1])


SCRIPT = """
import sys
from pathlib import Path
import test_grid
from families import family
model = family("llama").build(num_hidden_layers=test_grid.DEPTH)
test_grid.run(model, Path(sys.argv[1]), workload=test_grid.Workload(4, 10, rounds=1))
"""


@pytest.mark.slow  # the tests of torn and missing lines do the same, in this process
def test_killed_in_the_middle_it_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / SweepRecord.file
    forked.kill_at(path, 4, SCRIPT, tmp_path)
    killed = path.read_bytes()
    whole = killed[: killed.rfind(b"\n") + 1]
    scores = (tmp_path / ScoresRecord.file).read_bytes()
    assert 4 <= whole.count(b"\n") < 19
    assert forked.run(SCRIPT, tmp_path).returncode == 0
    assert path.read_bytes().startswith(whole)
    assert (tmp_path / ScoresRecord.file).read_bytes() == scores
    records = read(path, SweepRecord)
    assert (
        len({(r.variant, r.fraction, r.keep_last) for r in records})
        == len(records)
        == 19
    )
