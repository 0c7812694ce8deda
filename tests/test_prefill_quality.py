"""The quality of what skips in the prompt alone, against a model that reads prompt and
rest in two calls.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from api import Replay, evaluate, record, score
from families import TRANSFORMERS_5, family
from notall import Plan, RepairedPlan, UsageError, locate

WINDOWS, LENGTH, CUT = 2, 19, 11
IDS = torch.randint(
    3, 90, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1)
)
WEIGHT = "model.layers.2.self_attn.v_proj.weight"
FAMILIES = ["llama", "gemma3", "gpt2", "phi", "cohere", "mixtral", "deepseek_v3"]
FAMILIES += ["qwen3_next"] if TRANSFORMERS_5 else []


def answering_zeros(module, args, answer):
    return (0 * answer[0], *answer[1:]) if isinstance(answer, tuple) else 0 * answer


@contextmanager
def adding_nothing(model, prefill, prompt_weights):
    """Skipped sublayers run, so that their keys and values are written, and answer
    0.
    """
    structure, hooks, kept = locate(model), [], {}
    layers = model.get_submodule(structure.layers)
    for part in structure.sublayers:
        if part.index not in getattr(prefill, part.kind):
            continue
        (branch,) = part.branches
        modules = [
            layers[part.index].get_submodule(op.module)
            for op in branch.ops
            if op.module
        ]
        largest = max(
            modules, key=lambda module: sum(one.numel() for one in module.parameters())
        )
        hooks.append(largest.register_forward_hook(answering_zeros))
    for path, weight in prompt_weights.items():
        kept[path] = model.get_parameter(path).data
        model.get_parameter(path).data = weight
    yield
    for hook in hooks:
        hook.remove()
    for path, weight in kept.items():
        model.get_parameter(path).data = weight


@torch.no_grad()
def logits_behind(model, plan, cut=CUT, ids=IDS):
    """(windows, tokens behind the prompt, vocabulary): the prompt with stubs, and then
    the rest with its cache.
    """
    first = cut - plan.prefill.last_tokens
    with adding_nothing(model, plan.prefill, getattr(plan, "prompt_weights", {})):
        read = model(input_ids=ids[:, :first], use_cache=True)
    name = "cache" if read.get("cache") is not None else "past_key_values"
    rest = model(input_ids=ids[:, first:], use_cache=True, **{name: read[name]})
    return rest.logits[:, plan.prefill.last_tokens - 1 : -1].double()


@torch.no_grad()
def reference(model, plan, cut=CUT, ids=IDS):
    """NLL and KL of each window, nats per token, and top-1 agreement."""
    dense = model(input_ids=ids).logits[:, cut - 1 : -1].double()
    found, targets = logits_behind(model, plan, cut, ids), ids[:, cut:]
    nll = cross_entropy(found.transpose(1, 2), targets, reduction="none").mean(1)
    kl = (
        kl_div(
            found.log_softmax(-1),
            dense.log_softmax(-1),
            reduction="none",
            log_target=True,
        )
        .sum(-1)
        .mean(1)
    )
    return nll, kl, (found.argmax(-1) == dense.argmax(-1)).double().mean(1)


def plans_for(model):
    """Deep, shallow, of one kind alone, of both, and with several last tokens whole."""
    structure = locate(model)
    attention = [
        p.index
        for p in structure.sublayers
        if p.kind == "attention" and p.kv_bytes_per_token and not p.state_bytes
    ]
    mlp = [p.index for p in structure.sublayers if p.kind == "mlp"]
    some = attention[-2:] if len(attention) > 2 else attention[-1:]
    return [
        Plan(prefill={"attention": some, "mlp": mlp[-2:]}),
        Plan(prefill={"attention": some}),
        Plan(prefill={"mlp": mlp[:2], "last_tokens": 4}),
        Plan(prefill={"attention": some[:1], "mlp": mlp[-1:], "last_tokens": CUT - 1}),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_two_calls_say(name):
    model = family(name).build()
    plans = plans_for(model)
    for plan, scores in zip(plans, score(model, plans, IDS, CUT)[1:]):
        nll, kl, same = reference(model, plan)
        assert torch.allclose(torch.tensor(scores.nll).double(), nll, atol=3e-5), plan
        assert torch.allclose(torch.tensor(scores.kl).double(), kl, atol=3e-5), plan
        assert torch.allclose(torch.tensor(scores.top1_agreement).double(), same), plan
    assert max(reference(model, plans[0])[1]) > 1e-4  # it changes something


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


def test_the_last_block_changes_nothing(model):
    (found,) = evaluate(
        model, [Plan(prefill={"attention": [3], "mlp": [3]})], [IDS], prompt_tokens=CUT
    )
    assert abs(found.kl) < 1e-7
    assert abs(found.delta_nll) < 1e-7
    assert found.top1_agreement == 1


def test_every_token_and_the_prompt(model):
    """An MLP that is skipped for every token is one of zeros."""
    both = Plan(mlp=[0], prefill={"attention": [2], "mlp": [3]})
    less = copy.deepcopy(model)
    less.model.layers[0].mlp.down_proj.weight.data.zero_()
    _, found = score(model, [both], IDS, CUT)
    nll, _, _ = reference(less, Plan(prefill=both.prefill))
    assert torch.allclose(torch.tensor(found.nll).double(), nll, atol=1e-5)


def test_prompt_weights_make_the_prompts_keys_and_values_alone(model):
    weight = torch.randn(
        model.get_parameter(WEIGHT).shape, generator=torch.Generator().manual_seed(0)
    )
    skipped = Plan(prefill={"attention": [2], "mlp": [2], "last_tokens": 2})
    repaired = RepairedPlan.of(skipped, prompt_weights={WEIGHT: weight})
    before = model.get_parameter(WEIGHT).clone()
    _, plain, own = score(model, [skipped, repaired], IDS, CUT)
    assert torch.allclose(
        torch.tensor(own.nll).double(), reference(model, repaired)[0], atol=1e-5
    )
    assert torch.allclose(
        torch.tensor(plain.nll).double(), reference(model, skipped)[0], atol=1e-5
    )
    assert own.nll != plain.nll
    assert torch.equal(model.get_parameter(WEIGHT), before)


# --- what is shared, and what is counted
# --------------------------------------------------------------------------------------


def test_plans_share_what_they_begin_with_and_count_the_tokens_that_run(model):
    deep, deeper = Plan(prefill={"mlp": [3]}), Plan(prefill={"mlp": [2, 3]})
    replay = Replay(
        model, [Plan(), deep, Plan(prefill={"mlp": [3]}, note="again"), deeper]
    )
    assert replay.executions == 8 + 1 + 3  # deeper goes its own way from mlp.2 on
    with torch.no_grad():
        found = {
            number: hidden
            for numbers, hidden in replay.hidden_states(
                record(model, CUT, input_ids=IDS)
            )
            for number in numbers
        }
    whole = (LENGTH - CUT + 1) / LENGTH
    assert replay.ran == pytest.approx(8 + whole + (whole + 1 + whole))
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[1][:, 0], found[0][:, 0])  # a token of the prompt
    assert torch.allclose(found[1][:, CUT - 1 :], found[0][:, CUT - 1 :], atol=1e-6)


def test_plans_that_differ_in_their_last_tokens_share_no_step(model):
    one, four = (Plan(prefill={"mlp": [1], "last_tokens": count}) for count in (1, 4))
    _, *found = score(model, [one, four], IDS, CUT)
    for plan, scores in zip((one, four), found):
        assert torch.allclose(
            torch.tensor(scores.nll).double(), reference(model, plan)[0], atol=1e-5
        )
    assert found[0].nll != found[1].nll


def test_only_what_follows_the_prompt_is_scored(model):
    """A plan without a prefill part too: so both are compared on the same tokens."""
    plan = Plan([2])
    (behind,) = evaluate(model, [plan], [IDS], prompt_tokens=CUT)
    (everywhere,) = evaluate(model, [plan], [IDS])
    assert behind.nll != everywhere.nll
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, CUT - 1 : -1]
    dense = cross_entropy(logits.transpose(1, 2), IDS[:, CUT:])
    (nothing,) = evaluate(model, [Plan()], [IDS], prompt_tokens=CUT)
    assert nothing.nll == pytest.approx(float(dense), abs=1e-5)
    assert evaluate(model, [plan], [IDS], prompt_tokens=1) == [everywhere]


# --- what is refused
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (
            None,
            (
                r"nothing says which tokens are the prompt: give prompt_tokens"
                r" \(--prompt-tokens\), such as 9"
            ),
        ),
        (
            LENGTH,
            (
                f"a prompt of {LENGTH} tokens leaves nothing to score in windows of"
                f" {LENGTH}: give 1 to {LENGTH - 1}"
            ),
        ),
        (99, "leaves nothing to score"),
        (0, "leaves nothing to score"),
        (-3, "leaves nothing to score"),
        (4, "nothing is skipped where its last 4 run whole: give more than 4"),
    ],
)
def test_prompts_that_leave_nothing(model, tokens, says):
    plan = Plan(prefill={"mlp": [1], "last_tokens": 4})
    with pytest.raises(UsageError, match=says):
        evaluate(model, [Plan([2]), plan], [IDS], prompt_tokens=tokens)
    evaluate(model, [plan], [IDS], prompt_tokens=5)


def test_a_replay_of_text_without_a_prompt_is_refused(model):
    replay = Replay(model, [Plan(prefill={"mlp": [1]})])
    with pytest.raises(UsageError, match="nothing says which tokens are the prompt"):
        next(replay.hidden_states(record(model, input_ids=IDS)))
