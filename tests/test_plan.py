"""Plans: what people read, write and get wrong."""

import json

import pytest

from families import family
from notall import Plan, UsageError, deepest, locate
from notall.running.regrouping import Group, is_portable, regroup


@pytest.fixture(scope="module")
def anatomy():
    return locate(family("llama").build())


def test_round_trip_is_readable(tmp_path):
    plan = Plan(attention=[7, 5], mlp=[12], fingerprint="llama-30x576-1f0c2a9b", note="by hand")
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["attention"] == [5, 7]
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Plan([1]).attention = (2,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"attention": [1], "mlp": [', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "expected"),
        ('{"heads": [1]}', "expected"),
        ('{"attention": [1], "speed": 3}', "speed"),
        ('{"attention": [1, 1]}', "layer 1 is named twice"),
        ('{"attention": [-1]}', "start at 0"),
        ('{"attention": ["a"]}', "attention"),
        ('{"attention": [1.5]}', "attention"),
        ('{"attention": 3}', "attention"),
        ('{"attention": [1, "a"]}', "attention"),
    ],
)
def test_malformed_plans_say_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        Plan.load(path)
    assert "\n" not in str(error.value)
    assert "plan.json" in str(error.value)


def test_a_missing_plan_and_an_unwritable_place(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        Plan([1]).save(tmp_path / "file" / "plan.json")


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(attention=[4]), "0 to 3"),
        (Plan(mlp=[99]), "0 to 3"),
        (Plan(attention=range(4)), "keep at least one"),
        (Plan(attention=range(4), mlp=range(4)), "keep at least one"),
        (Plan(attention=[1], fingerprint="llama-30x576-00000000"), "made for llama-30x576"),
    ],
)
def test_plans_that_do_not_fit_the_model(anatomy, plan, says):
    with pytest.raises(UsageError, match=says):
        plan.check(anatomy)


def test_the_papers_rule(anatomy):
    assert deepest(anatomy, "attention", 0.5).attention == (2, 3)
    assert deepest(anatomy, "attention", 0.5, keep_last=True).attention == (1, 2)
    assert deepest(anatomy, "mlp", 0.25).mlp == (3,)
    block = deepest(anatomy, "block", 0.5, keep_last=True)
    assert block.attention == block.mlp == block.blocks == (1, 2)
    assert not deepest(anatomy, "mlp", 0.0)
    assert deepest(anatomy, "mlp", 1.0).mlp == (0, 1, 2, 3)
    assert deepest(anatomy, "mlp", 1.0, keep_last=True).mlp == (0, 1, 2)


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_fractions_outside_0_to_1(anatomy, fraction):
    with pytest.raises(UsageError, match="outside"):
        deepest(anatomy, "attention", fraction)


def test_an_unknown_variant(anatomy):
    with pytest.raises(UsageError, match="attention, mlp, block"):
        deepest(anatomy, "heads", 0.5)


def test_skipping_all_attention_is_refused(anatomy):
    with pytest.raises(UsageError, match="keep at least one"):
        deepest(anatomy, "attention", 1.0)


def test_regrouping_gives_each_layer_one_attention(anatomy):
    plan = Plan(attention=[0, 2], mlp=[1])
    assert regroup(len(anatomy.blocks), plan) == [
        Group(1, whole=False, before=[0], after=[2]),
        Group(3, whole=True),
    ]


def test_portable_is_an_even_length_of_every_skipped_run(anatomy):
    # Sublayers in order, A0 M0 A1 M1 ...: each maximal run of skipped ones has even length, or it ends the list.
    for bits in range(1 << 8):
        skipped = [bool(bits >> position & 1) for position in range(8)]
        plan = Plan(attention=[i for i in range(4) if skipped[2 * i]], mlp=[i for i in range(4) if skipped[2 * i + 1]])
        if len(plan.attention) == 4:
            continue
        kept = "".join("AM"[position % 2] for position in range(8) if not skipped[position])
        assert is_portable(anatomy, plan) == (kept == "AM" * (len(kept) // 2) and len(kept) % 2 == 0), plan
