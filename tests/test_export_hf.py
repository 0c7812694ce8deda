"""Exports for transformers: the written model answers as the slow twin does, in every
way that transformers runs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import engines
from api import (
    FAMILIES as REGROUPED,
    cache_argument,
    check_code,
    export,
    footprint,
    is_portable,
    source_of,
)
from families import FAMILIES, each_block, family, representatives, silenced
from notall import Plan, UsageError, locate, skip
from test_weightless import NEEDS_VALUES
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.each_release

PLANS = {
    "attention": Plan(
        attention=[0, 2]
    ),  # an MLP ahead of every attention, and one behind
    "mlp": Plan(mlp=[1, 2]),  # two attentions in a row, twice
    "mixed": Plan(
        attention=[0, 3], mlp=[1]
    ),  # an MLP ahead, an attention alone, an MLP behind
    "merged": Plan(
        attention=[2, 3], mlp=[1]
    ),  # an attention with the MLP of another block, and one more
}
PORTABLE = {"block": Plan([1], [1]), "portable": Plan(attention=[2], mlp=[1])}
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
IDS = torch.arange(2 * 11).view(2, 11) * 7 % 90 + 3
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
PROMPT = {"input_ids": IDS, "attention_mask": MASK}


def build(name, **changes):
    return family(name).build(
        **{"mlp_only_layers": []} | changes if name == "qwen3_moe" else changes
    )


@pytest.fixture(scope="session", autouse=True)
def _modules_of_checkpoints(tmp_path_factory):
    """transformers copies a checkpoint's code to a cache before it runs it: to one of
    our own.
    """
    from transformers import dynamic_module_utils

    patch = pytest.MonkeyPatch()
    patch.setattr(
        dynamic_module_utils,
        "HF_MODULES_CACHE",
        str(tmp_path_factory.mktemp("modules")),
    )
    yield
    patch.undo()


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function from a family's name and a plan's to its original model and the folder
    of its export, written once.
    """
    known = {}

    def write(name, plan_name):
        if (name, plan_name) not in known:
            folder = tmp_path_factory.mktemp("exports") / f"{name}-{plan_name}".replace(
                ".", "_"
            )
            model = build(name)
            export(
                model, PLANS[plan_name], "hf", folder, verify=plan_name == "mixed"
            )  # the slow twin looks at all
            known[name, plan_name] = model, folder
        return known[name, plan_name]

    return write


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager", **options
    ).eval()


def assert_close(found, expected):
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


REGROUPED_HOW = "`trust_remote_code=True`, or after `notall.register()`"
BASES = [base.removesuffix("_text") for base in REGROUPED]
each_family = pytest.mark.parametrize("name", BASES)
# One base for each form of the template: its code differs between the others in
# transformers' names alone.
FORMS = {
    (f.mlp, f.text, f.scaled, f.experts): base.removesuffix("_text")
    for base, f in reversed(REGROUPED.items())
}
each_form = pytest.mark.parametrize("name", sorted(FORMS.values()))
each_plan = pytest.mark.parametrize("plan", PLANS)


def is_quick(name, plan):
    """One plan of each form of the template, and all of the first."""
    return name in FORMS.values() and (plan == "mixed" or name == "llama")


each_family_and_plan = pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(
            name,
            plan,
            marks=[] if is_quick(name, plan) else [pytest.mark.slow],
        )
        for name in BASES
        for plan in PLANS
    ],
)


# --- the regrouped form, in every family
# --------------------------------------------------------------------------------------


@each_family_and_plan
def test_regrouped_answers_as_the_slow_twin(exported, name, plan):
    dense, folder = exported(name, plan)
    found = load(folder)
    with (
        torch.no_grad(),
        silenced(dense, family(name), PLANS[plan].attention, PLANS[plan].mlp),
    ):
        assert_close(
            found(**PROMPT).logits[MASK.bool()], dense(**PROMPT).logits[MASK.bool()]
        )
    engines.works("transformers", "transformers", "hf", name, "any", REGROUPED_HOW)


def test_several_mlps_that_ride_along_keep_their_order(tmp_path):
    model, plan = build("llama"), Plan(attention=[1, 2])
    export(model, plan, "hf", tmp_path / "out", verify=False)
    found = load(tmp_path / "out")
    with torch.no_grad(), silenced(model, family("llama"), plan.attention, plan.mlp):
        assert_close(
            found(**PROMPT).logits[MASK.bool()], model(**PROMPT).logits[MASK.bool()]
        )


GENERATION = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beam": {"num_beams": 3},
}


@pytest.mark.parametrize("plan", ["attention", "mixed"])
@each_family
def test_regrouped_generates_as_the_skipped_model(exported, name, plan):
    """Of two plans one has MLPs ahead of every attention, the other an attention
    alone.
    """
    dense, folder = exported(name, plan)
    model = load(folder)
    for way in GENERATION.values():
        options = way | {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
        }
        options |= {"output_scores": True, "disable_compile": True, "pad_token_id": 0}
        with skip(dense, PLANS[plan]):
            expected = dense.generate(**PROMPT, **options)
        found = model.generate(**PROMPT, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(torch.stack(found.scores), torch.stack(expected.scores))


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_regrouped_compiles_whole(exported, name):
    """With a static cache, a prompt and a token that follows it."""
    if (
        REGROUPED[name if name != "gemma3" else "gemma3_text"].experts
        and TRANSFORMERS_4
    ):
        pytest.skip(
            "transformers 4 picks experts by value, which cannot be compiled whole"
        )
    torch._dynamo.reset()
    model = load(exported(name, "mixed")[1])

    def run(forward):
        cache = {
            cache_argument(model): StaticCache(config=model.config, max_cache_len=16)
        }
        steps = [torch.arange(10), torch.arange(10, 11)]
        with torch.no_grad():
            return [
                forward(
                    IDS[:, step],
                    position_ids=step[None],
                    **step_argument(step),
                    **cache,
                ).logits
                for step in steps
            ]

    for found, expected in zip(
        run(torch.compile(model, fullgraph=True, backend="eager")), run(model)
    ):
        assert_close(found, expected)


def step_argument(step):
    return {"cache_position": step} if TRANSFORMERS_4 else {}


@each_form
def test_regrouped_trains_with_gradient_checkpointing(exported, name):
    folder = exported(name, "mixed")[1]
    gradients = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    plain, checkpointed = gradients
    for key, gradient in plain.items():
        assert gradient is not None, key
        assert_close(checkpointed[key], gradient)


@each_form
def test_regrouped_saves_and_reloads(exported, name, tmp_path):
    first = load(exported(name, "mixed")[1])
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(second(IDS).logits, first(IDS).logits)


@each_form
def test_regrouped_drafts_for_the_dense_model(exported, name):
    dense, folder = exported(name, "mixed")
    draft = load(folder)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(IDS[:1], **options)
    assert torch.equal(
        dense.generate(IDS[:1], assistant_model=draft, **options), expected
    )


@each_form
def test_regrouped_answers_hidden_states_of_live_layers(exported, name):
    dense, folder = exported(name, "attention")
    with torch.no_grad():
        found = load(folder)(IDS, output_hidden_states=True, output_attentions=True)
        with skip(dense, PLANS["attention"]):
            expected = dense(IDS, output_hidden_states=True, output_attentions=True)
    for kind in ("hidden_states", "attentions"):
        assert len(found[kind]) == len(expected[kind])
        for ours, theirs in zip(found[kind], expected[kind]):
            assert_close(ours, theirs)


@each_form
def test_regrouped_caches_live_attentions_only(exported, name):
    answer = load(exported(name, "mixed")[1])(IDS)
    assert len(answer[cache_argument(build(name))].layers) == 2


@each_form
def test_no_layer_keeps_its_dense_index(exported, name):
    """Their bug: `layer_idx` stays stale, and the cache is written where nobody reads
    it.
    """
    model = load(exported(name, "attention")[1])
    indices = [layer.self_attn.layer_idx for layer in model.model.layers]
    assert indices == list(range(model.config.num_hidden_layers)) == [0, 1]


def test_the_card_shows_how_to_load_it_and_that_runs(tmp_path, monkeypatch, capsys):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4)
    export(str(model), Plan([1], [2]), "hf", tmp_path / "out")
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("Hello")


@each_form
def test_stock_transformers_refuses_the_regrouped_form(exported, name, monkeypatch):
    """Their bug: `model_type: llama` loads as an original model, with random weights
    for what was left out.
    """
    folder = exported(name, "mixed")[1]
    monkeypatch.setattr(
        CONFIG_MAPPING, "_extra_content", {}
    )  # other tests register the form in this process
    with pytest.raises(ValueError, match=r"notall_|trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


# --- ordinary checkpoints, in every architecture
# --------------------------------------------------------------------------------------

# Their configs make layers differ by index or depth in a way that no list of the config
# can carry over.
BY_DEPTH = {"gpt2 (scaled by layer)", "diffllama", "minicpm3"}
# With experts in some layers only, transformers 4 has the others answer in another
# form.
UNTOLD = {
    "axk1",
    "kolibri1",
}  # in their files it takes transformers to tell the attention's tensors from the MLP's
REFUSED = {
    *BY_DEPTH,
    *NEEDS_VALUES,
}  # an export reads the structure of the model without its weights
ORDINARY = [
    f
    for f in FAMILIES
    if f.exists and f.name not in REFUSED and f.auto is AutoModelForCausalLM
]
# Whoever leaves alternating sublayers right leaves whole blocks right: only the others
# are tried each time.
BLOCKS_ALONE = engines.refusing("hf", "portable")
WHOLE = [
    f if f.name in BLOCKS_ALONE | {"llama"} else pytest.param(f, marks=pytest.mark.slow)
    for f in ORDINARY
    if f in representatives() or f.name in BLOCKS_ALONE
]


@pytest.mark.parametrize("family", WHOLE, ids=str)
def test_whole_blocks_leave_an_ordinary_checkpoint(family, tmp_path):
    _check_ordinary(family.build(), family, PORTABLE["block"], tmp_path, verify=False)
    engines.works("transformers", "transformers", "hf", family.name, "whole blocks")


@each_block(ORDINARY)
def test_alternating_sublayers_leave_an_ordinary_checkpoint(family, tmp_path):
    model = family.build()
    if not is_portable(locate(model), PORTABLE["portable"]):
        if family.name in REGROUPED:
            return  # written in the regrouped form, which is tested above
        with pytest.raises(
            UsageError, match=r"side by side|do not alternate|rule by layer|kinds"
        ) as refusal:
            export(model, PORTABLE["portable"], "hf", tmp_path / "model")
        engines.refused("hf", family.name, "portable", str(refusal.value))
        return
    if family.name in UNTOLD:
        with pytest.raises(UsageError, match="skip whole blocks") as refusal:
            export(model, PORTABLE["portable"], "hf", tmp_path / "model")
        engines.refused("hf", family.name, "portable", str(refusal.value))
        return
    _check_ordinary(model, family, PORTABLE["portable"], tmp_path)
    engines.works("transformers", "transformers", "hf", family.name, "portable")


def _check_ordinary(dense, family, plan, folder, **options):
    dense.save_pretrained(folder / "dense")
    dense = load(
        folder / "dense"
    )  # some models change what they are given when they load it
    export(folder / "dense", plan, "hf", folder / "export", **options)
    assert not list((folder / "export").glob("*.py"))
    found = AutoModelForCausalLM.from_pretrained(
        folder / "export", attn_implementation="eager"
    ).eval()
    assert type(found) is type(dense)
    with torch.no_grad(), silenced(dense, family, plan.attention, plan.mlp):
        assert_close(
            found(**PROMPT).logits[MASK.bool()], dense(**PROMPT).logits[MASK.bool()]
        )


@pytest.mark.parametrize("name", sorted(BY_DEPTH))
def test_a_rule_by_depth_is_refused(name, tmp_path):
    if not family(name).exists:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(
        UsageError, match=r"rule by layer or depth|differs from its recomposition"
    ) as refusal:
        export(build(name), PORTABLE["block"], "hf", tmp_path / "model")
    assert not list(tmp_path.iterdir())
    engines.refused("hf", name, "whole blocks", str(refusal.value))


@each_plan
def test_what_is_skipped_is_in_no_file(exported, plan):
    dense, folder = exported("llama", plan)
    held = sum(
        weight.nbytes for weight in load_file(folder / "model.safetensors").values()
    )
    assert held == footprint(dense, PLANS[plan]).weight_bytes


# --- registering
# --------------------------------------------------------------------------------------

REGISTERED = """
import sys, torch, notall
from transformers import AutoModelForCausalLM
notall.register(); notall.register()
first = AutoModelForCausalLM.from_pretrained(sys.argv[1])
first.save_pretrained(sys.argv[2])
second = AutoModelForCausalLM.from_pretrained(sys.argv[2])
ids = torch.arange(5)[None]
assert torch.equal(first(ids).logits, second(ids).logits)
"""


@pytest.mark.slow
def test_registered_classes_need_no_trust_and_save_their_code(exported, tmp_path):
    _, folder = exported("llama", "mixed")
    environment = os.environ | {"NOTALL_CACHE": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", REGISTERED, folder, tmp_path / "again"],
        env=environment,
        check=True,
    )
    with torch.no_grad():
        assert torch.equal(
            load(tmp_path / "again")(IDS).logits, load(folder)(IDS).logits
        )


# --- what lies beside the weights
# --------------------------------------------------------------------------------------


def test_the_manifest_speaks_in_the_dense_numbering(exported):
    dense, folder = exported("llama", "mixed")
    manifest = json.loads((folder / "notall.json").read_text())
    assert manifest["plan"] == {"attention": [0, 3], "mlp": [1], "note": None}
    assert manifest["per_layer_config"] == {
        "0": {"skip": ["attention"]},
        "1": {"skip": ["mlp"]},
        "3": {"skip": ["attention"]},
    }
    assert manifest["dense"]["fingerprint"] == locate(dense).fingerprint
    assert json.loads((folder / "config.json").read_text())["sublayers"] == [
        {"attention": 1, "mlp": None, "before": [0], "after": []},
        {"attention": 2, "mlp": 2, "before": [], "after": [3]},
    ]


def test_the_modeling_file_needs_transformers_alone():
    for base in REGROUPED:
        source = source_of(base)
        assert "import notall" not in source
        assert len(source.splitlines()) < 110
        compile(source, base, "exec")


@pytest.mark.any_transformers  # it compares files
def test_code_in_a_checkpoint_that_notall_did_not_write_is_refused(tmp_path):
    out = export(
        family("llama").build(), PLANS["mixed"], "hf", tmp_path / "out", verify=False
    )
    check_code(out)
    config = (out / "config.json").read_text()
    (code,) = out.glob("*.py")
    for name, content in (
        (code.name, code.read_text() + "import os\n"),
        ("helper.py", ""),
        ("deeper/helper.py", ""),
        ("config.json", config.replace('"modeling_', '"other/model--modeling_', 1)),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["other/model--code.Tokenizer", null]}}',
        ),
    ):
        shutil.copytree(out, planted := tmp_path / name.replace("/", "-"))
        (planted / name).parent.mkdir(exist_ok=True)
        (planted / name).write_text(content)
        with pytest.raises(
            UsageError,
            match="holds code that this notall did not write: delete the folder",
        ):
            check_code(planted)
