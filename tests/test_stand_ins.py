"""MLPs alone out of a prompt: what stands in for them, and keys and values of attentions
that run behind them. Against two calls of a model with hooks, and least squares.
"""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch.nn.functional import linear
from transformers import StaticCache

from api import PromptStudent, cache_argument, states_of
from families import family as named, silenced, stack_of
from notall import (
    Plan,
    RepairedPlan,
    TrainConfig,
    UsageError,
    evaluate,
    heal,
    prompt,
    repair,
    skip,
)

TOKENS, LAST = 16, 3
PLAN = Plan(prefill={"mlp": [1, 2], "last_tokens": LAST})
LAYERS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}
KEYS = {  # of an attention's projections, the rows for keys and values
    "gpt2": {"attn.c_attn": slice(32, None)},
    "deepseek_v3": {"self_attn.kv_a_proj_with_mqa": slice(None)},
}
PLAIN = {"self_attn.k_proj": slice(None), "self_attn.v_proj": slice(None)}
FAMILIES = ["llama", "qwen2", "gemma3", "phi", "opt", "gpt2", "olmo2", "deepseek_v3"]
TEXT = [
    torch.randint(3, 99, (8, TOKENS), generator=torch.Generator().manual_seed(n))
    for n in range(4)
]
OTHER = [torch.randint(3, 99, (8, TOKENS), generator=torch.Generator().manual_seed(9))]


def matrix(module):
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def with_own_weights(model, name, plan=PLAN):
    """A plan whose prompt has weights of its own, far from the model's, for all that
    can have some.
    """
    draw = torch.Generator().manual_seed(5)
    layers, weights = LAYERS.get(name, "model.layers"), {}
    width = model.config.get_text_config().hidden_size
    for index in (2, 3):
        for path, rows in KEYS.get(name, PLAIN).items():
            own = matrix(stack_of(model)[index].get_submodule(path))[rows]
            start = f"{layers}.{index}.{path}"
            noise = torch.randn(own.shape, generator=draw) * own.std()
            weights[f"{start}.weight"] = own.detach() + noise
            weights[f"{start}.bias"] = torch.randn(len(own), generator=draw) / 9
    last = {"opt": "fc2", "gemma3": "post_feedforward_layernorm"}
    last["olmo2"] = "post_feedforward_layernorm"
    for index in (1, 2):
        start = f"{layers}.{index}.{last.get(name, 'mlp')}.stand_in"
        weights[f"{start}.weight"] = torch.randn(width, width, generator=draw) / width
        weights[f"{start}.bias"] = torch.randn(width, generator=draw) / width
    return RepairedPlan.of(plan, prompt_weights=weights)


@contextmanager
def as_early_tokens(model, name, plan):
    """The model as it is for the early tokens of a prompt, by hooks."""
    family = named(name)
    weights = plan.prompt_weights
    is_parallel = name == "phi"

    def projected(path, rows):
        def hook(module, args, output):
            own = weights[f"{path}.weight"], weights[f"{path}.bias"]
            output = output.clone()
            output[..., rows] = linear(args[0], *own)
            return output

        return hook

    def standing_in(start):
        def hook(module, args, kwargs, output):
            stream = output[0] if isinstance(output, tuple) else output
            read = (
                (args[0] if args else kwargs["hidden_states"])
                if is_parallel
                else stream
            )
            read = read / read.square().mean(-1, keepdim=True).sqrt()
            made = linear(read, weights[f"{start}.weight"], weights[f"{start}.bias"])
            stream = stream + made
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return hook

    handles = []
    layers = LAYERS.get(name, "model.layers")
    with ExitStack() as stack:
        stack.enter_context(silenced(model, family, (), plan.prefill.mlp))
        for index in (2, 3):
            for path, rows in KEYS.get(name, PLAIN).items():
                hook = projected(f"{layers}.{index}.{path}", rows)
                module = stack_of(model)[index].get_submodule(path)
                handles.append(module.register_forward_hook(hook))
        for index in plan.prefill.mlp:
            (start,) = {
                path.rpartition(".")[0]
                for path in weights
                if path.startswith(f"{layers}.{index}.") and ".stand_in." in path
            }
            handles.append(
                stack_of(model)[index].register_forward_hook(
                    standing_in(start), with_kwargs=True
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def close(found, expected):
    return float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_one_pass_is_two_calls(name):
    model, ids = named(name).build(), OTHER[0]
    plan = with_own_weights(model, name)
    original = model(ids).logits
    with skip(model, plan):
        assert torch.equal(model(ids).logits, original), "no prompt is declared"
        with prompt(model, TOKENS):
            found = model(ids, use_cache=True)
            again = model(ids, use_cache=True).logits
        # in chunks, and in a cache of more places
        with prompt(model, TOKENS):
            cache, chunks = {}, None
            for start, end in [(0, 5), (5, 9), (9, TOKENS)]:
                chunks = model(ids[:, start:end], use_cache=True, **cache)
                cache = {cache_argument(model): chunks[cache_argument(model)]}
    with skip(model, PLAN), prompt(model, TOKENS):
        unrepaired = model(ids).logits[:, -LAST:]
    early = TOKENS - LAST
    with as_early_tokens(model, name, plan):
        read = model(ids[:, :early], use_cache=True)
    cache = {cache_argument(model): read[cache_argument(model)]}
    expected = model(ids[:, early:], use_cache=True, **cache).logits
    assert close(found.logits[:, early:], expected)
    assert torch.equal(found.logits, again)
    assert close(chunks.logits[:, -LAST:], expected)
    assert not close(unrepaired, expected)
    assert torch.equal(model(ids).logits, original)


@torch.no_grad()
def test_a_static_cache_and_other_skipped_sublayers():
    """An attention that is skipped for every token moves the places of the cache."""
    model, ids = named("llama").build("sdpa"), OTHER[0]
    both = Plan(attention=[1], prefill=PLAN.prefill)
    plan = with_own_weights(model, "llama", both)
    with skip(model, plan), prompt(model, TOKENS):
        plain = model(ids).logits[:, -1]
        cache = StaticCache(config=model.config, max_cache_len=40)
        found = model(ids, **{cache_argument(model): cache}).logits[:, -1]
    early = TOKENS - LAST
    with silenced(model, named("llama"), (1,), ()):
        with as_early_tokens(model, "llama", plan):
            read = model(ids[:, :early], use_cache=True)
        cache = {cache_argument(model): read[cache_argument(model)]}
        expected = model(ids[:, early:], use_cache=True, **cache).logits[:, -1]
    assert close(plain, expected)
    assert close(found, expected)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_an_evaluation_is_one_call(name):
    """What shares its prefix with other plans runs as a model inside of `skip`."""
    model = named(name).build()
    plan = with_own_weights(model, name)
    with torch.no_grad():
        dense = model(OTHER[0]).logits[:, 11:-1].log_softmax(-1)
        with skip(model, plan), prompt(model, 12):
            given = model(OTHER[0]).logits[:, 11:-1].log_softmax(-1)
    expected = (dense.exp() * (dense - given)).sum(-1).mean()
    _, found, _ = evaluate(model, [PLAN, plan, Plan([1])], OTHER, prompt_tokens=12)
    assert found.kl == pytest.approx(float(expected), rel=1e-4)


def seen(model, path, kept):
    """What a module is given and makes on all of the text, (tokens, width) each."""
    found = []

    def note(module, args, output):
        found.append([one.flatten(0, -2).double() for one in (args[0], output)])

    hook = model.get_submodule(path).register_forward_hook(note)
    with kept, torch.no_grad():
        for batch in TEXT:
            model(batch)
    hook.remove()
    return [torch.cat(parts) for parts in zip(*found)]


def ridge_regression(inputs, outputs, ridge):
    """With a bias, the first token of a sequence counted ten times: (outputs, inputs +
    1).
    """
    ones = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    counts = torch.ones(len(TEXT) * 8, TOKENS, 1, dtype=torch.float64)
    counts[:, 0] = 10
    counted = counts.flatten(0, 1) * ones
    held_back = torch.zeros(len(ones.T), dtype=torch.float64)
    held_back[:-1] = ridge * (counted * ones).sum(0)[:-1].mean()
    gram = counted.T @ ones + torch.diag(held_back)
    return torch.linalg.solve(gram, counted.T @ outputs).T


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_stands_in_is_ridge_regression(name):
    model, ridge = named(name).build(), 0.01
    found = repair(model, Plan(prefill={"mlp": [2]}), TEXT, ridges=[ridge])
    assert [one.sublayers for one in found.refits] == [("mlp.2",), ("attn.3",)]
    path = "model.layers.2.post_attention_layernorm"
    stream, _ = seen(model, path, nullcontext())
    _, made = seen(model, "model.layers.2.mlp", nullcontext())
    stream = stream / stream.square().mean(-1, keepdim=True).sqrt()
    change = ridge_regression(stream, made, ridge)
    start, wanted = "model.layers.2.mlp.stand_in", {"rtol": 1e-3, "atol": 1e-5}
    own = {path: one.double() for path, one in found.prompt_weights.items()}
    torch.testing.assert_close(own[f"{start}.weight"], change[:, :-1], **wanted)
    torch.testing.assert_close(own[f"{start}.bias"], change[:, -1], **wanted)


@contextmanager
def without_layer_1(model, name, weights):
    """All tokens skip layer 1, and attention 2 has these keys and values."""
    handles = []
    with silenced(model, named(name), (1,), (1,)):
        for projection in ("k_proj", "v_proj"):
            path = f"model.layers.2.self_attn.{projection}"
            own = weights[f"{path}.weight"], weights[f"{path}.bias"]
            handles.append(
                model.get_submodule(path).register_forward_hook(
                    lambda module, args, output, own=own: linear(args[0], *own)
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_and_values_that_run_are_ridge_regression(name):
    """Those of layer 2, and then of layer 3, behind those."""
    model, ridge = named(name).build(), 0.01
    plan = Plan(prefill={"attention": [1], "mlp": [1]})
    found = repair(model, plan, TEXT, ridges=[ridge])
    own = {path: one.double() for path, one in found.prompt_weights.items()}
    layers = {path.rpartition(".self_attn")[0] for path in own}
    assert layers == {"model.layers.2", "model.layers.3"}
    wanted = {"rtol": 1e-3, "atol": 1e-4}
    for layer, stream in [
        (2, lambda: silenced(model, named(name), (1,), (1,))),
        (3, lambda: without_layer_1(model, name, found.prompt_weights)),
    ]:
        for projection in ("k_proj", "v_proj"):
            path = f"model.layers.{layer}.self_attn.{projection}"
            _, target = seen(model, path, nullcontext())
            given, stale = seen(model, path, stream())
            change = ridge_regression(given, target - stale, ridge)
            source = model.get_submodule(path)
            bias = 0 if source.bias is None else source.bias.double()
            weight = source.weight.double() + change[:, :-1]
            torch.testing.assert_close(own[f"{path}.weight"], weight, **wanted)
            bias = bias + change[:, -1]
            torch.testing.assert_close(own[f"{path}.bias"], bias, **wanted)


def test_a_refit_says_what_it_can_and_the_folder_holds_it(tmp_path):
    """The last block's MLP has no attention behind it; whole blocks behind MLPs get
    keys and values alone.
    """
    model = named("llama").build()
    mixed = Plan(prefill={"mlp": [1, 2, 3], "attention": [2]})
    found = repair(model, mixed, TEXT, out=tmp_path / "whole")
    assert [one.sublayers[0] for one in found.refits] == ["mlp.1", "attn.2", "attn.3"]
    assert repair(model, mixed, TEXT).digest == found.digest
    assert RepairedPlan.load(tmp_path / "whole") == found

    def stop(done, total, doing):
        if "attn.3" in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(model, mixed, TEXT, out=tmp_path / "twice", progress=stop)
    assert (tmp_path / "twice" / "mlp.1.safetensors").is_file()
    assert repair(model, mixed, TEXT, out=tmp_path / "twice").digest == found.digest


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi", "opt"])
def test_text_that_it_is_fitted_to_is_read_nearer_to_the_original(name):
    model = named(name).build()
    found = repair(model, PLAN, TEXT, ridges=[0.01])
    skipped, repaired = evaluate(model, [PLAN, found], TEXT, prompt_tokens=12)
    assert repaired.kl < skipped.kl


def test_training_goes_on_from_there_and_its_gradient_is_that_of_the_loss():
    model, ids = named("llama").build(), OTHER[0]
    found = with_own_weights(model, "llama")
    student = PromptStudent(model, found, prompt_tokens=12)
    assert student.running.keys() == found.prompt_weights.keys()
    with torch.no_grad():
        wanted = states_of(model, ids, 11)
    draw = torch.Generator().manual_seed(0)
    ways = {p: torch.randn(w.shape, generator=draw) for p, w in student.running.items()}
    start = {path: one.detach().clone() for path, one in student.running.items()}

    def loss(step):
        for path, one in student.running.items():
            one.data.copy_(start[path] + step * ways[path])
        return (student(ids) - wanted).square().mean()

    with torch.no_grad():
        slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    loss(0.0).backward()
    along = sum((one.grad * ways[path]).sum() for path, one in student.running.items())
    assert float(along) == pytest.approx(float(slope), rel=1e-2)
    config = TrainConfig(rate=3e-3, prompt_tokens=12)
    healed = heal(model, found, TEXT * 4, OTHER, config)
    repaired, trained = evaluate(model, [found, healed], OTHER, prompt_tokens=12)
    assert trained.kl < repaired.kl
    assert healed.prompt_weights.keys() == found.prompt_weights.keys()


def test_what_does_not_fit_is_refused():
    model = named("llama").build()
    path = "model.layers.1.mlp.stand_in.weight"
    for weights, fix in [
        ({path: torch.zeros(5, 5)}, r"stand_in.weight is \(5, 5\).*has 32 features"),
        ({path.replace("mlp", "nothing"): torch.zeros(32, 32)}, "no sublayer"),
    ]:
        plan = RepairedPlan.of(PLAN, prompt_weights=weights)
        with pytest.raises(UsageError, match=fix), skip(model, plan):
            pass
