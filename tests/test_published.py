"""Plans by name: those of the results, as the records have them."""

from pathlib import Path

import pytest

import notall
from api import PUBLISHED
from notall import Plan, UsageError
from programs import program

ROOT = Path(__file__).parents[1]
plans = program("docs/plans")

pytestmark = pytest.mark.any_transformers  # it is about files


def test_each_is_as_its_record_has_it_and_no_other_is_there():
    found = {name: plan for name, plan, _ in plans.published()}
    assert {path.stem for path in PUBLISHED.glob("*.json")} == set(found)
    for name, plan in found.items():
        read = Plan.load(f"published:{name}")
        assert (read, read.fingerprint, read.note) == (
            plan,
            plan.fingerprint,
            plan.note,
        )


def test_the_page_lists_them():
    assert (ROOT / "docs/plans.md").read_text(encoding="utf-8") == plans.render()


def test_words_of_a_record_are_read_as_the_plan_that_they_tell():
    for plan in (
        Plan([2, 5, 6, 7], [2, 9]),
        Plan(mlp=[15, 16]),
        Plan([0, 1, 2], [0, 1, 2]),
    ):
        assert Plan(**plans._indices(str(plan))) == plan


def test_an_unknown_name_is_one_line_with_the_nearest(run):
    with pytest.raises(
        UsageError,
        match=(
            r"no published plan smollm2-atention-8.*did you mean smollm2-attention-8-by"
        ),
    ):
        Plan.load("published:smollm2-atention-8")
    code, _, err = run("generate", "x", "Hi", "--plan", "published:../plan")
    assert code == 2
    assert err.count("\n") == 1
    assert "no published plan ../plan" in err


def test_they_fit_the_default_model(default_model):
    structure = notall.locate(default_model[0])
    for path in PUBLISHED.glob("smollm2-*.json"):
        Plan.load(f"published:{path.stem}").check(structure)
    with pytest.raises(UsageError, match="was made for gemma3_text-18x640"):
        Plan.load("published:gemma-3-270m-block-2-by-wiki").check(structure)
