"""What notall does on devices is what it does on the CPU: on one, and split over two by
accelerate.

Models and ids are made on the CPU; what moves is for notall to see to. Where there are
no devices they are simulated, and compute what the CPU does (see `simulated_devices`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from contextlib import suppress

import pytest
import torch
from accelerate import dispatch_model
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

import notall
from api import (
    Evaluator,
    LinearMap,
    Request,
    Scorer,
    TaskShelf,
    by_count,
    by_footprint,
    by_limit,
    by_speedup,
    check_texts,
    check_writing,
    evaluator,
    every_criterion,
    footprint,
    measure_times,
    medians,
    objective_module as objective,
    ray_workers,
    run_tasks,
    speed,
    time_plans,
)
from devices import ONE, devices_of, each_place, on_one, on_two
from families import FAMILIES as PLAIN, family
from hybrid_families import HYBRIDS
from notall import Plan, RepairedPlan, Space, TrainConfig, UnsupportedModel, UsageError
from notall.options import Workload
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf
from tiny_tasks import byte_tokenizer, write_tasks

pytestmark = pytest.mark.devices

PLACES = {"one": on_one, "two": on_two}
TWICE = pytest.mark.devices(count=2)
on_each = pytest.mark.parametrize("place", ["one", pytest.param("two", marks=TWICE)])
VOCABULARY = 280  # of the tokenizer of bytes
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
GGUF_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "eos_token_id": None,
}
SHORT = Workload(prompt_tokens=8, generation_tokens=2, rounds=1)

# A plain model, tied embeddings, windows and norms behind, experts, a hybrid, and
# shared KV.
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "qwen3_next": {},
    "gemma3n_text": {"vocab_size_per_layer_input": VOCABULARY},
}


def windows(count, rows=2, tokens=24, seed=3):
    """Batches of token ids, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 260, (rows, tokens), generator=draw) for _ in range(count)]


TEXT = windows(3)


def text(model):
    """The same of any vocabulary."""
    return [ids % model.config.get_text_config().vocab_size for ids in TEXT]


def inputs(model):
    return text(model)[0].to(model.get_input_embeddings().weight.device)


def plans_for(structure):
    """One of each kind; two blocks; the last ones; MLPs that go with attentions of
    other layers.
    """
    plans = [Plan([1], [2]), Plan([1, 2], [1, 2]), Plan([2, 3], [2, 3])]
    plans += [Plan([0, 2], [1]), Plan([1], [0])]
    return [fitting(plan, structure) for plan in plans]


def fitting(plan, structure):
    """What of it this model has: layers may have one sublayer alone."""

    def there(kind):
        return [
            layer for layer in getattr(plan, kind) if kind in structure.kinds[layer]
        ]

    return Plan(there("attention"), there("mlp"))


# --- what is done, to something that can be compared


def located(model, tokenizer):
    structure = notall.locate(model)
    return [
        *(structure.in_place, structure.apart),
        *(
            (part.name, part.mixer, part.parameters, part.read_by)
            for part in structure.sublayers
        ),
    ]


def skipped(model, tokenizer):
    found, ids = [], inputs(model)
    with torch.no_grad():
        for plan in plans_for(notall.locate(model)):
            with notall.skip(model, plan):
                found.append(model(ids).logits.cpu())
        return [*found, model(ids).logits.cpu()]


def generated(model, tokenizer):
    found = []
    for plan in (Plan(), plans_for(notall.locate(model))[0]):
        found.append(
            notall.generate_text(model, tokenizer, plan, "Hello", max_new_tokens=5)
        )
        notall.generate_text(
            model, tokenizer, plan, "Hello", max_new_tokens=5, temperature=0.7
        )
    return found


def evaluated(model, tokenizer):
    return values(notall.evaluate(model, plans_for(notall.locate(model)), text(model)))


IN_PROMPT = Plan(prefill={"attention": [1, 3], "mlp": [1, 2], "last_tokens": 2})


def in_prompts(model, tokenizer, plan=IN_PROMPT):
    """Skipped for a prompt alone: the logits, what `generate` writes, and the quality
    behind the prompt.
    """
    ids = inputs(model)
    with torch.no_grad(), notall.skip(model, plan):
        with notall.prompt(model, 16):
            logits = model(ids).logits.cpu()
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
    return (
        logits,
        written.cpu(),
        values(notall.evaluate(model, [plan], text(model), prompt_tokens=16)),
    )


def in_prompts_repaired(model, tokenizer):
    plan = notall.repair(model, IN_PROMPT, text(model))
    return in_prompts(model, tokenizer, plan)


def in_prompts_healed(model, tokenizer):
    fitted, *held_out = text(model)
    plan = notall.heal(
        model,
        notall.repair(model, IN_PROMPT, text(model)),
        [fitted],
        held_out,
        TrainConfig(rate=1e-3),
    )
    return values(notall.evaluate(model, [plan], text(model), prompt_tokens=16))


def similar(model, tokenizer):
    return values(notall.measure_similarity(model, text(model)))


def chosen(model, tokenizer, criterion):
    structure = notall.locate(model)
    unit = {"angular": "block", "gate-norm": "attention"}.get(criterion, "sublayer")
    space = Space(structure, unit, keep_last=1)
    found = notall.choose_plan(model, criterion, space, by_count(space, 2), TEXT)
    return found.plan, found.cost, found.dense_cost


def searched(model, tokenizer, how):
    """By other objectives and budgets than the usual ones."""
    space = Space(notall.locate(model), "sublayer", keep_last=1)
    budget, goal, more = by_count(space, 2), None, {}
    if how == "nll":
        goal = objective.nll(TEXT)
    elif how == "answers":
        goal = objective.answers(
            model, tokenizer, ["hello there", "and so on"], new_tokens=6
        )
    elif how == "retrieval":
        goal = objective.retrieval(model, tokenizer)
    elif how == "limit":
        budget = by_limit(space, 0.5)
    elif how == "footprint":
        budget, more = (
            by_footprint(model, space, "params", 0.1),
            {"config": notall.SearchConfig(held_out=windows(1, seed=4))},
        )
    elif how == "speedup":
        times = measure_times(model, SHORT)
        with suppress(UsageError):  # they differ from run to run
            budget = by_speedup(space, times, 1.0001)
            notall.choose_plan(model, "cosine", space, budget, TEXT)
        return []
    found = notall.choose_plan(model, "search", space, budget, TEXT, goal, **more)
    return found.plan, found.cost, [values(found.held_out or ())]


def scored(model, tokenizer):
    """Requests of a benchmark, packed."""
    asked = [
        Request(tuple(range(5, 40 + n % 7)), (n % 50 + 3, n % 60 + 4))
        for n in range(12)
    ]
    parts = list(
        Scorer(model).score([Plan(), plans_for(notall.locate(model))[0]], asked)
    )
    by_request = {
        n: part.log_likelihoods.T[at]
        for part in parts
        for at, n in enumerate(part.requests)
    }
    return [by_request[n] for n in range(12)]


def diagnosed(model, tokenizer):
    plans = plans_for(notall.locate(model))[:1]
    texts = windows(2, rows=1, tokens=80)
    return [
        values(found)
        for found in [
            *check_texts(model, plans, texts),
            *check_writing(model, plans, texts, 4),
        ]
    ]


def timed(model, tokenizer):
    times = time_plans(model, {"less": plans_for(notall.locate(model))[0]}, SHORT)
    on_devices = any(weight.is_cuda for weight in model.parameters())
    assert bool(times["less"].peak_bytes) == on_devices
    return []


def removed(model, tokenizer):
    found = []
    for plan in plans_for(notall.locate(model)):
        cut = copy.deepcopy(model)
        notall.remove(cut, plan)
        with torch.no_grad():
            found.append(cut(inputs(cut)).logits.cpu())
    return found


def weighed(model, tokenizer):
    return [footprint(model, plan) for plan in plans_for(notall.locate(model))]


COMMON = {
    "locate": located,
    "skip": skipped,
    "evaluate": evaluated,
    "similarity": similar,
}
CASES = {
    **COMMON,
    "generate": generated,
    "score": scored,
    "diagnostics": diagnosed,
    "times": timed,
    "footprint": weighed,
    "remove": removed,
    "in prompts": in_prompts,
    "in prompts, repaired": in_prompts_repaired,
    "in prompts, healed": in_prompts_healed,
    **{
        f"by {name}": functools.partial(chosen, criterion=name)
        for name in every_criterion()
    },
    **{
        f"search by {how}": functools.partial(searched, how=how)
        for how in ("nll", "answers", "retrieval", "limit", "footprint", "speedup")
    },
}


# --- the comparison


def values(facts):
    """Numbers of records, in order."""
    return [
        [number for number in fact.model_dump().values() if isinstance(number, float)]
        for fact in facts
    ]


def flat(found):
    if isinstance(found, list | tuple):
        return [value for one in found for value in flat(one)]
    return [found]


def assert_equal(found, expected):
    """Numbers but for rounding, anything else the same."""
    ours, theirs = flat(found), flat(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        if isinstance(one, torch.Tensor):
            assert (one - other).abs().max() <= 1e-4 * other.abs().max()
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5) or (
                math.isnan(one) and math.isnan(other)
            )
        else:
            assert one == other


@functools.cache
def on_cpu(name):
    if not family(name).exists:
        pytest.skip(f"transformers has no {name}")
    model = family(name).build("sdpa", **SIZES, **FAMILIES[name])
    try:
        notall.locate(model)
    except (
        UnsupportedModel
    ) as refusal:  # such as layers that share keys and values, on transformers 4.57
        pytest.skip(str(refusal))
    return model


@functools.cache
def placed(name, place):
    return PLACES[place](copy.deepcopy(on_cpu(name)))


def outcome(model, case):
    try:
        return CASES[case](model, byte_tokenizer())
    except UsageError as refusal:  # which is the same everywhere too
        return str(refusal)


@functools.cache
def expected(name, case):
    return outcome(on_cpu(name), case)


def every_case():
    """On two devices, all of one family in each run and of the others what is quick."""
    for (name, place), case in itertools.product(each_place(FAMILIES), CASES):
        is_quick = place == "two" and (case in COMMON or name == "llama")
        marks = [] if is_quick else [pytest.mark.slow, pytest.mark.any_transformers]
        yield pytest.param(name, place, case, marks=marks + [TWICE] * (place == "two"))


@pytest.mark.parametrize(("name", "place", "case"), [*every_case()])
def test_is_what_the_cpu_finds(name, place, case):
    model = placed(name, place)
    assert len(devices_of(model)) == (1 if place == "one" else 2)
    assert_equal(outcome(model, case), expected(name, case))


# --- what else matters there


@on_each
def test_transformers_drafts(place):
    assert torch.equal(drafted(placed("llama", place)), drafted(on_cpu("llama")))


def drafted(model):
    """What it generates with a draft model, and without."""
    draft = notall.draft_model(model, Plan([1]))
    ids = inputs(model)[:1]
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), plain)
    return plain.cpu()


@on_each
def test_matrices_that_stay_run_where_the_stream_is_and_are_copied_once(place):
    def mapped(model):
        return notall.evaluate(model, [RepairedPlan.of(Plan([1, 2]), maps=maps)], TEXT)

    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 10
    maps = {f"attn.{index}": LinearMap(matrix, matrix[0]) for index in (1, 2)}
    model = placed("llama", place)
    with Copies(matrix) as copies:
        found = mapped(model)
    assert copies.count == 2  # one a map, whatever the number of batches
    assert_equal(values(found), values(mapped(on_cpu("llama"))))


class Copies(TorchFunctionMode):
    """Counts copies of a tensor to other devices."""

    def __init__(self, of):
        super().__init__()
        self.of, self.count = of, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += (
            func is torch.Tensor.to and args[0] is self.of and result is not self.of
        )
        return result


@on_each
def test_random_numbers_go_on_as_if_nothing_was_drawn(place):
    model = placed("llama", place)
    devices = range(torch.cuda.device_count())
    states = [torch.cuda.get_rng_state(device) for device in devices]
    notall.generate_text(
        model, byte_tokenizer(), Plan(), "Hello", temperature=0.7, max_new_tokens=3
    )
    for device, state in zip(devices, states):
        assert torch.equal(torch.cuda.get_rng_state(device), state)


@on_each
def test_plans_with_weights_run_where_their_layers_do(place):
    def repaired(model):
        path = "model.layers.{}.self_attn.o_proj.weight"
        weights = {path.format(index): torch.eye(32) for index in (0, 3)}
        plan = RepairedPlan.of(Plan([1]), weights=weights)
        with notall.skip(model, plan), torch.no_grad():
            logits = model(inputs(model)).logits.cpu()
        return [values(notall.evaluate(model, [plan], TEXT)), logits]

    assert_equal(repaired(placed("llama", place)), repaired(on_cpu("llama")))


def fetched(path):
    """The model with a part on the CPU, from where accelerate fetches it: it is shown
    on `meta`.
    """
    places = {path: "cpu", "model": 0, "lm_head": 0}
    return dispatch_model(copy.deepcopy(on_cpu("llama")), places, main_device=0)


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize("place", ["one", pytest.param("two", marks=TWICE), "fetched"])
@pytest.mark.parametrize("name", ["tiny_choice", "tiny_words"])
def test_tasks_are_answered_as_on_the_cpu(place, name, tmp_path):
    """By log-likelihoods, and by what the model writes."""

    def answered(model):
        job = TaskShelf(write_tasks(tmp_path / "tasks", 6)).build(name, 0, 4)
        results = run_tasks(model, byte_tokenizer(), [Plan([1])], [job])
        return [[sample.answers for sample in result.samples] for result in results]

    is_fetched = place == "fetched"
    model = fetched("model.embed_tokens") if is_fetched else placed("llama", place)
    assert_equal(answered(model), answered(on_cpu("llama")))


def test_an_embedding_that_accelerate_fetches_takes_ids_of_the_cpu():
    model = fetched("model.embed_tokens")
    assert model.device.type == "meta"
    for case in (
        "evaluate",
        "similarity",
        "generate",
        "score",
        "times",
        "by search",
        "diagnostics",
    ):
        assert_equal(outcome(model, case), expected("llama", case))
    assert speed.machine(*speed.devices_of(model))["device"] == "cpu, cuda:0"


def test_a_layer_that_accelerate_fetches_counts_as_any_other():
    model = fetched("model.layers.3")
    for case in (
        "locate",
        "skip",
        "evaluate",
        "similarity",
        "generate",
        "times",
        "by search",
    ):
        assert_equal(outcome(model, case), expected("llama", case))


@on_each
def test_a_search_guesses_on_a_part_of_the_vocabulary(place, monkeypatch):
    monkeypatch.setattr(evaluator, "GUESSED_TOKENS", 20)
    found, model = [], placed("llama", place)
    for one in (model, on_cpu("llama")):
        space = Space(notall.locate(one), "sublayer")
        for goal in (objective.nll, objective.kl):
            costs = Evaluator(one, goal(TEXT)).costs(
                [frozenset(unit) for unit in space.units], 0.5
            )
            found.append(costs)
    assert_equal(found[:2], found[2:])


NAMES = ("moved", "plain")


@on_each
def test_a_live_model_is_exported_as_from_the_cpu(place, tmp_path):
    """Portable, regrouped, and with weights of the plan's own, which are on devices
    too.
    """
    path = "model.layers.3.self_attn.o_proj.weight"
    for number, plan in enumerate((Plan([1], [1]), Plan([1], [2]))):
        for name, model in zip(NAMES, (placed("llama", place), on_cpu("llama"))):
            own = 2 * model.get_parameter(path).detach()
            repaired = RepairedPlan.of(plan, weights={path: own})
            out = tmp_path / f"{name} {number}"
            source = notall.Source(model, byte_tokenizer())
            notall.export(source, repaired, "hf", out)
        written = [
            load_file(tmp_path / f"{name} {number}" / "model.safetensors")
            for name in NAMES
        ]
        assert written[0].keys() == written[1].keys()
        assert all(torch.equal(written[0][key], written[1][key]) for key in written[1])


@on_each
def test_weights_of_a_plan_are_kept_and_read(place, tmp_path):
    path = "model.layers.3.self_attn.o_proj.weight"
    model = placed("llama", place)
    plan = RepairedPlan.of(
        Plan([1]), weights={path: 2 * model.get_parameter(path).detach()}
    )
    plan.knowing(model).save(tmp_path / "kept")
    found = values(notall.evaluate(model, [RepairedPlan.load(tmp_path / "kept")], TEXT))
    assert_equal(found, values(notall.evaluate(model, [plan], TEXT)))


@on_each
def test_a_gguf_file_is_read_onto_devices(place, tmp_path):
    made = family("llama").build(vocab_size=len(WORDS), **GGUF_SIZES)
    file = write_gguf(made, tmp_path / "tiny.gguf", kind=Kind.Q8_0)
    where = {"device": "cuda:0"} if place == "one" else {"device_map": "balanced"}
    moved, plain = (
        notall.load(file, dtype="float32", **how)[0]
        for how in (where, {"device": "cpu"})
    )
    assert len(devices_of(moved)) == (1 if place == "one" else 2)
    assert_equal(evaluated(moved, None), evaluated(plain, None))


def test_a_worker_of_a_cluster_takes_ids_of_the_cpu(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    ids = TEXT[0] % 200
    plans = [Plan([1])]
    found = []
    for device in ("cuda:0", "cpu"):
        worker = ray_workers._Worker(spec=str(folder), dtype="float32", device=device)
        found.append([list(one.nll) for one in worker.score(plans, ids)])
    assert_equal(*found)


def test_an_engine_tells_the_memory_of_devices():
    def once():
        held = torch.zeros(1 << 20, device=ONE)  # 4 MiB
        return float(held[0] + 1), 1.0

    timing = medians(once, before=0)
    assert timing.memory_of == "devices"
    assert 4 << 20 <= timing.memory_bytes < 1 << 30


@pytest.mark.slow
# some of the many are built otherwise by 4.57; those above run on both
@pytest.mark.any_transformers
@on_each
@pytest.mark.parametrize(
    "tested", [one for one in [*PLAIN, *HYBRIDS] if one.exists], ids=str
)
def test_each_family(tested, place):
    """All of them are found, skipped, evaluated and compared by layer on devices as on
    the CPU.
    """
    try:
        model = tested.build("sdpa")
    except ValueError:  # it has no such attention
        model = tested.build()
    try:
        notall.locate(model)
    except UnsupportedModel as refusal:
        pytest.skip(str(refusal))
    moved = PLACES[place](tested.build(model.config._attn_implementation))
    try:
        moved(input_ids=inputs(moved))
    except RuntimeError as error:
        pytest.skip(f"transformers itself does not run it there: {error}")
    for case in COMMON.values():
        assert_equal(case(moved, None), case(model, None))
