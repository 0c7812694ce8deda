"""notall opens what it wrote: exports of every target, without running the code beside
them.
"""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import notall
from api import (
    FAMILIES,
    decoder_layers,
    deepest,
    evaluate,
    footprint,
    manifest_plan_of as plan_of,
    unsealed,
)
from command_line import FAST, QUICK
from families import family
from notall import Plan, UsageError, export, locate, skip
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.each_release,
    pytest.mark.usefixtures("short_prose"),
]
PLANS = {
    "after": Plan([2, 3], [4]),
    "first": Plan([0], [5]),
    "many before": Plan([0, 1], [2]),
    "whole blocks too": Plan([1, 3, 4], [1, 2]),
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 250


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6
    )


@pytest.fixture(scope="module")
def exported(dense, tmp_path_factory):
    """The folder of an export, made once for each target and plan."""
    made = {}

    def exported(target, plan=PLANS["after"]):
        key = target, plan.identity
        if key not in made:
            made[key] = export(
                dense,
                plan,
                target,
                tmp_path_factory.mktemp("exports") / "out",
                verify=False,
            )
        return made[key]

    return exported


@pytest.fixture(autouse=True)
def no_code_of_a_checkpoint_runs():
    before = set(sys.modules)
    yield
    assert not [
        name
        for name in set(sys.modules) - before
        if name.startswith(("transformers_modules.", "modeling_"))
    ]


def logits(model):
    """Of a padded batch, and of one more token through the cache."""
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with torch.inference_mode():
        start = model(
            input_ids=TOKENS[:, :-1], attention_mask=mask[:, :-1], use_cache=True
        )
        cache = "cache" if "cache" in start else "past_key_values"
        step = model(
            input_ids=TOKENS[:, -1:],
            attention_mask=mask,
            use_cache=True,
            **{cache: start[cache]},
        )
    return torch.cat([start.logits[mask[:, :-1].bool()], step.logits[:, -1]])


def skipped_logits(dense, plan):
    model, _ = notall.load(dense, dtype="float32")
    with skip(model, plan):
        return logits(model)


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_an_export_answers_as_the_dense_model_that_skips_the_plan(
    dense, exported, target, plan
):
    model, tokenizer = notall.load(exported(target, plan), dtype="float32")
    with skip(model, Plan()):
        torch.testing.assert_close(
            logits(model), skipped_logits(dense, plan), atol=1e-5, rtol=1e-4
        )
    assert tokenizer("a")["input_ids"]
    structure = locate(model)
    kept = [part.name for part in structure.sublayers]
    assert len(kept) == 12 - len(plan)
    assert sum(name.startswith("mlp") for name in kept) == 6 - len(plan.mlp)


def test_shards_are_read_as_one_file(dense, tmp_path):
    plan = PLANS["after"]
    out = export(dense, plan, "hf", tmp_path / "out", verify=False, shard_bytes=50_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    model, _ = notall.load(out, dtype="float32")
    with skip(model, Plan()):
        torch.testing.assert_close(
            logits(model), skipped_logits(dense, plan), atol=1e-5, rtol=1e-4
        )
    next(out.glob("*.safetensors")).unlink()
    with pytest.raises(
        UsageError, match=r"lacks model-.*\.safetensors: export it anew"
    ):
        notall.load(out)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_run_as_it_is_it_is_right_or_refuses_the_cache(dense, exported, plan):
    """transformers counts the tokens of a cache by the first layer."""
    model, _ = notall.load(exported("hf", plan), dtype="float32")
    if 0 not in plan.attention:
        torch.testing.assert_close(
            logits(model), skipped_logits(dense, plan), atol=1e-5, rtol=1e-4
        )
        return
    with pytest.raises(
        UsageError,
        match="the first layer, and this model's has no attention: run it inside",
    ):
        logits(model)
    with torch.inference_mode():
        alone = model(input_ids=TOKENS, use_cache=False).logits
        with skip(model, Plan()):
            torch.testing.assert_close(alone, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    "name", [name.removesuffix("_text") for name in FAMILIES if name != "llama"]
)
def test_exports_of_every_family_are_opened(name, tmp_path):
    plan = Plan([2, 3], [0])
    changes = {"mlp_only_layers": []} if name == "qwen3_moe" else {}
    dense = save_tiny_checkpoint(tmp_path / "dense", of=name, **changes)
    out = export(dense, plan, "hf", tmp_path / "out", verify=False)
    assert json.loads((out / "config.json").read_text())["model_type"].startswith(
        "notall_"
    )
    model, _ = notall.load(out, dtype="float32")
    with skip(model, Plan()):
        torch.testing.assert_close(
            logits(model), skipped_logits(dense, plan), atol=1e-4, rtol=1e-3
        )


def test_what_an_export_skips_further_is_what_the_dense_model_skips_at_once(
    dense, exported
):
    """Evaluated with shared prefixes, and run: attn.2 of the export is attn.1 of the
    original model, and so on.
    """
    first, more = Plan([2], [3]), Plan([4], [1])
    model, _ = notall.load(exported("hf", first), dtype="float32")
    names = [
        part.name
        for part in (
            notall.load(dense, dtype="float32")
            and locate(notall.load(dense)[0]).sublayers
        )
    ]
    left = [name for name in names if name not in ("attn.2", "mlp.3")]
    ours = dict(zip(left, (part.name for part in locate(model).sublayers)))
    moved = [ours["attn.4"], ours["mlp.1"]]
    second = Plan([int(moved[0].split(".")[1])], [int(moved[1].split(".")[1])])
    with skip(model, second):
        torch.testing.assert_close(
            logits(model), skipped_logits(dense, first | more), atol=1e-5, rtol=1e-4
        )
    whole, _ = notall.load(dense, dtype="float32")
    base, cut = evaluate(model, [Plan(), second], [TOKENS])
    whole_base, whole_cut = evaluate(whole, [first, first | more], [TOKENS])
    assert (base.nll, cut.nll) == pytest.approx(
        (whole_base.nll, whole_cut.nll), rel=1e-5
    )
    assert footprint(model, second) == footprint(whole, first | more)


def test_nested_skips_leave_the_model_as_it_was(exported):
    model, _ = notall.load(exported("hf"), dtype="float32")
    layers = decoder_layers(model)[1]
    with skip(model, Plan([0])), skip(model, Plan([], [1])):
        inside = len(decoder_layers(model)[1])
    assert decoder_layers(model)[1] is layers
    assert len(layers) == model.config.num_hidden_layers == 6
    assert inside == 3  # the live attentions: two MLPs of the export ride along


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_every_command_takes_an_export(run, exported, tmp_path, target):
    folder = exported(target)
    code, out, err = run("inspect", folder, "--json")
    assert (code, err, len(json.loads(out)["sublayers"])) == (0, "", 9)
    assert (
        run("generate", folder, "hello", "--max-new-tokens", "2", "--dtype", "float32")[
            0
        ]
        == 0
    )
    code, out, err = run("eval", folder, "--skip", "mlp:0.2", *QUICK, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["quality"][0]["quality"]["delta_nll"] == 0
    code, out, err = run("bench", folder, "--skip", "attention:0.3", *FAST, "--json")
    assert (code, err, len(json.loads(out)["bench"])) == (0, "", 1)
    plan = tmp_path / "plan.json"
    code, out, err = run(
        "search", folder, "--skip", "sublayer:2", "-o", plan, *QUICK, "--json"
    )
    assert (code, err) == (0, "")
    assert (
        run(
            "generate",
            folder,
            "hello",
            "--plan",
            plan,
            "--max-new-tokens",
            "2",
            "--dtype",
            "float32",
        )[0]
        == 0
    )
    code, _, err = run(
        "export", folder, "--plan", plan, "--to", "hf", "--out", tmp_path / "again"
    )
    assert code == 2
    assert err.endswith(
        "is an export already: give the original model, and a plan that skips what both"
        " skip\n"
    )


def test_what_a_load_would_fill_with_random_weights_is_not_saved(exported, tmp_path):
    model, _ = notall.load(exported("hf"))
    with skip(model, Plan([0])):
        pass
    with pytest.raises(
        UsageError, match="a load would fill what this model lacks with random weights"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_plan_of_the_dense_model_is_not_for_the_export(
    exported, dense, run, tmp_path
):
    run("plan", dense, "--skip", "mlp:0.2", "-o", tmp_path / "plan.json")
    code, _, err = run("eval", exported("hf"), "--plan", tmp_path / "plan.json", *QUICK)
    assert code == 2
    assert "this plan was made for llama-6x32" in err
    assert "but the model is notall_llama-6x32" in err


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_the_plan_of_an_export_is_one_for_the_dense_model(run, dense, exported, target):
    code, out, err = run("eval", dense, "--plan", exported(target), *QUICK, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["verdict"]["said"]
    assert told.startswith("Without 2 of 6 attentions and 1 of 6 MLPs:")


def test_a_gguf_that_only_llama_cpp_runs_says_so_and_what_to_do(run, tmp_path):
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    path = write_gguf(
        family("llama").build(num_hidden_layers=4, **sizes), tmp_path / "tiny.gguf"
    )
    out = export(path, Plan([1], [2]), "gguf", tmp_path / "out", verify=False)
    file = next(out.glob("*.gguf"))
    for command in (
        ["inspect", file],
        ["generate", file, "hello"],
        ["bench", file],
        ["search", file, "--skip", "mlp:1"],
    ):
        code, _, err = run(*command)
        assert code == 2
        assert (
            "is notall's export of tiny.gguf without attention 1; mlp 2, in a form that"
            " only llama.cpp runs" in err
        )
        assert (
            f"here, give tiny.gguf with --plan {out}" in " ".join(err.split())
            or "--plan …" in err
        )
        assert err.count("\n") == 1
    code, _, err = run("eval", path, "--plan", out, *QUICK)
    assert code == 0, err


def unsealed_manifest(path):
    return json.loads(unsealed(path.read_bytes()))


def broken(folder, tmp_path, **changes):
    """As if it had been written so."""
    shutil.copytree(
        folder, tmp_path / "broken", ignore=shutil.ignore_patterns("notall.json")
    )
    config = tmp_path / "broken" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return tmp_path / "broken"


@pytest.mark.parametrize(
    "changes",
    [
        {"sublayers": None},
        {"sublayers": [{"attention": 0}]},
        {"model_type": "notall_nothing"},
        {"model_type": "notall_"},
        {"sublayers": 7, "block_configs": []},
    ],
)
def test_a_damaged_export_is_one_line(run, exported, tmp_path, changes):
    folder = broken(exported("hf"), tmp_path, **changes)
    for command in (["inspect", folder], ["generate", folder, "hello"]):
        code, _, err = run(*command)
        assert code == 2
        assert "export it anew from the original model" in err
        assert err.count("\n") == 1


def test_a_wrong_type_in_the_config_of_an_export_is_one_line(run, exported, tmp_path):
    code, _, err = run("inspect", broken(exported("hf"), tmp_path, vocab_size="many"))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_code_of_its_tokenizer_is_never_run(exported, tmp_path, monkeypatch):
    """Nor is it asked whether to: who answers would say yes."""
    folder, ran = broken(exported("hf"), tmp_path), tmp_path / "ran"
    own = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    code = "from transformers import PreTrainedTokenizer as OwnTokenizer"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n{code}\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UsageError, match="cannot load"):
        notall.load(folder)
    assert not ran.exists()


def test_layers_of_several_sizes_are_refused(run, exported, tmp_path):
    blocks = json.loads((exported("nemotron-nas") / "config.json").read_text())[
        "block_configs"
    ]
    blocks[0]["ffn"]["ffn_mult"] *= 4
    code, _, err = run(
        "inspect", broken(exported("nemotron-nas"), tmp_path, block_configs=blocks)
    )
    assert (code, "layers differ in size" in err) == (2, True)


def test_weights_that_an_export_says_it_has_are_missed(exported, tmp_path):
    path = broken(exported("hf"), tmp_path) / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if ".after.0." in name)
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"lacks weights \(1, first model\.layers\.2\."
    ):
        notall.load(tmp_path / "broken")


def test_a_manifest_that_is_damaged_or_of_a_repair_is_no_plan(
    run, dense, exported, tmp_path
):
    shutil.copytree(exported("hf"), tmp_path / "broken")
    manifest = tmp_path / "broken" / "notall.json"
    for text, says in (
        ("{", "notall.json of"),
        (
            json.dumps(unsealed_manifest(manifest) | {"repair": {}}),
            "was exported from a repaired plan",
        ),
    ):
        manifest.write_text(text)
        code, _, err = run("eval", dense, "--plan", tmp_path / "broken", *QUICK)
        assert (code, says in err) == (2, True)


def test_an_export_is_measured_beside_its_dense_model(run, exported):
    code, _, err = run(
        "eval", exported("nemotron-nas"), "--sequences", "1", "--length", "8"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "is what is left of another model: name that one, such as " in err
    assert err.endswith(f"{exported('nemotron-nas').name}\n")


def test_what_an_export_was_made_of_is_named_with_the_repair_beside_it(
    run, exported, tmp_path
):
    folder = shutil.copytree(exported("nemotron-nas"), tmp_path / "out")
    manifest = folder / "notall.json"
    told = unsealed_manifest(manifest)
    manifest.write_text(
        json.dumps(told | {"dense": told["dense"] | {"model": "some-model"}})
    )
    (tmp_path / "out.repaired").mkdir()
    code, _, err = run("eval", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(
        r"name that one, such as some-model, and give --plan .*out\.repaired$", err
    )
    manifest.write_text("{")
    assert (
        "name that one, such as the hub id or folder that it was made of, and"
        in run("eval", folder)[2]
    )


def test_the_repair_beside_an_export_is_named(tmp_path, exported):
    folder = shutil.copytree(exported("nemotron-nas"), tmp_path / "out")
    manifest = folder / "notall.json"
    manifest.write_text(json.dumps(unsealed_manifest(manifest) | {"repair": {}}))
    for kept, said in (
        (False, "repair itself$"),
        (True, r"repair itself, .*out\.repaired$"),
    ):
        if kept:
            (tmp_path / "out.repaired").mkdir()
        with pytest.raises(UsageError, match=said):
            plan_of(folder)


def test_a_layer_of_nothing_is_refused(dense):
    from api import without

    model, _ = notall.load(dense)
    with pytest.raises(UsageError, match="layer 1 would have neither"):
        without(model, Plan([1], [1]))
    assert deepest(locate(model), "mlp", 0.2)
