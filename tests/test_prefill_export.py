"""Exports that skip in the prompt alone: their own code, without notall, answers as
`notall.skip` does.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from api import engines_regrouped_base, export, prompt_code
from families import family
from notall import Plan, UsageError, load, prompt, repair, skip
from test_export_hf import _modules_of_checkpoints  # noqa: F401  a fixture

BASES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
TEXT = [
    torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
IDS = torch.arange(2 * 11).view(2, 11) * 7 % 90 + 3
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
PROMPT = {"input_ids": IDS, "attention_mask": MASK}
HOW = {
    "max_new_tokens": 4,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 0,
    "disable_compile": True,
}
PLANS = {
    "as it is": Plan(prefill={"attention": [1, 2, 3], "mlp": [1, 3], "last_tokens": 3}),
    "repaired": Plan(prefill={"attention": [2, 3], "mlp": [2, 3]}),
    "repaired MLPs": Plan(prefill={"attention": [2], "mlp": [1, 2], "last_tokens": 3}),
}
ALONE = """
import json, sys
sys.modules["notall"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
given, out = torch.load(sys.argv[1]), {}
for folder in given["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found = model.generate(**given["prompt"], **given["how"])
    out[folder] = found.sequences, torch.stack(found.logits)
torch.save(out, sys.argv[2])
"""


def assert_close(found, expected):
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from a family's name and a plan's to its original model, the plan and
    its export, written once.
    """
    known = {}

    def write(name, which):
        if (name, which) not in known:
            model, plan = family(name).build(), PLANS[which]
            plan = repair(model, plan, TEXT) if "repaired" in which else plan
            folder = (
                tmp_path_factory.mktemp("exports") / f"{name}_{which.replace(' ', '_')}"
            )
            known[name, which] = model, plan, export(model, plan, "hf", folder)
        return known[name, which]

    return write


@pytest.fixture(scope="module")
def alone(exported, tmp_path_factory):
    """What a process without notall makes of all of them."""
    folders = [str(exported(name, which)[2]) for name in BASES for which in PLANS]
    scratch = tmp_path_factory.mktemp("alone")
    torch.save({"folders": folders, "prompt": PROMPT, "how": HOW}, scratch / "in.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(scratch / "modules")}
    subprocess.run(
        [sys.executable, "-c", ALONE, scratch / "in.pt", scratch / "out.pt"],
        env=environment,
        check=True,
    )
    return torch.load(scratch / "out.pt")


def of(folder, **how):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **how
    ).eval()


@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_its_own_code_answers_as_the_plan_in_memory(exported, alone, name, which):
    model, plan, folder = exported(name, which)
    whole = model.generate(**PROMPT, **HOW)
    with skip(model, plan):
        expected = model.generate(**PROMPT, **HOW)
    sequences, logits = alone[str(folder)]
    assert torch.equal(sequences, expected.sequences)
    assert_close(logits, torch.stack(expected.logits))
    assert not torch.allclose(logits[0], whole.logits[0], rtol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "way",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3, "output_logits": False},
        {"prefill_chunk_size": 4},
        {"use_cache": False, "max_new_tokens": 1},
    ],
    ids=["static", "beams", "chunks", "without a cache"],
)
@pytest.mark.parametrize("unpadded", [False, True])
@torch.no_grad()
def test_it_generates_in_every_way(exported, implementation, way, unpadded):
    model, plan, folder = exported("llama", "repaired")
    given = PROMPT | ({"attention_mask": torch.ones_like(MASK)} if unpadded else {})
    model.set_attn_implementation(implementation)
    with skip(model, plan):
        expected = model.generate(**given, **HOW | way)
    found = of(folder, attn_implementation=implementation).generate(
        **given, **HOW | way
    )
    assert torch.equal(found.sequences, expected.sequences)
    if way.get("output_logits", True):
        assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("which", PLANS)
@torch.no_grad()
def test_a_forward_runs_whole_where_no_prompt_is_declared(exported, which):
    model, plan, folder = exported("qwen3", which)
    found, rows = of(folder, attn_implementation="eager"), MASK.bool()
    model.set_attn_implementation("eager")
    original = model(**PROMPT).logits[rows]
    assert torch.equal(found(**PROMPT).logits[rows], original)
    with skip(model, plan), prompt(model, 9):
        expected = model(**PROMPT).logits
    with found.prompt(9):
        assert_close(found(**PROMPT).logits[:, -3:], expected[:, -3:])
    assert torch.equal(found(**PROMPT).logits[rows], original)


def test_what_stands_in_is_written(exported):
    _, plan, folder = exported("llama", "repaired MLPs")
    skips = json.loads((folder / "config.json").read_text())["prompt_skips"]
    assert skips["stand_ins"] == [1]
    assert {*skips["projections"]} <= {"2", "3"}
    written = load_file(folder / "model.safetensors")
    start = "model.layers.1."
    for kind in ("weight", "bias"):
        own = plan.prompt_weights[f"{start}mlp.stand_in.{kind}"]
        assert torch.equal(written[f"{start}prompt_mlp.{kind}"], own)


def test_what_is_written(exported):
    model, plan, folder = exported("llama", "repaired")
    settings = json.loads((folder / "config.json").read_text())
    both = {"k_proj": True, "v_proj": True}
    assert settings["model_type"] == "notall_prefill_llama"
    assert settings["prompt_skips"] == plan.prefill.indices | {
        "projections": {"3": both},  # layer 2 reads what it always did
        "stand_ins": [],
    }
    written = load_file(folder / "model.safetensors")
    own = {name: weight for name, weight in written.items() if ".prompt_" in name}
    path = "model.layers.3.self_attn."
    assert len(own) == 4
    assert torch.equal(
        own[f"{path}prompt_k_proj.bias"], plan.prompt_weights[f"{path}k_proj.bias"]
    )
    assert all(
        torch.equal(written[name], weight)
        for name, weight in model.state_dict().items()
        if name in written
    )
    manifest, card = (
        (folder / "notall.json").read_text(),
        (folder / "README.md").read_text(),
    )
    assert json.loads(manifest)["plan"]["prefill"] == plan.prefill.indices
    assert "Prefill-only" in card
    assert "time to the first token" in card
    assert "is in no file" not in card
    assert "| attention | 2, 3 |" in card


@pytest.mark.parametrize(
    ("name", "plan", "target", "reason"),
    [
        ("gemma2", PLANS["repaired"], "hf", "for gemma2"),
        ("gpt2", PLANS["repaired"], "hf", "for gpt2"),
        ("llama", Plan([1], prefill={"mlp": [3]}), "hf", "a plan of one part"),
        ("llama", PLANS["repaired"], "nemotron-nas", "in the prompt alone"),
    ],
)
def test_what_has_no_such_form_is_refused(tmp_path, name, plan, target, reason):
    with pytest.raises(UsageError, match=reason):
        export(family(name).build(), plan, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repair_of_another_model_is_refused(exported, tmp_path):
    _, plan, _ = exported("llama", "repaired")
    other = family("llama").build()
    for weight in other.parameters():
        weight.data.mul_(2)
    with pytest.raises(UsageError, match="another model"):
        export(other, plan, "hf", tmp_path / "out")


def test_what_would_run_it_otherwise_refuses_it(exported):
    _, _, folder = exported("llama", "as it is")
    with pytest.raises(ValueError, match=r"notall_prefill_llama|trust_remote_code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(UsageError, match="in the prompt alone"):
        load(str(folder))
    with pytest.raises(UsageError, match="in the prompt alone"):
        engines_regrouped_base(folder)
    assert (
        "AutoModel"
        not in AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map
    )
    assert not of(folder)._supports_attention_backend


@pytest.mark.parametrize("width", [1, 3, 60, 99])
def test_a_prompt_that_is_compared_skips_something(tmp_path, width):
    """As long as the model has positions for: of more last tokens it is whole."""
    plan = Plan(prefill={"attention": [2], "mlp": [2], "last_tokens": width})
    export(family("llama").build(), plan, "hf", tmp_path / "out")


def test_code_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    broken = prompt_code._MODEL.replace(
        "keys, values.transpose(1, 2)", "keys, 0 * values.transpose(1, 2)"
    )
    assert broken != prompt_code._MODEL
    monkeypatch.setattr(prompt_code, "_MODEL", broken)
    with pytest.raises(UsageError, match="answers differently"):
        export(family("llama").build(), PLANS["as it is"], "hf", tmp_path / "out")
