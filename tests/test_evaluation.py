"""`notall eval` with tasks and diagnostics: what it asks, and how its rows are told
apart.
"""

import importlib.util

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

from notall import Plan
from tiny_tasks import saved, tiny_llama, write_tasks


@pytest.mark.slow
@pytest.mark.usefixtures("own_tasks_only")
def test_eval_adds_tasks_and_what_accuracy_hides(tmp_path, monkeypatch, answered):
    model, task_path = (
        saved(tiny_llama(), tmp_path / "tiny"),
        write_tasks(tmp_path / "tasks"),
    )
    Plan(attention=[1], mlp=[2]).save(tmp_path / "plan.json")
    words = [
        "eval",
        model,
        "--plan",
        tmp_path / "plan.json",
        "--dtype",
        "float32",
        "--sequences",
        2,
        "--length",
        16,
    ]
    task = [
        "--tasks",
        "tiny_choice",
        "--limit",
        7,
        "--task-path",
        task_path,
        "--out",
        tmp_path / "out",
    ]
    found = answered(*words, *task, "--diagnostics")
    assert [row["model"] for row in found["quality"]] == ["dense", "skipped"]
    accuracy, norm = found["tasks"]
    assert (accuracy["metric"], norm["metric"], accuracy["documents"]) == (
        "acc,none",
        "acc_norm,none",
        7,
    )
    assert {row["check"] for row in found["diagnostics"]} >= {
        "passkey at 1024",
        "calibration error",
        "repetition",
    }
    assert (tmp_path / "out" / "answers.jsonl").exists()
    small = ["--sequences", 8, "--length", 16, "--dtype", "float32"]
    answered(
        "repair",
        model,
        "--plan",
        tmp_path / "plan.json",
        "--out",
        tmp_path / "repaired",
        *small,
    )
    words[3] = tmp_path / "repaired"
    both = answered(*words, *task[:-2], "--diagnostics")
    for kind, name in (("tasks", "metric"), ("diagnostics", "check")):
        rows = {
            of: [row for row in both[kind] if row["model"] == of]
            for of in ("skipped", "repaired")
        }
        assert [row[name] for row in rows["repaired"]] == [
            row[name] for row in found[kind]
        ]
        assert rows["skipped"] == found[kind]
        same = [row["value"] for row in rows["repaired"]] == [
            row["value"] for row in rows["skipped"]
        ]
        assert same == (kind == "tasks")  # seven answers of a random model
        assert {row["model"] for row in both[kind]} == set(rows)
