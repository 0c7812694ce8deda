"""What a plan skips for a prompt's tokens alone: written, read, compared and
checked.
"""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from api import Seal, check_export, refuse_nothing_to_train, refuse_prefill
from families import family
from notall import Plan, RepairedPlan, UsageError, locate

LAYERS = st.frozensets(st.integers(0, 40), max_size=8)
WEIGHT = "model.layers.2.self_attn.k_proj.weight"
BIAS = "model.layers.2.self_attn.k_proj.bias"
PROMPT = Plan(prefill={"attention": [2], "mlp": [2, 3]})


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


@st.composite
def plans(draw):
    attention, mlp = draw(LAYERS), draw(LAYERS)
    prefill = {"attention": draw(LAYERS) - attention, "mlp": draw(LAYERS) - mlp}
    return Plan(
        attention, mlp, prefill=prefill | {"last_tokens": draw(st.integers(1, 99))}
    )


# --- writing and reading
# --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plan=plans())
def test_a_plan_file_holds_all_of_it(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    assert again.model_dump() == plan.model_dump()
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert ("prefill" in json.loads(path.read_text())) == bool(plan.prefill)
    assert Plan(**plan.indices) == plan


def test_a_file_without_a_prefill_part_is_as_it_was(tmp_path):
    plan = Plan([1, 3], [2], fingerprint="llama-4x32-48d1233b", note="by hand")
    plan.save(tmp_path / "plan.json")
    assert (
        (tmp_path / "plan.json").read_text()
        == '{\n  "attention": [1, 3],\n  "mlp": [2],\n  "fingerprint": "llama-4x32-48d1233b",\n  "note": "by hand"\n}\n'
    )
    assert plan.identity == ((1, 3), (2,))
    assert plan.indices == {"attention": [1, 3], "mlp": [2]}
    assert RepairedPlan([1], [2]).identity == ((1,), (2,), RepairedPlan().digest)


def test_the_file_and_the_words():
    plan = Plan(prefill={"attention": range(20, 30), "mlp": range(20, 30)})
    assert str(plan) == "prefill-only block 20-29"
    assert plan.in_words() == "10 blocks in the prompt"
    both = Plan([5], prefill={"attention": [20], "last_tokens": 32})
    assert str(both) == "attention 5; prefill-only attention 20 (last 32 tokens whole)"
    assert (
        both.in_words({"attention": 30})
        == "1 of 30 attentions, and 1 of 30 attentions in the prompt"
    )
    assert both.indices["prefill"] == {"attention": [20], "mlp": [], "last_tokens": 32}


def test_a_plan_of_the_prompt_alone_is_true_and_skips_no_sublayer_for_every_token():
    assert PROMPT
    assert len(PROMPT) == 0
    assert not PROMPT.names
    assert not Plan(prefill={"last_tokens": 7})
    assert Plan(prefill={"last_tokens": 7}) == Plan()


@settings(deadline=None)
@given(one=plans(), other=plans())
def test_what_two_plans_skip_together(one, other):
    both = one | other
    assert set(both.names) == {*one.names, *other.names}
    assert set(both.prefill.names) == {*one.prefill.names, *other.prefill.names} - set(
        both.names
    )
    if both.prefill:
        assert both.prefill.last_tokens == max(
            p.prefill.last_tokens for p in (one, other)
        )
    assert both == other | one
    assert one | one == one


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"attention": [2], "prefill": {"attention": [2]}},
            "attn.2 is skipped for every token, so leave it out",
        ),
        (
            {"mlp": [4, 2], "prefill": {"mlp": [1, 2]}},
            "mlp.2 is skipped for every token",
        ),
        (
            {"prefill": {"mlp": [1], "last_tokens": 0}},
            "last_tokens: 0 is no number of tokens.* give 1 or more",
        ),
        (
            {"prefill": {"mlp": [1], "last_tokens": 1.0}},
            "last_tokens: 1.0 is no number of tokens: give whole",
        ),
        (
            {"prefill": {"mlp": [1], "last_tokens": True}},
            "last_tokens: True is no number of tokens",
        ),
        ({"prefill": {"mlp": [1], "last_tokens": 1 << 40}}, "is no number of tokens"),
        ({"prefill": {"mlp": [1, 1]}}, "prefill.* mlp: layer 1 is named twice"),
        ({"prefill": {"mlp": [-1]}}, "start at 0"),
        ({"prefill": {"mlp": "12"}}, "give a list"),
        (
            {"prefill": {"mlps": [1]}},
            r"it has attention, mlp, last_tokens, and no mlps \(did you mean mlp\?\)",
        ),
        ({"prefill": [3]}, r"give what the prompt skips, such as"),
        ({"prefill": None}, r"give what the prompt skips, such as"),
    ],
)
def test_malformed_ones_say_what_is_wrong(tmp_path, fields, says):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(fields))
    for make in (lambda: Plan(**fields), lambda: Plan.load(path)):
        with pytest.raises(UsageError, match=says) as error:
            make()
        assert len(str(error.value)) < 300


# --- checking
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(prefill={"attention": [4]}), "names layer 4, but layers are 0 to 3"),
        (Plan(prefill={"mlp": [9]}), "names layer 9, but layers are 0 to 3"),
        (
            Plan(prefill={"attention": range(4)}),
            "skips every attention in the prompt; keep at least one",
        ),
        (
            Plan([0], prefill={"attention": [1, 2, 3]}),
            "skips every attention in the prompt",
        ),
        (
            Plan(prefill={"attention": [1]}, fingerprint="llama-30x576-00000000"),
            "made for llama-30x576",
        ),
    ],
)
def test_plans_that_do_not_fit_the_model(model, plan, says):
    with pytest.raises(UsageError, match=says):
        plan.check(locate(model))
    PROMPT.check(locate(model))


# older ones hold a recurrent state otherwise, and are refused
@pytest.mark.any_transformers
def test_mixers_without_keys_and_values_run_in_the_prompt():
    structure = locate(family("qwen3_next").build())
    linear = next(
        part for part in structure.sublayers if part.mixer == "linear_attention"
    )
    full = next(
        part
        for part in structure.sublayers
        if part.kind == "attention" and part.kv_bytes_per_token
    )
    with pytest.raises(
        UsageError,
        match=f"prompt alone cannot skip {linear.name}, as a linear_attention keeps",
    ):
        Plan(prefill={"attention": [linear.index]}).check(structure)
    Plan(prefill={"attention": [full.index]}).check(structure)


# older ones hold a recurrent state otherwise, and are refused
@pytest.mark.any_transformers
@pytest.mark.parametrize("name", ["gemma3n_text", "zamba2"])
def test_layers_in_place_and_shared_keys_are_refused(name):
    structure = locate(family(name).build())
    assert structure.in_place
    part = structure.sublayers[-1]
    with pytest.raises(
        UsageError, match=f"the prompt alone cannot skip {part.name}, as sublayers of"
    ):
        Plan(prefill={part.kind: [part.index]}).check(structure)


# --- weights of its own
# --------------------------------------------------------------------------------------


def repaired(model, **more):
    weights = {
        WEIGHT: torch.ones_like(model.get_parameter(WEIGHT)),
        BIAS: torch.ones(16),
    }
    return RepairedPlan.of(PROMPT, prompt_weights=weights, **more)


def test_prompt_weights_are_part_of_the_plan(model, tmp_path):
    plan = repaired(model).knowing(model)
    assert plan.digest != RepairedPlan.of(PROMPT).digest
    assert plan.digest != RepairedPlan.of(PROMPT, weights=plan.prompt_weights).digest
    assert plan != PROMPT
    assert plan.unrepaired == PROMPT
    assert str(plan) == "prefill-only block 2; mlp 3 (repaired)"
    assert plan.added_bytes == sum(one.nbytes for one in plan.prompt_weights.values())
    plan.save(tmp_path / "kept")
    again = RepairedPlan.load(tmp_path / "kept")
    assert again == plan
    assert again.prefill == plan.prefill
    assert not again.weights
    assert all(
        torch.equal(again.prompt_weights[path], one)
        for path, one in plan.prompt_weights.items()
    )
    assert (again | Plan([1])).prompt_weights.keys() == plan.prompt_weights.keys()
    again.check(locate(model))
    again.check_replaced(model)
    with pytest.raises(UsageError, match="another model of the same shape"):
        again.check_replaced({WEIGHT: torch.zeros_like(plan.prompt_weights[WEIGHT])})


def test_prompt_weights_are_placed_with_a_bias_where_the_model_has_none(model):
    placed = repaired(model).placed(model)
    part = next(part for part in locate(model).sublayers if part.name == "attn.2")
    found = placed.prompt_weights_of(locate(model), part)
    assert found.keys() == {"self_attn.k_proj.weight", "self_attn.k_proj.bias"}
    assert not placed.weights_of(locate(model), [part])
    assert placed.digest == repaired(model).digest
    for path, weight in (
        (BIAS, torch.ones(17)),
        (WEIGHT, torch.ones(16)),
        (WEIGHT, torch.ones(16, 31)),
    ):
        wrong = RepairedPlan.of(PROMPT, prompt_weights={path: weight})
        with pytest.raises(UsageError, match="but the model's matrix is"):
            wrong.placed(model)
    norm = RepairedPlan.of(
        PROMPT, prompt_weights={"model.layers.2.input_layernorm.weight": torch.ones(32)}
    )
    with pytest.raises(
        UsageError, match=r"has no model\.layers\.2\.input_layernorm\.weight, which"
    ):
        norm.placed(model)
    with pytest.raises(UsageError, match=r"has no .*k_proj\.bias"):
        RepairedPlan.of(PROMPT, weights={BIAS: torch.ones(16)}).placed(model)
    with pytest.raises(
        UsageError, match=r"no sublayer of the model has lm_head\.weight"
    ):
        RepairedPlan.of(PROMPT, prompt_weights={"lm_head.weight": torch.ones(1)}).check(
            locate(model)
        )


def test_a_seal_of_a_plan_without_a_prefill_part_is_as_it_was():
    plan = Plan([1], [2])
    assert (
        Seal(plan=plan.indices, files={"a": "b"}).model_dump_json()
        == '{"plan":{"attention":[1],"mlp":[2]},"files":{"a":"b"}}'
    )


# --- what cannot do it yet
# --------------------------------------------------------------------------------------


def test_what_cannot_skip_in_the_prompt_alone_says_so(tmp_path):
    uses = {
        "an export as nemotron-nas": lambda: check_export(
            None, PROMPT, "nemotron-nas", tmp_path / "out"
        ),
        "anything": lambda: refuse_prefill(PROMPT, "anything"),
    }
    for what, use in uses.items():
        with pytest.raises(
            UsageError,
            match=(
                f"{what} cannot skip sublayers in the prompt alone, as this plan does"
            ),
        ):
            use()
    refuse_prefill(Plan([1]), "anything")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(attention=[1], prefill={"mlp": [2]}),  # its first part is repaired
        Plan(prefill={"attention": [1], "mlp": [2]}),
        Plan(mlp=[2]),
    ],
    ids=["both parts", "an attention", "every token"],
)
def test_only_a_prompts_mlps_have_nothing_to_train(plan):
    refuse_nothing_to_train(plan)
    with pytest.raises(UsageError, match="this plan has none"):
        refuse_nothing_to_train(Plan(prefill={"mlp": [2]}))
