"""`notall recipe`: a plan as mergekit's slices of one model."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from api import recipe_of
from families import family
from notall import Plan, Source, UsageError, export, load, repair
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # recipes name blocks by their number

BLOCKS = Plan([0, 2, 3], [0, 2, 3])


@pytest.fixture(scope="module", params=["llama", "mistral"])
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    return save_tiny_checkpoint(folder, of=request.param, num_hidden_layers=6)


def test_slices_are_the_remaining_blocks(run, dense, tmp_path):
    BLOCKS.save(tmp_path / "plan.json")
    file = tmp_path / "cut.yaml"
    words = ["recipe", dense, "--plan", tmp_path / "plan.json", "-o", file]
    code, out, err = run(*words)
    assert code == 0, err
    assert out.endswith(f"Next: mergekit-yaml {file} cut\n")
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert written["merge_method"] == "passthrough"
    sources = [one for part in written["slices"] for one in part["sources"]]
    assert {one["model"] for one in sources} == {str(dense)}
    assert [one["layer_range"] for one in sources] == [[1, 2], [4, 6]]
    assert run(*words)[0] == 2  # it is there


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (Plan([1]), "mergekit drops whole blocks, and the plan skips attention 1"),
        (Plan([9], [9]), "names layer 9"),
        (Plan(prefill={"attention": [5], "mlp": [5]}), "in the prompt alone"),
    ],
)
def test_what_mergekit_does_not_do_is_refused(dense, plan, problem):
    with pytest.raises(UsageError, match=problem):
        recipe_of(str(dense), load(dense)[0], plan)


def test_a_repair_is_in_no_recipe(dense):
    model, _ = load(dense)
    tokens = torch.arange(64).reshape(2, 32)
    plan = repair(model, BLOCKS, [tokens])
    with pytest.raises(UsageError, match="weights of a repair are in no recipe"):
        recipe_of(str(dense), model, plan)


def test_a_family_whose_config_lists_its_layers_is_refused():
    model = family("qwen2").build()
    with pytest.raises(UsageError, match="tested on llama, mistral alone: use notall"):
        recipe_of("org/name", model, Plan([1], [1]))


def test_a_gguf_file_is_refused(dense, tmp_path):
    file = tmp_path / "dense.gguf"
    file.touch()
    with pytest.raises(UsageError, match="mergekit reads no GGUF file, as "):
        recipe_of(str(file), load(dense)[0], BLOCKS)


@pytest.mark.parametrize(
    ("tool", "fix"),
    [
        ("vllm", "use notall export --to hf"),
        ("llama.cpp", "use notall export --to gguf"),
        ("modelopt", "use notall export --to hf"),
        ("other", "give mergekit"),
    ],
)
def test_tools_without_a_recipe_are_refused(run, tool, fix):
    code, _, err = run("recipe", "llama-2-7b", "--skip", "block:2", "--to", tool)
    assert code == 2
    assert fix in err
    assert err.count("\n") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None, reason="pip install mergekit"
)
def test_mergekit_writes_what_an_export_writes(dense, tmp_path):
    """To the last bit, in the dtype of the checkpoint."""
    source = export(Source(dense, dtype="bfloat16"), Plan(), "hf", tmp_path / "half")
    (tmp_path / "cut.yaml").write_text(
        recipe_of(str(source), load(dense)[0], BLOCKS), encoding="utf-8"
    )
    script = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    words = [tmp_path / "cut.yaml", tmp_path / "merged"]
    subprocess.run([*script, *words], check=True, timeout=300)
    out = export(Source(dense, dtype="bfloat16"), BLOCKS, "hf", tmp_path / "out")
    merged, written = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", out)
    )
    assert merged.keys() == written.keys()
    for name, weight in written.items():
        assert merged[name].dtype == weight.dtype
        assert torch.equal(merged[name], weight)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["num_hidden_layers"] == 3
