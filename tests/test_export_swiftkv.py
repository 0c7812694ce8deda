"""SwiftKV checkpoints: names and shapes as ArcticInference reads them, and their
arithmetic by a model written here.

What they are held against was written down from snowflakedb/ArcticInference at commit
9d4643881608, arctic_inference/vllm/swiftkv/llama_swiftkv.py and
arctic_inference/common/swiftkv/configs.py, and from snowflakedb/ArcticTraining,
projects/swiftkv/models/llama/modeling_llama_swiftkv.py. It runs on GPUs alone, so that
no test here runs the engine.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, log_softmax, silu

from api import cli, swiftkv
from families import family
from notall import Plan, UsageError, evaluate, export, load, prompt, repair, skip

TEXT = [
    torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(n))
    for n in range(4)
]
OTHER = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(9))
PROMPT_TOKENS = 12
PLAN = Plan(prefill={"attention": [2, 3], "mlp": [2, 3]})
FITTING = ("llama", "qwen2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from a family to its model, the plan, repaired or not, and the export,
    written once.
    """
    known = {}

    def write(name, is_repaired=True):
        if (name, is_repaired) not in known:
            model = family(name).build()
            uneven(model)
            plan = repair(model, PLAN, TEXT) if is_repaired else PLAN
            folder = tmp_path_factory.mktemp("exports") / name
            known[name, is_repaired] = (
                model,
                plan,
                export(model, plan, "swiftkv", folder),
            )
        return known[name, is_repaired]

    return write


def uneven(model):
    """Gains of norms and biases of their own in each layer, as trained models have
    them.
    """
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)


def normed(hidden, gain, epsilon):
    """RMS norm of (batch, tokens, hidden)."""
    return hidden * (hidden.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gain


def turned(heads, theta):
    """Rotary positions, halves apart, of (batch, heads, tokens, width)."""
    tokens, width = heads.shape[-2:]
    speeds = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (torch.arange(tokens)[:, None] * speeds).float()  # (tokens, width / 2)
    left, right = heads.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def slow(folder, ids):
    """The logits, (batch, tokens, vocabulary), of a SwiftKV checkpoint, by its
    definition: all layers for all tokens.

    Layers up to num_key_value_layers are Llama's. Then norm_swiftkv of the stream gives
    keys and values of each later layer, by k_proj_swiftkv and v_proj_swiftkv, and
    queries are by q_proj_swiftkv of the layer's own stream.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    epsilon, heads = config["rms_norm_eps"], config["num_attention_heads"]
    theta = config["rope_theta"]
    ours = set(weights)

    def made(hidden, path):
        bias = weights[f"{path}.bias"] if config["attention_bias"] else None
        ours.difference_update({f"{path}.weight", f"{path}.bias"})
        return linear(hidden, weights[f"{path}.weight"], bias)

    def apart(states):
        width = config.get("head_dim") or config["hidden_size"] // heads
        return states.unflatten(-1, (-1, width)).transpose(
            1, 2
        )  # (batch, heads, tokens, width)

    hidden = weights["model.embed_tokens.weight"][ids]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
    for index in range(config["num_hidden_layers"]):
        start, is_tail = (
            f"model.layers.{index}",
            index >= config["num_key_value_layers"],
        )
        if index == config["num_key_value_layers"]:
            stream = normed(hidden, weights["model.norm_swiftkv.weight"], epsilon)
        own = normed(hidden, weights[f"{start}.input_layernorm.weight"], epsilon)
        ending = "_swiftkv" if is_tail else ""
        queries = apart(made(own, f"{start}.self_attn.q_proj{ending}"))
        read = stream if is_tail else own
        keys, values = (
            apart(made(read, f"{start}.self_attn.{name}_proj{ending}")) for name in "kv"
        )
        queries, keys = turned(queries, theta), turned(keys, theta)
        keys, values = (
            one.repeat_interleave(heads // one.shape[1], 1) for one in (keys, values)
        )
        scores = queries @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5 + mask
        seen = (scores.softmax(-1) @ values).transpose(1, 2).flatten(-2)
        # an output projection's bias: ArcticInference's tail has none, so that it is to
        # be 0
        hidden = hidden + linear(seen, weights[f"{start}.self_attn.o_proj.weight"])
        own = normed(
            hidden, weights[f"{start}.post_attention_layernorm.weight"], epsilon
        )
        gate, up = (
            linear(own, weights[f"{start}.mlp.{name}_proj.weight"])
            for name in ("gate", "up")
        )
        hidden = hidden + linear(
            silu(gate) * up, weights[f"{start}.mlp.down_proj.weight"]
        )
    hidden = normed(hidden, weights["model.norm.weight"], epsilon)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return linear(hidden, head)


def behind(model, plan, found):
    """KL(original || found) behind the prompt, and how far the form in memory is from
    `found`.
    """
    with torch.no_grad():
        original = log_softmax(model(OTHER).logits, -1)
        with swiftkv.one_stream(model, swiftkv.maps_of(model, plan)):
            in_memory = model(OTHER).logits
    kl = (
        (original.exp() * (original - log_softmax(found, -1)))
        .sum(-1)[:, PROMPT_TOKENS - 1 : -1]
        .mean()
    )
    return float(kl), float((in_memory - found).abs().max() / in_memory.abs().max())


@pytest.mark.parametrize("is_repaired", [True, False])
@pytest.mark.parametrize("name", FITTING)
def test_the_files_answer_as_the_plan_with_one_stream(exported, name, is_repaired):
    model, plan, folder = exported(name, is_repaired)
    kl, error = behind(model, plan, slow(folder, OTHER))
    assert error < 1e-4
    assert kl > 1e-5, "the form is not the original"


def test_it_costs_more_than_the_plan_and_the_repair_lowers_it(exported):
    """Text that it was fitted to: random weights have no likeness to share. Keys of the
    answer are approximate too.
    """
    model, plan, _ = exported("llama")
    maps = [swiftkv.maps_of(model, one) for one in (PLAN, plan)]
    costs = []
    for one in maps:
        with torch.no_grad():
            ids = torch.cat(TEXT)
            original = log_softmax(model(ids).logits, -1)
            with swiftkv.one_stream(model, one):
                found = log_softmax(model(ids).logits, -1)
        costs.append(
            float(
                (original.exp() * (original - found))
                .sum(-1)[:, PROMPT_TOKENS - 1 : -1]
                .mean()
            )
        )
    (in_transformers,) = evaluate(model, [plan], TEXT, prompt_tokens=PROMPT_TOKENS)
    assert costs[1] < costs[0]
    assert costs[1] > in_transformers.kl


@torch.no_grad()
def test_a_prompts_keys_and_values_are_the_plans(exported):
    """To the last number: what the form changes is the last token of a prompt, and what
    follows it.
    """
    model, plan, _ = exported("llama")
    whole, caches = {"use_cache": True}, []
    with skip(model, plan), prompt(model, 16):
        caches.append(model(OTHER, **whole).past_key_values)
    with swiftkv.one_stream(model, swiftkv.maps_of(model, plan)):
        caches.append(model(OTHER, **whole).past_key_values)
    for layer in (2, 3):
        for kind in ("keys", "values"):
            ours, theirs = (
                getattr(one.layers[layer], kind)[:, :, :-1] for one in caches
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_model_is_its_own_again(exported):
    model, plan, _ = exported("llama")
    original = model(OTHER).logits
    with swiftkv.one_stream(model, swiftkv.maps_of(model, plan)):
        assert not torch.allclose(model(OTHER).logits, original)
    assert torch.equal(model(OTHER).logits, original)


@pytest.mark.parametrize("name", FITTING)
def test_names_and_shapes_are_those_that_arctic_inference_reads(exported, name):
    model, _, folder = exported(name)
    config = json.loads((folder / "config.json").read_text())
    about = {
        "model_type": "llama_swiftkv",
        "architectures": ["LlamaSwiftKVForCausalLM"],
        "num_key_value_layers": 2,
        "num_hidden_layers": 4,
        "swiftkv": True,
        "key_value_group_size": 1,
        "attention_bias": True,
    }
    assert about.items() <= config.items()
    assert "rope_theta" in config
    assert (
        not {"sliding_window", "use_sliding_window", "layer_types", "auto_map"}
        & config.keys()
    )
    weights = load_file(folder / "model.safetensors")
    original = model.state_dict()
    assert all(
        torch.equal(weights[path], one)
        for path, one in original.items()
        if path in weights
    )
    sizes = model.config
    width = (
        getattr(sizes, "head_dim", None)
        or sizes.hidden_size // sizes.num_attention_heads
    )
    rows = {"q": sizes.num_attention_heads * width}
    rows |= dict.fromkeys("kv", sizes.num_key_value_heads * width)
    shapes = {"model.norm_swiftkv.weight": (sizes.hidden_size,)}
    for index in range(4):
        start = f"model.layers.{index}.self_attn."
        shapes |= {f"{start}{one}_proj.bias": (count,) for one, count in rows.items()}
        shapes[f"{start}o_proj.bias"] = (sizes.hidden_size,)
        for one, count in rows.items() if index >= 2 else ():
            shapes |= {
                f"{start}{one}_proj_swiftkv.weight": (count, sizes.hidden_size),
                f"{start}{one}_proj_swiftkv.bias": (count,),
            }
    assert {path: tuple(weights[path].shape) for path in shapes} == shapes
    in_files = {
        path
        for path in original
        if path != "lm_head.weight" or not sizes.tie_word_embeddings
    }
    assert weights.keys() == in_files | shapes.keys()
    assert not any(
        weights[f"model.layers.{index}.self_attn.o_proj.bias"].any()
        for index in range(4)
    )


def test_a_plan_that_is_not_repaired_needs_no_biases(exported):
    _, _, folder = exported("llama", False)
    assert json.loads((folder / "config.json").read_text())["attention_bias"] is False
    assert not any(
        name.endswith("bias") for name in load_file(folder / "model.safetensors")
    )
    assert "was not repaired" in (folder / "README.md").read_text()


def test_its_card_says_that_it_was_not_run(exported):
    _, _, folder = exported("llama")
    card, manifest = (
        (folder / name).read_text() for name in ("README.md", "notall.json")
    )
    assert "needs a GPU" in json.loads(manifest)["verified"]["not_run"]
    assert "has no GPU to run that on" in card
    assert "costs more than the plan in transformers" in card
    assert "All tokens have keys and values of repaired weights" in card
    assert "The tokens that skip have" not in card
    assert "| attention | 2, 3 |" in card
    with pytest.raises(UsageError, match="ArcticInference alone"):
        load(str(folder))


@pytest.mark.parametrize(
    ("name", "changes", "plan", "reason"),
    [
        (
            "llama",
            {},
            Plan([1], [1]),
            "skips for every token; choose one with --phase prefill",
        ),
        (
            "llama",
            {},
            Plan([1], prefill={"attention": [3], "mlp": [3]}),
            "skips for every token",
        ),
        (
            "llama",
            {},
            Plan(prefill={"attention": [1, 2], "mlp": [1, 2]}),
            "the last blocks of a model whole",
        ),
        (
            "llama",
            {},
            Plan(prefill={"attention": [3]}),
            "the last blocks of a model whole",
        ),
        (
            "llama",
            {},
            Plan(prefill={"attention": [2, 3], "mlp": [3]}),
            "the last blocks of a model whole",
        ),
        (
            "llama",
            {},
            Plan(prefill={"attention": [3], "mlp": [3], "last_tokens": 8}),
            "and this plan 8; plan with --last-tokens 1",
        ),
        ("llama", {"attention_bias": True}, PLAN, "output projections have a bias"),
        ("qwen3", {}, PLAN, "qwen3 is not built of Llama's layers"),
        ("qwen2 (sliding)", {}, PLAN, "a window of"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, plan, reason, tmp_path):
    with pytest.raises(UsageError, match=reason):
        export(family(name).build(**changes), plan, "swiftkv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_maps_of_another_plan_are_not_written(tmp_path, monkeypatch):
    """Files whose maps answer otherwise than the plan's are refused, though their bytes
    are as computed.
    """
    monkeypatch.setattr(swiftkv, "_times", lambda matrix, gain: matrix)
    model = family("llama").build()
    uneven(model)
    with pytest.raises(UsageError, match="differ from the plan's"):
        export(model, PLAN, "swiftkv", tmp_path / "out")


def test_the_command_says_how_it_is_served(tmp_path, monkeypatch, capsys):
    family("llama").build().save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    PLAN.save("plan.json")
    words = "notall export dense --plan plan.json --to swiftkv --out served"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert not end.value.code
    assert "ARCTIC_INFERENCE_ENABLED=1 vllm serve served" in out
    assert (
        "not compared with the skipped model: ArcticInference needs a GPU"
        in " ".join(out.split())
    )
