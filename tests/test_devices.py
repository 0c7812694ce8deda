"""What notall does on devices is what it does on the CPU: on one, and split over two by accelerate.

Models and ids are made on the CPU; what moves is for notall to see to. Where there are no devices
they are simulated, and compute what the CPU does (see `simulated_devices`).
"""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch

import notall
from api import (
    Request,
    Scorer,
    by_count,
    by_footprint,
    by_limit,
    by_speedup,
    check_texts,
    check_writing,
    every_criterion,
    footprint,
    measure_times,
    objective_module as objective,
    time_plans,
)
from devices import devices_of, on_one, on_two
from families import family
from notall import Plan, Space
from notall.options import Workload
from tiny_tasks import byte_tokenizer

pytestmark = pytest.mark.devices(count=2)

PLACES = {"one": on_one, "two": on_two}
VOCABULARY = 280  # of the tokenizer of bytes
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
SHORT = Workload(prompt_tokens=8, generation_tokens=2, rounds=1)

# A plain model, tied embeddings, windows and norms behind, experts, a hybrid, and shared KV.
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


def plans_for(structure):
    """One of each kind of sublayer, two blocks, and what runs on the first device alone."""
    kinds = {part.kind for part in structure.sublayers}
    mixed = Plan(attention=[1], mlp=[2] if "mlp" in kinds else [])
    both = {"attention": [1, 2], "mlp": [1, 2]} if len(kinds) == 2 else {"attention": [1, 2]}
    late = {"attention": [2, 3], "mlp": [2, 3]} if len(kinds) == 2 else {"attention": [2, 3]}
    return [mixed, Plan(**both), Plan(**late)]


# --- what is done, to something that can be compared


def located(model, tokenizer):
    structure = notall.locate(model)
    return [
        *(structure.in_place, structure.apart),
        *((part.name, part.mixer, part.parameters, part.read_by) for part in structure.sublayers),
    ]


def skipped(model, tokenizer):
    found, ids = [], TEXT[0].to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        for plan in plans_for(notall.locate(model)):
            with notall.skip(model, plan):
                found.append(model(ids).logits.cpu())
        return [*found, model(ids).logits.cpu()]


def generated(model, tokenizer):
    found = []
    for plan in (Plan(), plans_for(notall.locate(model))[0]):
        found.append(notall.generate_text(model, tokenizer, plan, "Hello", max_new_tokens=5))
        notall.generate_text(model, tokenizer, plan, "Hello", max_new_tokens=5, temperature=0.7)
    return found


def evaluated(model, tokenizer):
    return values(notall.evaluate(model, plans_for(notall.locate(model)), TEXT))


def similar(model, tokenizer):
    return values(notall.measure_similarity(model, TEXT))


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
        goal = objective.answers(model, tokenizer, ["hello there", "and so on"], new_tokens=6)
    elif how == "retrieval":
        goal = objective.retrieval(model, tokenizer)
    elif how == "limit":
        budget = by_limit(space, 0.5)
    elif how == "footprint":
        budget, more = by_footprint(model, space, "params", 0.1), {"held_out": windows(1, seed=4)}
    elif how == "speedup":
        budget = by_speedup(space, measure_times(model, SHORT), 1.0001)
        notall.choose_plan(model, "cosine", space, budget, TEXT)  # times differ from run to run
        return []
    found = notall.choose_plan(model, "search", space, budget, TEXT, goal, **more)
    return found.plan, found.cost, [values(found.held_out or ())]


def scored(model, tokenizer):
    """Requests of a benchmark, packed."""
    asked = [Request(tuple(range(5, 40 + n % 7)), (n % 50 + 3, n % 60 + 4)) for n in range(12)]
    parts = list(Scorer(model).score([Plan(), plans_for(notall.locate(model))[0]], asked))
    by_request = {n: part.log_likelihoods.T[at] for part in parts for at, n in enumerate(part.requests)}
    return [by_request[n] for n in range(12)]


def diagnosed(model, tokenizer):
    plans = plans_for(notall.locate(model))[:1]
    texts = windows(2, rows=1, tokens=80)
    return [values(found) for found in [*check_texts(model, plans, texts), *check_writing(model, plans, texts, 4)]]


def timed(model, tokenizer):
    times = time_plans(model, {"less": plans_for(notall.locate(model))[0]}, SHORT)
    on_devices = any(weight.is_cuda for weight in model.parameters())
    assert bool(times["less"].peak_bytes) == on_devices
    return []


def drafted(model, tokenizer):
    draft = notall.draft_model(model, Plan(attention=[1]))
    prompt = tokenizer("The capital", return_tensors="pt", return_token_type_ids=False).to(model.device)
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, assistant_model=draft, **options), plain)
    return plain.cpu()


def removed(model, tokenizer):
    cut = copy.deepcopy(model)
    notall.remove(cut, plans_for(notall.locate(model))[0])
    with torch.no_grad():
        return cut(TEXT[0].to(cut.get_input_embeddings().weight.device)).logits.cpu()


def weighed(model, tokenizer):
    return [footprint(model, plan) for plan in plans_for(notall.locate(model))]


COMMON = {"locate": located, "skip": skipped, "evaluate": evaluated, "similarity": similar}
CASES = {
    **COMMON,
    "generate": generated,
    "score": scored,
    "diagnostics": diagnosed,
    "times": timed,
    "footprint": weighed,
    "remove": removed,
    **{f"by {name}": functools.partial(chosen, criterion=name) for name in every_criterion()},
    **{
        f"search by {how}": functools.partial(searched, how=how)
        for how in ("nll", "answers", "retrieval", "limit", "footprint", "speedup")
    },
}
NOT_OF_HYBRIDS = {"draft": drafted}  # their state can't be rolled back


# --- the comparison


def values(facts):
    """Numbers of records, in order."""
    return [[number for number in fact.model_dump().values() if isinstance(number, float)] for fact in facts]


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
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5) or (math.isnan(one) and math.isnan(other))
        else:
            assert one == other


@functools.cache
def on_cpu(name):
    if not family(name).exists:
        pytest.skip(f"transformers has no {name}")
    return family(name).build("sdpa", **SIZES, **FAMILIES[name])


@functools.cache
def placed(name, place):
    return PLACES[place](copy.deepcopy(on_cpu(name)))


@functools.cache
def expected(name, case):
    return CASES[case](on_cpu(name), byte_tokenizer())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_is_what_the_cpu_finds(name, place, case):
    model = placed(name, place)
    assert len(devices_of(model)) == (1 if place == "one" else 2)
    assert_equal(CASES[case](model, byte_tokenizer()), expected(name, case))
