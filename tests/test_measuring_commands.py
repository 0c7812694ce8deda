"""notall eval, bench and draft: what a plan costs and saves, printed, kept, and shown
by a report.
"""

import json

import pytest

from api import (
    BenchRecord,
    DraftRecord,
    MeasuredRecord,
    Provenance,
    Workload,
    bench,
    read,
    records_lines as lines,
)
from command_line import FAST, QUICK
from families import family
from notall import Plan, UsageError

pytestmark = [
    pytest.mark.usefixtures("short_prose"),
    pytest.mark.any_transformers,  # of words and files
]


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    Plan([2], [4]).save(path)
    return path


def timed(shown):
    """The record that `bench --json` prints."""
    (record,) = json.loads(shown)["bench"]
    return record


def test_plan_eval_bench_and_generate_work_together(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(
        "plan", folder, "--skip", "attention:0.33", "--keep-last", "-o", path, "--json"
    )
    assert code == 0
    assert Plan.load(path).attention == (3, 4)
    dense, skipped = (one["footprint"] for one in json.loads(out)["plan"])
    assert skipped["kv_bytes_per_token"] == dense["kv_bytes_per_token"] * 4 // 6
    code, out, _ = run("eval", folder, "--plan", path, *QUICK, "--json")
    dense, skipped = (one["quality"] for one in json.loads(out)["quality"])
    assert code == 0
    assert dense["delta_nll"] == 0 != skipped["delta_nll"]
    code, out, _ = run("bench", folder, "--plan", path, *FAST, "--json")
    assert code == 0
    dense, skipped = (
        timed(out)[name]["times"]["speedup_decode"]["median"]
        for name in ("dense", "skipped")
    )
    assert dense == 1 != skipped
    code, out, _ = run(
        "generate", folder, "abc", "--plan", path, "--max-new-tokens", "5"
    )
    assert code == 0
    assert out.strip()


@pytest.mark.parametrize("skip", ["attention", "attention:0.5"])
def test_what_is_skipped_may_be_said_without_a_plan_file(run, folder, tmp_path, skip):
    """As a plan file of the same says it."""
    path = tmp_path / "plan.json"
    words = ["--skip", skip, "--keep-last"]
    assert run("plan", folder, *words, "-o", path)[0] == 0
    for command in (
        ["eval", folder, *QUICK, "--json"],
        ["generate", folder, "abc", "--max-new-tokens", "9"],
    ):
        code, out, err = run(*command, *words)
        assert code == 0, err
        if command[0] == "eval":
            found, planned = (
                json.loads(out),
                json.loads(run(*command, "--plan", path)[1]),
            )
            assert found["quality"] == planned["quality"]
            assert str(path) in planned["verdict"]["next"]
            assert "--skip attention:0." in found["verdict"]["next"]
        else:
            assert out == run(*command, "--plan", path)[1] != run(*command)[1]
    skipped = timed(run("bench", folder, *FAST, *words, "--json")[1])
    assert skipped["plan"]["attention"] == list(Plan.load(path).attention)


# --- eval
# --------------------------------------------------------------------------------------


def test_eval_keeps_what_it_measured_once_and_a_report_shows_it(
    run, folder, plan, tmp_path
):
    command = ["eval", folder, "--plan", plan, "--out", tmp_path / "e", *QUICK]
    code, out, err = run(*command, "--json")
    assert (code, err) == (0, "")
    assert run(*command)[0] == 0
    (kept,) = read(tmp_path / "e" / "measured.jsonl", MeasuredRecord)
    assert kept.plan == Plan([2], [4])
    assert (
        kept.quality.model_dump(mode="json")
        == json.loads(out)["quality"][-1]["quality"]
    )
    page = tmp_path / "report.html"
    code, _, err = run("report", tmp_path / "e", "-o", page)
    assert (code, err) == (0, "")
    assert kept.plan.in_words() in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_eval_of_a_repair_keeps_both_states(run, folder, plan, tmp_path):
    code, _, err = run(
        "eval",
        folder,
        "--plan",
        plan,
        "--repair",
        "refit",
        "--out",
        tmp_path / "e",
        *QUICK,
    )
    assert code == 0, err
    skipped, repaired = read(tmp_path / "e" / "measured.jsonl", MeasuredRecord)
    assert (skipped.model, repaired.model) == ("skipped", "repaired")
    assert skipped.what["weights"] == "none" != repaired.what["weights"]


# --- bench
# --------------------------------------------------------------------------------------


def test_a_bench_ends_with_what_a_whole_answer_takes(run, folder, tmp_path):
    code, told, _ = run(
        "bench", folder, *FAST, "--skip", "attention:0.5", "-o", tmp_path / "times"
    )
    assert code == 0
    (record,) = read(tmp_path / "times" / "bench.jsonl", BenchRecord)
    dense, skipped = (
        one.times.prefill_ms.median + 2 * one.times.decode_ms_per_token.median
        for one in (record.dense, record.skipped)
    )
    assert (
        f"take {skipped:,.0f} ms, where the original model takes {dense:,.0f}:"
        f" {dense / skipped:.2f} times as fast" in " ".join(told.split())
    )
    assert "Without" not in run("bench", folder, *FAST)[1]


def test_bench_keeps_its_records_for_a_report(run, folder, tmp_path):
    out, page = tmp_path / "b", tmp_path / "report.html"
    for sequences in ("1", "2"):
        code, shown, err = run(
            *(
                "bench",
                folder,
                "--skip",
                "mlp:0.5",
                *FAST,
                "--concurrency",
                sequences,
                "-o",
                out,
                "--json",
            )
        )
        assert (code, err) == (0, "")
    first, second = read(out / "bench.jsonl", BenchRecord)
    assert BenchRecord.model_validate_json(json.dumps(timed(shown))) == second
    assert (second.plan, second.concurrency, second.prompt_tokens) == (
        Plan(mlp=[3, 4, 5]),
        2,
        4,
    )
    assert first.concurrency == 1
    assert {"model", "revision", "dtype", "seed", "dummy_weights"} <= second.what.keys()
    assert str(tmp_path) not in (out / "bench.jsonl").read_text()
    assert run("report", out, "-o", page)[0] == 0
    assert "3 MLP" in page.read_text(encoding="utf-8")


def test_bench_times_nothing_where_it_may_not_write(monkeypatch, tmp_path):
    from api import speed

    monkeypatch.setattr(
        speed, "time_plans", lambda *_, **__: pytest.fail("it was timed")
    )
    model = family("llama").build()
    with (
        lines.lock(tmp_path),
        pytest.raises(UsageError, match="another run is working"),
    ):
        bench(model, Plan([1]), Workload(), Provenance(what={}), out=tmp_path)


def test_bench_of_a_shape_with_dummy_weights(run, folder, tmp_path):
    config = tmp_path / "config.json"
    config.write_text((folder / "config.json").read_text())
    code, out, _ = run(
        "bench",
        "--shape",
        config,
        "--dummy-weights",
        "--skip",
        "block:0.5",
        *FAST,
        "--json",
    )
    assert code == 0
    dense, skipped = (timed(out)[name] for name in ("dense", "skipped"))
    assert skipped["footprint"]["params"] < dense["footprint"]["params"]
    assert skipped["times"]["peak_bytes"] is None


# --- draft
# --------------------------------------------------------------------------------------


def test_draft_tells_what_a_plan_brings_and_keeps_it_for_a_report(
    run, folder, tmp_path
):
    out, page, path = tmp_path / "d", tmp_path / "report.html", tmp_path / "plan.json"
    Plan([4]).save(path)
    small = [
        "--sequences",
        "2",
        "--prompt-tokens",
        "8",
        "--generation-tokens",
        "6",
        "--most",
        "2",
        "--rounds",
        "1",
    ]
    small += ["--dtype", "float32"]
    code, shown, err = run("draft", folder, "--plan", path, *small, "-o", out, "--json")
    assert (code, err) == (0, "")
    kept = read(out / "drafts.jsonl", DraftRecord)
    assert [
        DraftRecord.model_validate_json(json.dumps(row))
        for row in json.loads(shown)["drafts"]
    ] == kept
    assert [(one.decoding, one.drafted) for one in kept] == [
        *(("greedy", 1), ("greedy", 2), ("sampled", 1), ("sampled", 2)),
    ]
    verdict = json.loads(shown)["verdict"]
    assert verdict["said"].startswith("Drafting with it would be ")
    best = verdict["best"]["greedy"]["drafted"]
    assert [one.same_texts for one in kept] == [
        2 if place == best - 1 else None for place in range(4)
    ]
    about = kept[0].what
    assert (
        about["prompt_tokens"],
        about["generation_tokens"],
        about["length"],
        about["repair"],
    ) == (8, 6, 14, "none")
    assert str(tmp_path) not in (out / "drafts.jsonl").read_text()
    code, shown, _ = run("draft", folder, "--skip", "mlp:0.17", *small, "-o", out)
    assert code == 0
    assert "Drafting with it would be " in shown.splitlines()[-1]
    assert run("report", out, "-o", page)[0] == 0
    told = page.read_text(encoding="utf-8")
    assert "As a draft model" in told
    assert "Below 1, drafting is" in told
    assert told.count("1 MLP") >= 4 <= told.count("1 attention")
    code, _, err = run("draft", folder, *small)
    assert (code, "say what to leave out" in err) == (2, True)
