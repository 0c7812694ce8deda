"""What a repair gives back is measured once, and kept."""

from __future__ import annotations

import pytest
import torch

from api import (
    MeasuredRecord,
    Provenance,
    RepairedPlan,
    evaluate,
    read,
    records_lines as lines,
    repair_texts,
    repair_texts_measure as measure,
)
from families import family
from notall import Plan, UsageError

pytestmark = pytest.mark.any_transformers
PLAN = Plan([1, 2])
OUTPUT = "model.layers.0.self_attn.o_proj.weight"
ABOUT = Provenance(what={"model": "tiny", "dtype": "float32"}, where={"date": "today"})


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


@pytest.fixture(scope="module")
def plans(model):
    return {
        "skipped": PLAN,
        "repaired": RepairedPlan.of(
            PLAN, weights={OUTPUT: 2 * model.get_parameter(OUTPUT).data}
        ),
    }


def texts(*seeds):
    rows = (
        torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    )
    return {
        f"text {seed}": [row[:3], row[3:]]
        for seed, row in zip(seeds, rows, strict=True)
    }


def test_it_says_what_evaluate_finds_and_keeps_it(model, plans, tmp_path):
    found = measure(model, plans, texts(0, 1), tmp_path, ABOUT)
    expected = [
        one
        for batches in texts(0, 1).values()
        for one in evaluate(model, list(plans.values()), batches)
    ]
    assert [one.quality for one in found] == expected
    assert [(one.text, one.model) for one in found] == [
        (text, of) for text in texts(0, 1) for of in plans
    ]
    assert all(one.plan == PLAN for one in found)
    assert found[0].quality.kl != found[1].quality.kl
    assert read(tmp_path / "measured.jsonl", MeasuredRecord) == found


def test_what_is_kept_is_not_measured_again(model, plans, tmp_path, monkeypatch):
    found = measure(model, plans, texts(0, 1), tmp_path, ABOUT)
    kept = (tmp_path / "measured.jsonl").read_bytes()
    monkeypatch.setattr(
        repair_texts, "evaluate", lambda *_: pytest.fail("it was measured again")
    )
    tomorrow = ABOUT.model_copy(update={"where": {"date": "tomorrow"}})
    assert measure(model, plans, texts(1, 0), tmp_path, tomorrow) == [
        *found[2:],
        *found[:2],
    ]
    assert (tmp_path / "measured.jsonl").read_bytes() == kept


def test_what_was_killed_in_the_middle_is_measured_on(
    model, plans, tmp_path, monkeypatch
):
    found = measure(model, plans, texts(0, 1), tmp_path, ABOUT)
    kept = (tmp_path / "measured.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "measured.jsonl").write_bytes(b"".join(kept[:3]) + kept[3][:40])
    asked = []
    monkeypatch.setattr(
        repair_texts,
        "evaluate",
        lambda *given: asked.append(given[1]) or evaluate(*given),
    )
    with pytest.warns(UserWarning, match="torn"):
        assert measure(model, plans, texts(0, 1), tmp_path, ABOUT) == found
    assert asked == [[plans["repaired"]]]
    assert (tmp_path / "measured.jsonl").read_bytes().splitlines(keepends=True) == kept


@pytest.mark.parametrize("other", ["weights", "windows", "plan", "settings"])
def test_other_weights_windows_plans_or_settings_are_measured_anew(
    model, plans, tmp_path, monkeypatch, other
):
    measure(model, plans, texts(0), tmp_path, ABOUT)
    count = []
    monkeypatch.setattr(
        repair_texts,
        "evaluate",
        lambda *given: count.append(len(given[1])) or evaluate(*given),
    )
    weights = {OUTPUT: 3 * model.get_parameter(OUTPUT).data}
    changed = {
        "weights": (
            plans | {"repaired": RepairedPlan.of(PLAN, weights=weights)},
            texts(0),
            ABOUT,
        ),
        "windows": (plans, {"text 0": texts(1)["text 1"]}, ABOUT),
        "plan": (plans | {"skipped": Plan([1])}, texts(0), ABOUT),
        "settings": (
            plans,
            texts(0),
            Provenance(what={"model": "tiny", "dtype": "bfloat16"}),
        ),
    }
    given, on, about = changed[other]
    measure(model, given, on, tmp_path, about)
    assert count == [2 if other in ("windows", "settings") else 1]
    assert len(read(tmp_path / "measured.jsonl", MeasuredRecord)) == 2 + count[0]


def test_a_folder_in_use_is_refused_before_anything_is_measured(
    model, plans, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        repair_texts, "evaluate", lambda *_: pytest.fail("it was measured")
    )
    with (
        lines.lock(tmp_path),
        pytest.raises(UsageError, match="another run is working"),
    ):
        measure(model, plans, texts(0), tmp_path, ABOUT)
