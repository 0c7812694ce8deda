"""Quantised checkpoints: located, skipped as the slow twin does, and exported without a bit changed."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import engines
from families import family, silenced
from notall import Plan, UsageError, locate, skip
from notall.cli.inputs import empty_model
from notall.exporters import export, verification
from notall.exporters.manifest import NotVerified, Verified, read_manifest, verdict_of
from notall.running.footprint import footprint
from quantised import KINDS, SIZES

IDS = torch.arange(2 * 11).view(2, 11) * 7 % 90 + 3
PORTABLE = Plan(attention=[1], mlp=[0])  # layers 0 to 2 are then A0 M1, A2 M2, A3 M3
ANY = Plan(attention=[0, 3], mlp=[2])
NO_FORM = "gpt_oss"  # has portable exports alone


def needs(kind):
    return pytest.mark.skipif(not kind.runs, reason=f"it takes {' and '.join(kind.needs) or 'another transformers'}")


RUNNABLE = [pytest.param(kind, marks=needs(kind), id=kind.name) for kind in KINDS]
WRITABLE = [pytest.param(kind, marks=() if kind.is_written_by_hand else needs(kind), id=kind.name) for kind in KINDS]


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
        with silenced(model, family(kind.base), plan.attention, plan.mlp), torch.no_grad():
            expected = model(IDS, use_cache=False).logits
        with skip(model, plan), torch.no_grad():
            found = model(IDS).logits
        assert torch.equal(found, expected)
    engines.quantised(kind.name, "in memory", "exact")


@pytest.mark.parametrize("kind", RUNNABLE)
@pytest.mark.parametrize("plans", ["portable", "any"])
def test_an_export_is_run_and_answers_as_the_skipped_model(kind, plans, checkpoint, tmp_path):
    plan, dense, out = {"portable": PORTABLE, "any": ANY}[plans], checkpoint(kind), tmp_path / "out"
    if kind.base == NO_FORM and plans == "any":
        with pytest.raises(UsageError, match="do not alternate") as refusal:
            export(dense, plan, "hf", out)
        engines.quantised(kind.name, plans, "refused", str(refusal.value))
        return
    export(dense, plan, "hf", out)
    assert isinstance(verdict_of(read_manifest(out)), Verified)
    with torch.no_grad():
        with skip(model := load(dense), plan):
            expected = model(IDS).logits
        assert torch.equal(load(out)(IDS).logits, expected)
    engines.quantised(kind.name, plans, "exact")


@pytest.mark.parametrize("kind", WRITABLE)
def test_an_export_that_cannot_be_run_here_holds_the_same_bits_and_says_so(kind, checkpoint, tmp_path, monkeypatch):
    dense, out = checkpoint(kind), tmp_path / "out"
    monkeypatch.setattr(verification, "why_not_here", lambda told: "no kernels here")
    export(dense, PORTABLE, "hf", out)
    verdict = verdict_of(read_manifest(out))
    assert verdict == NotVerified("no kernels here; each tensor is the dense model's, bit for bit")
    before, after = tensors_of(dense), tensors_of(out)
    expected = {new: before[name] for name in before if (new := moved_by_hand(name))}
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert settings_of(out) == settings_of(dense) | kind.cut
    if kind.since == 6:
        engines.quantised(kind.name, "portable", "copied", "transformers does not read such rules")


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
    model = empty_model(str(dense), None, None, False)
    plain = family(kind.base).build(**(SIZES if kind.base == "llama" else {"hidden_size": 64, "intermediate_size": 32}))
    for folder, plan in ((dense, Plan()), (out, PORTABLE)):
        found, stored = footprint(model, plan), tensors_of(folder).values()
        assert found.weight_bytes == sum(tensor.nbytes for tensor in stored)
        assert found.params == footprint(plain, plan).params


@pytest.mark.parametrize("kind", RUNNABLE)
def test_what_is_loaded_counts_the_matrices_that_it_stands_for(kind, checkpoint):
    model, plain = load(checkpoint(kind)), family(kind.base).build(**(SIZES if kind.base == "llama" else {}))
    if kind.base == "llama":
        assert footprint(model, PORTABLE).params == footprint(plain, PORTABLE).params
    if kind.name.split()[0] in ("bitsandbytes", "torchao", "gptq", "awq"):  # others are unpacked on a CPU
        stored = sum(tensor.nbytes for tensor in tensors_of(checkpoint(kind)).values())
        assert footprint(model, Plan()).weight_bytes == pytest.approx(stored, rel=0.05)
