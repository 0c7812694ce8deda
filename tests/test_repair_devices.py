"""Repairs and healings on devices come to what they come to on the CPU: on one, and
split over two.

Models and ids are made on the CPU; what moves is for notall to see to. Where there are
no devices they are simulated, and compute what the CPU does (see `simulated_devices`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from api import METHODS, Training, by_count, heal, heal_by, method
from devices import ONE, TWO, devices_of, each_place, on_one, on_two
from families import FAMILIES, family
from hybrid_families import HYBRIDS
from notall import (
    Plan,
    RepairedPlan,
    SearchConfig,
    Space,
    TrainConfig,
    UnsupportedModel,
    UsageError,
    choose_plan,
    evaluate,
    locate,
    repair,
    skip,
)
from plain_families import OTHERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.any_transformers,  # of where it runs; repairs themselves run on both
    pytest.mark.devices(count=2),
]

PLACES = {"one": on_one, "two": on_two}
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# A plain model, tied embeddings, norms behind projections, experts, a hybrid, and
# shared KV.
NAMES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "qwen3_next": {},
    "gemma4_text": {},
    "gemma4_text (nothing shared)": {},
}
PLAN = Plan(
    attention=[2, 3], mlp=[1]
)  # a gap from one device to the other, and one on the second


def windows(count, rows=4, tokens=16, seed=0):
    """Batches of token ids, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (rows, tokens), generator=draw) for _ in range(count)]


TEXT, TRAINED, HELD_OUT = windows(4), windows(6, seed=1), windows(2, seed=2)


# --- what is done, to numbers that can be compared


def repaired(model, **options):
    found = repair(model, PLAN, TEXT, **options)
    assert all(
        weight.device == model.get_parameter(path).device
        for path, weight in found.weights.items()
    )
    return weights_of(found), [
        (one.sublayers, one.ridge, one.left, one.why) for one in found.refits
    ]


def repaired_into_files(model):
    with tempfile.TemporaryDirectory() as folder:
        return repaired(model, offload=Path(folder))


def kept(model):
    """Interrupted, gone on with, and read again."""

    def fail(done, *_):
        if done > 8:
            raise RuntimeError("planted")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "repaired"
        with pytest.raises(RuntimeError, match="planted"):
            repair(model, PLAN, TEXT, out=folder, progress=fail)
        found = repair(model, PLAN, TEXT, out=folder)
        return weights_of(found), applied(model, RepairedPlan.load(folder))


def of_few_tokens(model):
    """Solved by the tokens, which are fewer than the features."""
    return weights_of(repair(model, PLAN, [TEXT[0][:2, :6]]))


def by_method(model, name):
    found = method(name).repair(model, PLAN, TEXT)
    maps = [tensor.cpu() for one in found.maps.values() for tensor in one.tensors]
    return (
        weights_of(found),
        maps,
        [values(one) for one in evaluate(model, [found], HELD_OUT)],
    )


def own_repair(model, plan, batches):
    """By how much the model's own forward takes the ids as they are given."""
    with torch.no_grad():
        size = float(model(batches[0]).logits.float().abs().mean().sigmoid())
    own = {
        path: one
        for path, one in model.named_parameters()
        if "layers.3." in path and one.dim() == 2
    }
    return RepairedPlan.of(
        plan, weights={path: size * one.detach() for path, one in own.items()}
    )


def healed(model, train, plan=PLAN, **options):
    found = heal(
        model, plan, TRAINED, HELD_OUT, TrainConfig(train, rate=1e-3, **options)
    )
    return weights_of(found), [
        values(one) for one in evaluate(model, [plan, found], HELD_OUT)
    ]


def healed_behind_repair(model):
    return healed(model, "outputs", repair(model, PLAN, TEXT))


def healed_for_a_time(model):
    clock = itertools.count()  # each look at it is a second later
    config = TrainConfig(minutes=1.0, rate=1e-3)
    training = Training(
        PLAN, TRAINED, HELD_OUT, config, clock=lambda: float(next(clock))
    )
    return weights_of(heal_by(training, model))


def healed_in_two_runs(model, train="outputs"):
    def fail(done, *_):
        if done == 3:
            raise RuntimeError("planted")

    def run(name, **more):
        config = TrainConfig(train, rate=1e-3, warm_up=0.3)
        return heal(
            model, PLAN, TRAINED, HELD_OUT, config, out=Path(folder) / name, **more
        )

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(RuntimeError, match="planted"):
            run("stopped", progress=fail)
        found = run("stopped")
        assert_equal(weights_of(found), weights_of(run("whole")))
        return weights_of(found), applied(
            model, RepairedPlan.load(Path(folder) / "stopped")
        )


def applied(model, found):
    """What a repaired plan changes: in the model itself, and as it is measured."""
    ids = HELD_OUT[0].to(model.get_input_embeddings().weight.device)
    with torch.no_grad(), skip(model, found):
        logits = model(ids).logits.float().cpu()
    return logits, [values(one) for one in evaluate(model, [PLAN, found], HELD_OUT)]


def saved(model):
    with tempfile.TemporaryDirectory() as name:
        found = repair(model, PLAN, TEXT)
        found.save(Path(name) / "repaired")
        again = RepairedPlan.load(Path(name) / "repaired")
    assert_equal(applied(model, again), applied(model, found))
    return applied(model, found)


def chosen_after_repair(model):
    space = Space(locate(model), "sublayer", keep_last=1)
    config = SearchConfig(after_repair=True)
    found = choose_plan(model, "search", space, by_count(space, 1), TEXT, config=config)
    return found.plan.indices, found.cost


CASES = {
    "repair": repaired,
    "repair in files": repaired_into_files,
    "repair in a folder": kept,
    "repair of few tokens": of_few_tokens,
    "repair saved": saved,
    "repair of one's own": functools.partial(by_method, name=own_repair),
    "choice after repair": chosen_after_repair,
    **{f"by {name}": functools.partial(by_method, name=name) for name in METHODS},
    **{
        f"heal {train}": functools.partial(healed, train=train)
        for train in ("outputs", "all", "lora")
    },
    "heal in a warm-up": functools.partial(healed, train="outputs", warm_up=1.0),
    "heal behind a repair": healed_behind_repair,
    "heal for a time": healed_for_a_time,
    "heal in two runs": healed_in_two_runs,
    "heal lora in two runs": functools.partial(healed_in_two_runs, train="lora"),
}


# --- the comparison


def weights_of(found):
    return [
        (path, weight.float().cpu()) for path, weight in sorted(found.weights.items())
    ]


def values(facts):
    return [
        number for number in facts.model_dump().values() if isinstance(number, float)
    ]


def flat(found):
    if isinstance(found, list | tuple):
        return [value for one in found for value in flat(one)]
    return [found]


def assert_equal(found, expected, rounding=1e-4):
    """Numbers but for rounding, anything else the same."""
    ours, theirs = flat(found), flat(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= rounding * other.abs().max()
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=rounding, abs=rounding / 10)
        else:
            assert one == other


def outcome(case, model):
    """What comes of it, or by what line it is refused."""
    try:
        return CASES[case](model)
    except (UsageError, UnsupportedModel) as refusal:
        return str(refusal)


@functools.cache
def on_cpu(name, dtype=torch.float32):
    if not family(name).exists:
        pytest.skip(f"transformers has no {name}")
    return family(name).build("sdpa", **NAMES.get(name, {})).to(dtype)


@functools.cache
def placed(name, place, dtype=torch.float32):
    return PLACES[place](copy.deepcopy(on_cpu(name, dtype)))


@functools.cache
def expected(name, case, dtype=torch.float32):
    return outcome(case, on_cpu(name, dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "place"), each_place(NAMES))
def test_it_comes_to_what_the_cpu_finds(name, place, case):
    model = placed(name, place)
    assert len(devices_of(model)) == (1 if place == "one" else 2)
    # Adam divides gradients by their size, so that rounding moves a weight by a part of
    # a step of 1e-3.
    rounding = 5e-4 if case.startswith("heal") else 1e-4
    assert_equal(outcome(case, model), expected(name, case), rounding)


IN_HALF = {
    "repair": lambda model: repair(model, PLAN, TEXT),
    "replaceme": lambda model: method("replaceme").repair(model, PLAN, TEXT),
    "ghosted": lambda model: method("ghosted").repair(model, PLAN, TEXT),
    **{
        f"heal {train}": lambda model, train=train: heal(
            model, PLAN, TRAINED, HELD_OUT, TrainConfig(train, rate=1e-3)
        )
        for train in ("outputs", "all", "lora")
    },
}


@functools.cache
def lost_in_half(name, place, dtype, case):
    """What it loses in so few bits, on the CPU where there is no place."""
    model = placed(name, place, HALF[dtype]) if place else on_cpu(name, HALF[dtype])
    found = IN_HALF[case](model)
    assert {weight.dtype for weight in found.weights.values()} <= {HALF[dtype]}
    (quality,) = evaluate(model, [found], HELD_OUT)
    return [quality.nll, quality.kl]


@pytest.mark.parametrize("case", IN_HALF)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("name", "place"), each_place(["llama", "gemma3", "qwen3_moe"])
)
def test_in_half_precision_it_loses_about_as_much(name, dtype, place, case):
    """Other kernels than the CPU's round otherwise, and a token may go to another
    expert.
    """
    found, on_the_cpu = (
        lost_in_half(name, where, dtype, case) for where in (place, "")
    )
    assert found == pytest.approx(on_the_cpu, rel=0.03, abs=0.01)


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS, *OTHERS], ids=str)
def test_every_family_is_repaired_where_it_is_split(family):
    if not family.exists:
        pytest.skip(f"this transformers has no {family.model_type}")
    model = family.build()
    try:
        locate(model)
    except UnsupportedModel as refusal:
        pytest.skip(str(refusal))
    whole = outcome("repair", model)
    assert_equal(outcome("repair", on_two(model)), whole)


def test_random_numbers_of_each_device_go_on_as_if_none_were_drawn():
    def states():
        return [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(device) for device in (ONE, TWO)),
        ]

    model = placed("llama", "two")
    before = states()
    heal(model, PLAN, TRAINED[:2], HELD_OUT, TrainConfig("lora"))
    assert all(map(torch.equal, states(), before))


def embedding_apart(model):
    """Every layer on another device than the inputs."""
    layers = dict.fromkeys(
        ("model.layers", "model.norm", "model.rotary_emb", "lm_head"), TWO
    )
    return dispatch_model(model, {"model.embed_tokens": ONE} | layers, force_hooks=True)


@pytest.mark.parametrize(
    "case", ["repair", "repair in files", "by replaceme", "heal in a warm-up"]
)
def test_inputs_may_be_where_no_layer_is(case):
    model = embedding_apart(copy.deepcopy(on_cpu("llama")))
    assert_equal(outcome(case, model), expected("llama", case))


# --- offloaded by accelerate


def offloaded():
    """A model whose last layer waits on the CPU."""
    model = copy.deepcopy(on_cpu("llama"))
    layers = {f"model.layers.{layer}": ONE for layer in range(3)} | {
        "model.layers.3": "cpu"
    }
    rest = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), ONE
    )
    return dispatch_model(model, layers | rest, main_device=ONE)


def test_an_offloaded_model_is_not_healed_in_a_line(tmp_path):
    with pytest.raises(
        UsageError, match="offloaded a part of this model: load it on devices that hold"
    ) as refusal:
        heal(offloaded(), PLAN, TRAINED, HELD_OUT, out=tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_of_an_offloaded_model_what_is_there_is_repaired():
    model = offloaded()
    found, whole = repair(model, PLAN, TEXT), repair(on_cpu("llama"), PLAN, TEXT)
    here = {
        path: weight
        for path, weight in whole.weights.items()
        if "layers.3." not in path
    }
    assert_equal(
        weights_of(found), [(path, weight) for path, weight in sorted(here.items())]
    )
    assert {refit.sublayers for refit in found.refits if refit.why} == {("mlp.3",)}
    ids = HELD_OUT[0].to(ONE)
    with torch.no_grad(), skip(model, found):
        logits = model(ids).logits.cpu()
    twin = RepairedPlan.of(PLAN, weights=here)
    with torch.no_grad(), skip(on_cpu("llama"), twin):
        assert_equal(logits, on_cpu("llama")(HELD_OUT[0]).logits)
