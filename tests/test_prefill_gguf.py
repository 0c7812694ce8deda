"""GGUF files of plans that skip the deepest blocks in the prompt alone: what they hold,
and what is refused.

`test_upstream.py` runs them in llama.cpp with the patch.
"""

import json
import re
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

import engines
from api import Field, gguf_layout, llamacpp, read_gguf, write_gguf as write_file
from families import family
from notall import Plan, RepairedPlan, UsageError, export, load, repair
from programs import program
from tiny_gguf import WORDS, write_gguf

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "eos_token_id": None,
}
TAIL = {"attention": [2, 3], "mlp": [2, 3]}
TEXT = [
    torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
needs_llamacpp = engines.needs("xllamacpp", "pip install xllamacpp")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    """Copies of tiny models are not worth keeping."""
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def repaired(request, tmp_path_factory):
    """A tiny model as a GGUF file in float32, and a plan with weights for its
    prompt.
    """
    model = family(request.param).build(**SIZES)
    file = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return write_gguf(model, file), repair(model, Plan(prefill=TAIL), TEXT)


def written(dense, plan, out, **how):
    export(dense, plan, "gguf", out, **how)
    return read_gguf(next(out.glob("*.gguf")))


def test_it_holds_the_original_and_the_prompts_keys_and_values(repaired, tmp_path):
    dense, plan = repaired
    source, found = read_gguf(dense), written(dense, plan, tmp_path / "out")
    name = source.architecture
    assert found.fields[f"{name}.prefill_kv_only_block_count"].value == 2
    assert all(
        np.array_equal(found.tensors[key].data, one.data)
        for key, one in source.tensors.items()
    )
    own = {
        key: one.data for key, one in found.tensors.items() if key not in source.tensors
    }
    assert own.keys() == {
        f"blk.3.attn_{part}_prefill.{kind}"
        for part in "kv"
        for kind in ("weight", "bias")
    }  # block 2 reads what it always did
    path = "model.layers.3.self_attn."
    heads = source.count("attention.head_count_kv")
    for kind in ("weight", "bias"):
        values = plan.prompt_weights[f"{path}v_proj.{kind}"].numpy()
        keys = plan.prompt_weights[f"{path}k_proj.{kind}"].numpy()
        if name == "llama":
            keys = gguf_layout.halves_paired(keys, heads)
        np.testing.assert_array_equal(own[f"blk.3.attn_v_prefill.{kind}"], values)
        np.testing.assert_array_equal(own[f"blk.3.attn_k_prefill.{kind}"], keys)
    manifest = json.loads((tmp_path / "out/notall.json").read_text())
    assert manifest["plan"]["prefill"] == plan.prefill.indices
    assert "read back by transformers" in manifest["verified"]["not_run"]
    assert "llamacpp-prefill.patch" in manifest["verified"]["not_run"]
    card = (tmp_path / "out/README.md").read_text()
    assert "Prefill-only" in card
    assert "| attention | 2, 3 |" in card


def test_a_projection_with_a_bias_of_its_own_keeps_the_originals_matrix(
    repaired, tmp_path
):
    dense, plan = repaired
    only = {
        path: one
        for path, one in plan.prompt_weights.items()
        if path.endswith("v_proj.bias")
    }
    found = written(dense, RepairedPlan.of(plan, prompt_weights=only), tmp_path / "out")
    matrix, original = (
        found.tensors[f"blk.3.attn_v{part}.weight"] for part in ("_prefill", "")
    )
    np.testing.assert_array_equal(matrix.data, original.data)
    assert not any("attn_k_prefill" in name for name in found.tensors)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16])
def test_fitted_numbers_have_at_least_8_bits(repaired, kind, tmp_path):
    _, plan = repaired
    name = (
        "llama"
        if "blk.3.attn_k.bias" not in read_gguf(repaired[0]).tensors
        else "qwen2"
    )
    dense = write_gguf(family(name).build(**SIZES), tmp_path / "dense.gguf", kind=kind)
    found = written(dense, plan, tmp_path / "out")
    tensor = found.tensors["blk.3.attn_v_prefill.weight"]
    assert tensor.quantization == (Kind.F16 if kind == Kind.F16 else Kind.Q8_0)
    expected = plan.prompt_weights["model.layers.3.self_attn.v_proj.weight"].numpy()
    off = abs(dequantize(tensor.data, tensor.quantization) - expected).max()
    assert off <= abs(expected).max() / 200


@pytest.mark.slow
@needs_llamacpp
def test_stock_llama_cpp_refuses_it_or_runs_it_whole(repaired, tmp_path):
    """Whole, as the original, where no tensors of a repair are in its way."""
    dense, plan = repaired
    tokens = [5, 30, 31, 32, 90, 41, 7]
    written(dense, plan, tmp_path / "repaired", verify=False)
    with pytest.raises(UsageError, match="wrong number of tensors"):
        llamacpp.next_token_logprobs(
            next((tmp_path / "repaired").glob("*.gguf")), tokens
        )
    written(dense, plan.unrepaired, tmp_path / "skipped", verify=False)
    found = llamacpp.next_token_logprobs(
        next((tmp_path / "skipped").glob("*.gguf")), tokens
    )
    assert found == llamacpp.next_token_logprobs(dense, tokens)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan([1], [1], prefill=TAIL), "both|a plan of one part"),
        (
            Plan(prefill={"attention": [1, 2], "mlp": [1, 2]}),
            "skips the deepest blocks.*export to hf",
        ),
        (Plan(prefill={"attention": [3]}), "skips the deepest blocks"),
        (Plan(prefill={"attention": [2, 3], "mlp": [3]}), "skips the deepest blocks"),
        (
            Plan(prefill=TAIL | {"last_tokens": 3}),
            "the last 3; make a plan with --last-tokens 1",
        ),
    ],
)
def test_what_has_no_such_file_is_refused(repaired, plan, reason, tmp_path):
    with pytest.raises(UsageError, match=reason):
        export(repaired[0], plan, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_by_name(repaired, tmp_path):
    dense = read_gguf(repaired[0])
    fields = {
        name.replace(f"{dense.architecture}.", "qwen3."): field
        for name, field in dense.fields.items()
    }
    fields["general.architecture"] = Field.of("qwen3")
    write_file(tmp_path / "qwen3.gguf", dense, fields, dense.tensors)
    with pytest.raises(UsageError, match=r"for qwen3 \(it has for llama, qwen2\)"):
        export(tmp_path / "qwen3.gguf", Plan(prefill=TAIL), "gguf", tmp_path / "out")


def test_weights_of_other_projections_or_shapes_are_refused(repaired, tmp_path):
    dense, plan = repaired
    path = "model.layers.3.self_attn."
    for name, shape, reason in (
        (
            "q_proj.weight",
            (64, 64),
            "no projection of keys or values; repair this model",
        ),
        ("v_proj.bias", (7,), r"is \(7,\), and the model's"),
    ):
        of = RepairedPlan.of(plan, prompt_weights={f"{path}{name}": torch.zeros(shape)})
        with pytest.raises(UsageError, match=reason):
            export(dense, of, "gguf", tmp_path / "out")


def test_nothing_else_takes_such_a_file_for_the_original(repaired, tmp_path):
    dense, plan = repaired
    export(dense, plan.unrepaired, "gguf", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.gguf")
    with pytest.raises(
        UsageError, match=r"only a patched llama\.cpp runs it; give the original"
    ):
        load(file)
    with pytest.raises(UsageError, match=r"only a patched llama\.cpp runs it"):
        export(file, Plan([1], [1]), "gguf", tmp_path / "again")


def test_the_command_says_what_runs_it(repaired, run, tmp_path):
    dense, plan = repaired
    plan.unrepaired.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    how = ("--plan", tmp_path / "plan.json", "--to", "gguf", "--out", out)
    code, said, _ = run("export", dense, *how)
    assert code == 0
    assert re.search(
        r"^Check: +not compared .*: only llama\.cpp with \S+llamacpp-prefill\.patch"
        r" runs it$",
        said,
        re.M,
    )
    assert re.search(
        r"^Next: +llama-cli -m \S+ -fa on, of llama\.cpp with"
        r" \S+llamacpp-prefill\.patch",
        said,
        re.M,
    )


# --- benchmarks/prefill/llamacpp.py
# --------------------------------------------------------------------------------------

# In the place of llama-bench: the files of a plan, which are larger, take half as long.
BENCH = """#!{python}
import json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["-r"] == "1"
scale = 1 if os.path.getsize(given["-m"]) == {dense} else 0.5
print(os.path.basename(os.path.dirname(given["-m"])), file=open({order!r}, "a"))
tests = [(int(one), 0) for one in given["-p"].split(",")] + [(0, int(given["-n"]))]
print(json.dumps([dict(n_prompt=p, n_gen=n, avg_ns=1e6 * (p + n) * scale) for p, n in tests]))
"""


def test_files_are_timed_in_turn(repaired, tmp_path, monkeypatch):
    dense, _ = repaired
    bench, order = tmp_path / "bin/llama-bench", tmp_path / "order"
    bench.parent.mkdir()
    bench.write_text(
        BENCH.format(
            python=sys.executable, dense=dense.stat().st_size, order=str(order)
        )
    )
    bench.chmod(0o755)
    timing = program("benchmarks/prefill/llamacpp")
    out = tmp_path / "times.jsonl"
    asked = f"--out {out} --model {dense} --blocks 1 2 --prompts 5 7 --new 2 --rounds 3"
    monkeypatch.setattr(
        "sys.argv", ["llamacpp.py", *asked.split(), "--bin", str(bench.parent)]
    )
    timing.main()
    there, back = [dense.parent.name, "1", "2"], ["2", "1", dense.parent.name]
    assert order.read_text().split() == [*there, *back, *there]
    header, *lines = map(json.loads, out.read_text().splitlines())
    assert header.keys() == {"machine", "model", "llama.cpp", "command", "date"}
    assert str(tmp_path) not in out.read_text()
    found = {(one["blocks"], one["test"]): one for one in lines}
    assert len(found) == len(lines) == 9
    assert found[0, "pp7"]["ms"]["median"] == 7
    assert found[2, "pp7"]["ms"] == {"median": 3.5, "low": 3.5, "high": 3.5, "n": 3}
    assert found[2, "pp7"]["speedup"]["median"] == 2
    assert found[1, "tg"]["ms"]["median"] == 0.5
