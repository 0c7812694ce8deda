"""Plans: what people read, write and get wrong."""

import json
import time
import tracemalloc

import numpy as np
import pytest

from api import Layer, is_portable, regroup, several_of
from families import family
from notall import Plan, RepairedPlan, UsageError, deepest, locate


@pytest.fixture(scope="module")
def structure():
    return locate(family("llama").build())


def test_round_trip_is_readable(tmp_path):
    plan = Plan(
        attention=[7, 5], mlp=[12], fingerprint="llama-30x576-1f0c2a9b", note="by hand"
    )
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["attention"] == [5, 7]
    assert Plan.load(tmp_path / "plan.json").model_dump() == plan.model_dump()


def test_plans_are_equal_that_run_alike():
    plan = Plan([1], [2], note="by hand", fingerprint="llama-30x576-1f0c2a9b")
    assert plan == Plan([1], [2])
    assert len({plan, Plan([1], [2], note="of a search"), Plan([1])}) == 2
    assert plan != RepairedPlan([1], [2])


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
        ('{"block": [9]}', "; a block is named in both$"),
        ('{"attention": [1], "blocks": [9]}', "no blocks; a block is named in both$"),
        ('{"attention": [1], "mpl": [9]}', r"no mpl \(did you mean mlp\?\)$"),
        ('{"attention": [1], "speed": 3}', "no speed$"),
        ('{"attention": [1, 1]}', "layer 1 is named twice"),
        ('{"attention": [-1]}', "start at 0"),
        ('{"attention": ["a"]}', "attention"),
        ('{"attention": [1.5]}', "attention"),
        ('{"attention": 3}', "attention"),
        ('{"attention": [1, "a"]}', "attention"),
        ('{"attention": "12", "mlp": {"0": [3]}}', "give a list"),
        ('{"attention": [1], "mlp": {"0": [3]}}', "mlp: give a list"),
        ('{"attention": ["1"]}', "'1' is no layer index"),
        ('{"attention": [1.0]}', "1.0 is no layer index"),
        ('{"attention": [true]}', "True is no layer index"),
        ('{"attention": [[1]]}', r"\[1\] is no layer index"),
        ('{"attention": null}', "give a list"),
        ('{"attention": [NaN]}', "not valid JSON"),
        ('{"attention": [1], "mlp": [], "attention": [2]}', 'says "attention" twice'),
        ('{"attention": [40000000]}', "no model has a layer 40000000"),
        ('{"attention": [2147483648]}', "no model has a layer"),
        ('{"attention": [-%s]}' % ("9" * 4000), "start at 0"),
        ('{"attention": [%s]}' % ("9" * 9999), "not valid JSON"),
        ('{"attention": ' + "[" * 5000 + "]" * 5000 + "}", "not valid JSON"),
        ('{"attention": [1], "note": {"a": 1, "a": 2}}', 'says "a" twice'),
        ('{"attention": [1], "note": 3}', "note"),
        ('{"attention": [1], "self": 3}', "self"),
        ('{"attention": [1], "%s": 3}' % ("speed" * 999), "speed"),
        (
            '{"attention": [1], "%s": [{"a": 1, "a": 2}]}' % ("speed" * 999),
            'says "a" twice',
        ),
        ('{"%s": 1, "%s": 2}' % (("speed" * 999,) * 2), 'says "speed'),
        ('{"attention": "%s"}' % ("x\x1b[31m" * 999), "not valid JSON"),
        ('{"attention": "%s"}' % ("x" * 999), "give a list"),
        ('{"attention": ["\\u001b[31m\\n"]}', "no layer index"),
    ],
)
def test_malformed_plans_say_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        Plan.load(path)
    said = str(error.value)
    assert said.isprintable()  # one line, and nothing that a terminal obeys
    assert len(said) < 300
    assert "plan.json" in said


def test_a_plan_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"attention": [1], "note": "\xff"}')
    with pytest.raises(UsageError, match="not valid JSON"):
        Plan.load(path)
    path.write_bytes(
        b"\xef\xbb\xbf" + b'{"attention": [1]}'
    )  # some editors begin UTF-8 so
    assert Plan.load(path) == Plan([1])


def test_a_huge_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "huge.json"
    path.write_text('{"attention": [1], "note": "%s"}' % ("x" * (1 << 20)))
    tracemalloc.start()
    with pytest.raises(UsageError, match="more than 1,048,576 bytes"):
        Plan.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23
    with pytest.raises(UsageError, match=r"huge\.json is no plan: "):
        Plan.load(path)


def test_many_layers_are_read_in_no_time():
    """Each index against each other would take minutes."""
    started = time.perf_counter()
    with pytest.raises(UsageError, match="layer 99999 is named twice"):
        Plan([*range(100_000), 99_999])
    assert time.perf_counter() - started < 5


def test_indices_may_be_any_whole_numbers_in_any_order():
    assert Plan(np.array([3, 1]), {2, 0}) == Plan(iter((1, 3)), range(0, 3, 2))
    assert all(type(index) is int for index in Plan(np.array([3, 1])).attention)
    with pytest.raises(UsageError, match="no layer index"):
        Plan([True])
    with pytest.raises(UsageError, match="give a list"):
        Plan("12")


def test_messages_cut_what_they_quote(structure, tmp_path):
    far = tmp_path.joinpath(*["folder" * 9] * 9)
    for work in (
        lambda: Plan([1], fingerprint="llama" * 999).check(structure),
        lambda: Plan.load(far),
        lambda: Plan([1]).save(far),
    ):
        with pytest.raises(UsageError) as error:
            work()
        assert len(str(error.value)) < 300


def test_a_missing_plan_and_an_unwritable_place(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        Plan([1]).save(tmp_path / "file" / "plan.json")


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(attention=[4]), "0 to 3; make a plan for it"),
        (Plan(mlp=[99]), "0 to 3"),
        (Plan(attention=range(4)), "keep at least one"),
        (Plan(attention=range(4), mlp=range(4)), "keep at least one"),
        (
            Plan(attention=[1], fingerprint="llama-30x576-00000000"),
            "made for llama-30x576",
        ),
    ],
)
def test_plans_that_do_not_fit_the_model(structure, plan, says):
    with pytest.raises(UsageError, match=says):
        plan.check(structure)


def test_a_plan_for_another_model_names_a_fix_for_any_plan(structure):
    """A published plan is no file of the user's, and one made in Python no file at
    all.
    """
    published = Plan.load("published:smollm2-attention-8-by-mix")
    with pytest.raises(
        UsageError,
        match="make a plan for this model, or copy this one without its fingerprint",
    ):
        published.check(structure)


def test_in_words_a_block_is_one_and_a_plural_has_its_s():
    among = {"attention": 24, "mlp": 24, "block": 24}
    assert Plan([3], [3]).in_words() == "1 block"
    assert Plan([3, 9], [3, 9]).in_words(among) == "2 of 24 blocks"
    assert (
        Plan([3], [3]).in_words({"attention": 1, "mlp": 1, "block": 1})
        == "1 of 1 block"
    )
    assert Plan([3, 9], [9]).in_words(among) == "2 of 24 attentions and 1 of 24 MLPs"
    assert Plan(mlp=[0]).in_words() == "1 MLP"
    assert Plan().in_words(among) == "nothing"


def test_the_papers_rule(structure):
    assert deepest(structure, "attention", 0.5).attention == (2, 3)
    assert deepest(structure, "attention", 0.5, keep_last=True).attention == (1, 2)
    assert deepest(structure, "mlp", 0.25).mlp == (3,)
    block = deepest(structure, "block", 0.5, keep_last=True)
    assert block.attention == block.mlp == block.blocks == (1, 2)
    assert not deepest(structure, "mlp", 0.0)
    assert deepest(structure, "mlp", 1.0).mlp == (0, 1, 2, 3)
    assert deepest(structure, "mlp", 1.0, keep_last=True).mlp == (0, 1, 2)


def test_the_papers_rule_takes_a_count_too(structure):
    assert deepest(structure, "attention", count=2).attention == (2, 3)
    assert deepest(structure, "mlp", count=3, keep_last=True).mlp == (0, 1, 2)
    for more in (
        {"count": 4, "keep_last": True},
        {"count": -1},
        {"count": 1, "fraction": 0.5},
    ):
        with pytest.raises(
            UsageError, match=r"of [34] MLPs: give a fraction, or a count from 0 to"
        ):
            deepest(structure, "mlp", **more)
    with pytest.raises(UsageError, match="a number from 0 to 1, not NoneType"):
        deepest(structure, "mlp")


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_fractions_outside_0_to_1(structure, fraction):
    with pytest.raises(UsageError, match="outside"):
        deepest(structure, "attention", fraction)


def test_an_unknown_variant(structure):
    with pytest.raises(UsageError, match="attention, mlp, block"):
        deepest(structure, "heads", 0.5)


def test_skipping_all_attention_is_refused(structure):
    with pytest.raises(UsageError, match="keep at least one"):
        deepest(structure, "attention", 1.0)


def test_regrouping_gives_each_layer_one_attention(structure):
    plan = Plan(attention=[0, 2], mlp=[1])
    assert regroup(structure.kinds, plan, lambda *_: False) == [
        Layer(1, None, before=[0], after=[2]),
        Layer(3, 3),
    ]
    assert regroup(structure.kinds, plan, lambda *_: True) == [
        Layer(1, 2, before=[0]),
        Layer(3, 3),
    ]


def test_of_several_mlps_behind_an_attention_the_first_is_its_own(structure):
    plan = Plan(attention=[1, 2], mlp=[0])
    assert regroup(structure.kinds, plan, lambda *_: True) == [
        Layer(0, 1, after=[2]),
        Layer(3, 3),
    ]


def test_portable_is_an_even_length_of_every_skipped_run(structure):
    # Sublayers in order, A0 M0 A1 M1 ...: each maximal run of skipped ones has even
    # length, or it ends the list.
    for bits in range(1 << 8):
        skipped = [bool(bits >> position & 1) for position in range(8)]
        plan = Plan(
            attention=[i for i in range(4) if skipped[2 * i]],
            mlp=[i for i in range(4) if skipped[2 * i + 1]],
        )
        if len(plan.attention) == 4:
            continue
        kept = "".join(
            "AM"[position % 2] for position in range(8) if not skipped[position]
        )
        assert is_portable(structure, plan) == (
            kept == "AM" * (len(kept) // 2) and len(kept) % 2 == 0
        ), plan


def test_a_complaint_is_one_line_whatever_it_quotes():
    assert str(UsageError("blk.0.\nattn_q\r\nis\u2028odd")) == "blk.0. attn_q is odd"


def test_a_whole_number_is_written_as_one_whatever_its_type():
    assert several_of("attention", 2.0) == "2 attentions"
    assert several_of("mlp", 1.0) == "1 MLP"
    assert several_of("block", 1.5) == "1.5 blocks"
