"""Quantised checkpoints: located, skipped as the slow twin does, and exported without a
bit changed.
"""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

import engines
from api import (
    ModelOptions,
    NotVerified,
    Verified,
    cut_quantisation,
    dtype_name,
    export,
    exporters_dense,
    exporters_tensors,
    footprint,
    layers_of,
    loading,
    moved_modules,
    opened,
    read_manifest,
    read_tensors,
    renamed_notes,
    verdict_of,
)
from families import TRANSFORMERS_5, family, silenced
from notall import Plan, Source, UsageError, heal, locate, repair, skip
from quantised import KINDS, SIZES
from tiny_checkpoint import save_tiny_checkpoint
from tiny_tokenizer import byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.each_release]

IDS = torch.arange(2 * 11).view(2, 11) * 7 % 90 + 3
PORTABLE = Plan(attention=[1], mlp=[0])  # layers 0 to 2 are then A0 M1, A2 M2, A3 M3
ANY = Plan(attention=[0, 3], mlp=[2])
NO_FORM = "gpt_oss"  # has portable exports alone


def needs(kind):
    installed = [engines.needs(package) for package in kind.needs]
    return [
        *installed,
        pytest.mark.skipif(
            not kind.is_read, reason="this transformers does not run it on a CPU"
        ),
    ]


RUNNABLE = [pytest.param(kind, marks=needs(kind), id=kind.name) for kind in KINDS]
WRITABLE = [
    pytest.param(
        kind, marks=[] if kind.is_written_by_hand else needs(kind), id=kind.name
    )
    for kind in KINDS
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function from a kind to the folder of its checkpoint, written once."""
    known = {}

    def write(kind):
        if kind.name not in known:
            folder = tmp_path_factory.mktemp("quantised") / kind.name.replace(" ", "-")
            folder.mkdir()
            kind.write(folder)
            known[kind.name] = folder
        return known[kind.name]

    return write


def kind_named(name):
    return next(kind for kind in KINDS if kind.name == name)


def raising(error):
    def call(*_, **__):
        raise error

    return call


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", trust_remote_code=True
    ).eval()


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", RUNNABLE)
def test_skipping_equals_the_slow_twin(kind, checkpoint):
    model = load(checkpoint(kind))
    locate(model)
    for plan in (PORTABLE, ANY):
        with (
            silenced(model, family(kind.base), plan.attention, plan.mlp),
            torch.no_grad(),
        ):
            expected = model(IDS, use_cache=False).logits
        with skip(model, plan), torch.no_grad():
            found = model(IDS).logits
        assert torch.equal(found, expected)
    engines.quantised(kind.name, "in memory", "exact")


@pytest.mark.parametrize("kind", RUNNABLE)
@pytest.mark.parametrize("plans", ["portable", "any"])
def test_an_export_is_run_and_answers_as_the_skipped_model(
    kind, plans, checkpoint, tmp_path
):
    plan, dense, out = (
        {"portable": PORTABLE, "any": ANY}[plans],
        checkpoint(kind),
        tmp_path / "out",
    )
    if kind.base == NO_FORM and plans == "any":
        with pytest.raises(UsageError, match="do not alternate") as refusal:
            export(dense, plan, "hf", out)
        engines.quantised(
            kind.name, plans, "refused", str(refusal.value).partition(" (it has")[0]
        )
        return
    export(dense, plan, "hf", out)
    assert isinstance(verdict_of(read_manifest(out)), Verified)
    with torch.no_grad():
        with skip(model := load(dense), plan):
            expected = model(IDS).logits
        assert torch.equal(load(out)(IDS).logits, expected)
    engines.quantised(kind.name, plans, "exact")


@pytest.mark.parametrize("kind", [kind for kind in RUNNABLE if kind.id == "torchao"])
def test_shards_hold_what_their_headers_say_of_tensors(kind, checkpoint, tmp_path):
    """torchao tells in the headers of files what their tensors make up."""
    dense, out = checkpoint(kind), tmp_path / "out"
    export(dense, ANY, "hf", out, shard_bytes=60_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert isinstance(verdict_of(read_manifest(out)), Verified)


@pytest.mark.parametrize("kind", WRITABLE)
def test_an_export_that_cannot_be_run_here_holds_the_same_bits_and_says_so(
    kind, checkpoint, tmp_path, monkeypatch
):
    dense, out = checkpoint(kind), tmp_path / "out"
    monkeypatch.setattr(exporters_dense, "why_not_here", lambda told: "no kernels here")
    export(dense, PORTABLE, "hf", out)
    verdict = verdict_of(read_manifest(out))
    assert verdict == NotVerified(
        "no kernels here; each tensor is the original model's, bit for bit"
    )
    before, after = tensors_of(dense), tensors_of(out)
    expected = {new: before[name] for name in before if (new := moved_by_hand(name))}
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), (
            name
        )
    assert settings_of(out) == settings_of(dense) | kind.cut
    if kind.since == 6:
        engines.quantised(
            kind.name, "portable", "copied", "transformers does not read such rules"
        )


def moved_by_hand(name):
    """Where a tensor is in the export of PORTABLE; None where it is left out."""
    if not (found := re.match(r"model\.layers\.(\d)\.(.*)", name)):
        return name
    layer, rest = int(found[1]), found[2]
    if rest.startswith(("self_attn", "input_layernorm")):
        new = {0: 0, 2: 1, 3: 2}.get(layer)
    else:
        new = {1: 0, 2: 1, 3: 2}.get(layer)
    return None if new is None else f"model.layers.{new}.{rest}"


@pytest.mark.parametrize("kind", WRITABLE)
def test_bytes_are_counted_as_they_are_stored(kind, checkpoint, tmp_path):
    dense, out = checkpoint(kind), tmp_path / "out"
    export(dense, PORTABLE, "hf", out, verify=False)
    model = ModelOptions(str(dense)).empty()
    plain = family(kind.base).build(
        **(
            SIZES
            if kind.base == "llama"
            else {"hidden_size": 64, "intermediate_size": 32}
        )
    )
    for folder, plan in ((dense, Plan()), (out, PORTABLE)):
        found, stored = footprint(model, plan), tensors_of(folder).values()
        assert found.weight_bytes == sum(tensor.nbytes for tensor in stored)
        assert found.params == footprint(plain, plan).params


@pytest.mark.parametrize("kind", RUNNABLE)
def test_what_is_loaded_counts_the_matrices_that_it_stands_for(kind, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(kind), dtype="auto", device_map="cpu"
    ).eval()
    plain = family(kind.base).build(**(SIZES if kind.base == "llama" else {}))
    if kind.base == "llama":
        assert footprint(model, PORTABLE).params == footprint(plain, PORTABLE).params
    if kind.name.split()[0] in (
        "bitsandbytes",
        "torchao",
        "gptq",
        "awq",
    ):  # others are unpacked on a CPU
        stored = sum(tensor.nbytes for tensor in tensors_of(checkpoint(kind)).values())
        assert footprint(model, Plan()).weight_bytes == pytest.approx(stored, rel=0.05)


# --- what is said of them
# --------------------------------------------------------------------------------------


def with_tokenizer(folder):
    for file in save_tiny_checkpoint(folder / "other").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def fp8(tmp_path):
    """An fp8 checkpoint with a tokenizer."""
    (tmp_path / "fp8").mkdir()
    KINDS[0].write(tmp_path / "fp8", vocab_size=259)
    return with_tokenizer(tmp_path / "fp8")


@pytest.mark.skipif(not KINDS[0].is_read, reason="transformers 5 unpacks fp8 on a CPU")
def test_records_say_how_weights_are_stored(fp8):
    model, _ = loading.load(fp8, dtype="float32", device="cpu")
    assert dtype_name(model) == "fp8, unpacked to float32"
    assert (
        ModelOptions(str(fp8)).provenance(model).what["dtype"]
        == "fp8, unpacked to float32"
    )
    assert dtype_name(ModelOptions(str(fp8)).empty()) == "fp8, float32"
    assert dtype_name(ModelOptions(str(fp8), dtype="bfloat16").empty()) == "bfloat16"


@pytest.mark.skipif(not KINDS[0].is_read, reason="transformers 5 unpacks fp8 on a CPU")
def test_refit_weights_are_not_written_where_numbers_of_8_bits_were(fp8, tmp_path):
    model, _ = loading.load(fp8, dtype="float32", device="cpu")
    repaired = repair(model, Plan(attention=[1]), [IDS, IDS.flip(1)])
    with pytest.raises(UsageError, match="quantised there"):
        export(fp8, repaired, "hf", tmp_path / "out")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=needs(k), id=k.name) for k in KINDS if "bits" in k.name],
)
def test_a_repair_refits_what_is_not_quantised_or_says_why_not(kind, checkpoint):
    model = load(checkpoint(kind))
    text = torch.randint(
        3, 95, (32, 24), generator=torch.Generator().manual_seed(0)
    ).split(16)
    found = repair(model, Plan(attention=[0]), text)
    assert set(found.weights) == {"model.layers.1.mlp.down_proj.weight"}
    with pytest.raises(UsageError, match=f"keeps is quantised \\({kind.name}\\)"):
        repair(model, Plan(attention=[3]), text)
    with pytest.raises(UsageError, match=f"these are quantised \\({kind.name}\\)"):
        heal(model, Plan(attention=[2]), [IDS], [IDS])


def test_what_cannot_run_here_is_refused_with_the_package_to_install(
    checkpoint, monkeypatch
):
    monkeypatch.setattr(
        AutoHfQuantizer, "from_config", raising(ImportError("no such package"))
    )
    with pytest.raises(
        UsageError,
        match=(
            "gptq 4-bit weights with a package that is not installed: pip install gptqm"
        ),
    ):
        loading.load(checkpoint(kind_named("gptq")), device="cpu")


def test_what_cannot_run_here_says_how_it_is_stored_with_its_tokenizer(
    checkpoint, monkeypatch
):
    monkeypatch.setattr(
        AutoHfQuantizer, "from_config", raising(ImportError("no such package"))
    )
    folder = checkpoint(kind_named("gptq"))
    byte_tokenizer().save_pretrained(folder)
    tokenizer, stored = loading.load_tokenizer(str(folder), trust_remote_code=False)
    assert stored == "gptq 4-bit"
    assert tokenizer("w")["input_ids"] == byte_tokenizer()("w")["input_ids"]


@engines.needs("gptqmodel")
@engines.needs("optimum")
def test_weights_that_transformers_reads_in_another_way_are_refused(checkpoint):
    """It passes over GPTQ's dynamic rules, and would make up what it then misses."""
    kind = kind_named("gptq with dynamic rules")
    with pytest.raises(
        UsageError,
        match=r"does not read the gptq 4-bit weights.*\(12 are missing, first model",
    ):
        loading.load(with_tokenizer(checkpoint(kind)), device="cpu")
    engines.quantised(
        kind.name, "in memory", "refused", "transformers does not read such rules"
    )


def test_an_unknown_kind_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint(KINDS[0]), tmp_path / "odd")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["quant_method"] = "origami"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="cannot run origami weights here"):
        loading.load(folder, device="cpu")
    with pytest.raises(
        UsageError, match=r"\(origami\) tell layers apart in modules_to_not_convert"
    ):
        export(folder, PORTABLE, "hf", tmp_path / "out")


def test_nemotron_nas_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        UsageError, match=r"its weights are quantised \(fp8\)"
    ) as refusal:
        export(checkpoint(KINDS[0]), PORTABLE, "nemotron-nas", tmp_path / "out")
    engines.refused("nemotron-nas", "llama (fp8)", "any", str(refusal.value))


def test_an_export_whose_bits_are_others_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters_dense, "why_not_here", lambda told: "no kernels here")
    save = exporters_tensors.save_file

    def bent(tensors, *more):
        save({name: tensor.flip(0) for name, tensor in tensors.items()}, *more)

    monkeypatch.setattr(exporters_tensors, "save_file", bent)
    with pytest.raises(UsageError, match="does not hold what was written"):
        export(checkpoint(KINDS[0]), PORTABLE, "hf", tmp_path / "out")


def test_sizes_of_a_hub_model_are_read_from_its_headers(checkpoint, monkeypatch):
    """Of its weights nothing is fetched: the hub is asked for the headers of the
    files.
    """
    folder = checkpoint(KINDS[0])
    _, tensors = read_tensors(folder)
    header = {
        name: SimpleNamespace(data_offsets=(8, 8 + t.size))
        for name, t in tensors.items()
    }
    answer = SimpleNamespace(
        files_metadata={"model.safetensors": SimpleNamespace(tensors=header)}
    )
    monkeypatch.setattr(
        exporters_tensors, "get_safetensors_metadata", lambda name, revision: answer
    )
    monkeypatch.setattr(
        exporters_tensors,
        "snapshot_download",
        raising(LocalEntryNotFoundError("never fetched")),
    )
    assert exporters_tensors.stored_sizes(
        "org/model"
    ) == exporters_tensors.stored_sizes(folder)


def test_sizes_of_a_hub_model_that_was_fetched_need_no_network(checkpoint, monkeypatch):
    folder = checkpoint(KINDS[0])
    monkeypatch.setattr(
        exporters_tensors,
        "get_safetensors_metadata",
        raising(AssertionError("the network was asked")),
    )
    monkeypatch.setattr(
        exporters_tensors,
        "snapshot_download",
        lambda name, revision, local_files_only: folder,
    )
    assert exporters_tensors.stored_sizes(
        "org/model"
    ) == exporters_tensors.stored_sizes(folder)


# --- settings
# --------------------------------------------------------------------------------------

MODULES = [
    f"layers.{layer}.{name}"
    for layer in range(12)
    for name in ("attn", "attn.q", "attn.k", "mlp", "mlp.up")
]
KEPT_LAYERS = [0, 2, 3, 5, 6, 7, 8, 9, 10, 11]
MOVES = dict.fromkeys(MODULES) | {
    f"layers.{old}.{rest}": f"layers.{new}.{rest}"
    for new, old in enumerate(KEPT_LAYERS)
    for rest in ("attn", "attn.q", "attn.k", "mlp", "mlp.up")
} | {"head": "head"}  # fmt: skip


def cut(method, **told):
    return cut_quantisation({"quant_method": method, **told}, MOVES, "layers.")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], ["head"]),
        (["layers.1.mlp", "head"], ["head"]),
        (["layers.10.attn"], ["layers.8.attn"]),
        (["layers.0.mlp"], ["layers.0.mlp"]),
        (["mlp.up"], ["mlp.up"]),
        ([r"layers\.\d+\.mlp"], [r"layers\.\d+\.mlp"]),
        (["layers.[23].attn.q"], ["layers.1.attn.q", "layers.2.attn.q"]),
        (["layers.5"], ["layers.3.attn", "layers.3.mlp"]),
        (["nothing.of.this"], ["nothing.of.this"]),
        (["layers.*"], ["layers.*"]),
        (
            ["layers.7.qkv", "layers.1.qkv", "layers.12.mtp", "layers.99"],
            ["layers.5.qkv", "layers.99"],
        ),
    ],
)
def test_names_and_patterns_mean_what_they_meant(patterns, expected):
    assert (
        cut("fp8", modules_to_not_convert=patterns)["modules_to_not_convert"]
        == expected
    )


@pytest.mark.skipif(not TRANSFORMERS_5, reason="the rule is transformers 5's")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *MODULES,
                "mlp",
                "attn.k",
                "layers.1",
                "layers.[0-5]",
                r"layers\..*\.mlp",
                r"\w+\.1\d",
            ]
        ),
        max_size=4,
    )
)
def test_transformers_reads_the_same_modules_out_of_it(patterns):
    from transformers.quantizers.quantizers_utils import should_convert_module

    new = cut("fp8", modules_to_not_convert=patterns)["modules_to_not_convert"]
    for before, after in MOVES.items():
        if after is not None:
            assert should_convert_module(after, new) == should_convert_module(
                before, patterns
            )


def test_rules_by_layer_keep_their_order_and_settings():
    rules = {
        r"-:.*\.mlp": {},
        r"+:layers\.[57]\.": {"bits": 8},
        r"layers\.1\.": {"bits": 2},
        ".*attn": {"bits": 4},
    }
    found = cut("gptq", dynamic=rules)["dynamic"]
    eight = [
        rf"+:layers\.{layer}\.{name}$"
        for layer in (3, 5)
        for name in ("attn", "attn\\.k", "attn\\.q", "mlp", "mlp\\.up")
    ]
    assert list(found.items()) == [
        (r"-:.*\.mlp", {}), *((rule, {"bits": 8}) for rule in eight), (".*attn", {"bits": 4}),
    ]  # fmt: skip


def test_torchao_names_modules_or_their_weights():
    table = {
        "layers.2.attn.q": 1,
        "layers.3.mlp.up.weight": 2,
        r"re:layers\.[01]\..*up": 3,
        "_default": None,
    }
    told = {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": table}}}
    found = cut("torchao", quant_type=told)["quant_type"]["default"]["_data"][
        "fqn_to_config"
    ]
    assert found == {
        "layers.1.attn.q": 1,
        "layers.2.mlp.up.weight": 2,
        "layers.0.mlp.up": 3,
        "_default": None,
    }


@pytest.mark.parametrize("damaged", ["[", "3", "{"])
def test_damaged_notes_are_one_line(damaged):
    with pytest.raises(UsageError, match="noted of this model's tensors is damaged"):
        renamed_notes({"tensor_names": damaged}, MOVES)


def test_a_group_that_is_left_out_whole_goes():
    groups = {
        "a": {"targets": ["Linear"], "w": 4},
        "b": {"targets": ["layers.1.mlp.up"], "w": 8},
    }
    told = cut(
        "compressed-tensors",
        config_groups=groups,
        ignore=["head", "layers.4.attn.q"],
        format="x",
    )
    assert told["config_groups"] == {"a": groups["a"]}
    assert told["ignore"] == ["head"]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("auto-round", {"extra_config": {"model.layers.0.mlp.up": {"bits": 8}}}),
        ("gptq", {"meta": [r"re:model\.layers\.1\."]}),
        ("modelopt", {"ignore": ["model.layers.[02]*"]}),
    ],
)
def test_rules_by_layer_in_an_unknown_place_are_refused(method, told):
    with pytest.raises(
        UsageError, match=f"{method}.*tell layers apart in {next(iter(told))}"
    ):
        cut(method, **told)


def test_what_cannot_be_renumbered_is_refused():
    moved = {
        "layers.0.attn": "layers.0.attn",
        "layers.0.mlp": None,
        "layers.1.mlp": "layers.0.mlp",
    }
    told = {"quant_method": "fp8", "modules_to_not_convert": ["layers.0.experts"]}
    with pytest.raises(
        UsageError,
        match=r"name modules by layers\.0\.experts, which notall cannot renumber",
    ):
        cut_quantisation(told, moved, "layers.")


def test_modules_that_transformers_renames_are_known_by_both_names(tmp_path):
    family("mixtral").build().save_pretrained(tmp_path)
    with opened(Source(tmp_path)) as dense:
        moved = moved_modules(dense, layers_of(dense.structure, PORTABLE))
    in_files = "block_sparse_moe.gate"
    assert f"model.layers.2.{in_files}" in moved
    for name in (
        in_files,
        "mlp.gate" if TRANSFORMERS_5 else in_files,
        "self_attn.q_proj",
    ):
        assert moved[f"model.layers.2.{name}"] == f"model.layers.1.{name}"
    assert moved["model.layers.1.self_attn"] is None
    assert moved["lm_head"] == "lm_head"


def test_settings_that_tell_no_layers_apart_stay_as_they_are():
    told = {
        "quant_method": "hqq",
        "quant_config": {"weight": {"nbits": 4}},
        "skip_modules": ["lm_head"],
    }
    assert cut_quantisation(told, MOVES, "layers.") == told
