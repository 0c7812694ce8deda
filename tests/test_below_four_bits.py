"""Rounding by importance, as the benchmark of fewer bits against fewer sublayers does
it.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("xllamacpp")

from families import family
from notall import Plan, load
from programs import ROOT, program
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf

sys.path.append(str(ROOT / "benchmarks/engines"))  # as when it is run
four = program("benchmarks/engines/below_four_bits")
pytestmark = pytest.mark.any_transformers  # it is about numbers

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
}  # K-quants have 256


@pytest.fixture(scope="module")
def model():
    return family("llama").build(**WIDE, num_key_value_heads=2)


def test_importances_are_mean_squares_of_what_a_matrix_is_given(model):
    batches = list(torch.arange(3, 51).view(4, 12).split(2))
    found = four.importances(model, batches)
    assert found.keys() == four.matrices(model).keys()
    layer, embedded = (
        model.model.layers[0],
        torch.cat([model.model.embed_tokens(batch) for batch in batches]),
    )
    given = layer.input_layernorm(embedded).detach()
    for name in ("q", "k", "v"):
        of = found[f"model.layers.0.self_attn.{name}_proj"]
        assert torch.allclose(
            torch.from_numpy(of), given.square().mean((0, 1)), rtol=1e-5
        )
    assert found["model.layers.1.mlp.down_proj"].shape == (512,)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K"])
def test_what_matters_is_rounded_less_by_importance(kind):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=draw)
    importance = (10 ** torch.randn(512, generator=draw)).numpy().astype(np.float32)
    off = {
        by is not None: (
            (
                (four.rounded(weight, four.Kind[kind], by) - weight) ** 2
                * torch.from_numpy(importance)
            ).sum()
        )
        for by in (None, importance)
    }
    assert 0 < off[True] < 0.8 * off[False]


def test_the_model_is_as_it_was_behind_it(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with four.quantised(model, "Q2_K", {}):
        changed = [
            name
            for name, weight in model.state_dict().items()
            if not torch.equal(weight, before[name])
        ]
        assert len(changed) == len(four.matrices(model)) + 1  # and the head
    assert all(
        torch.equal(weight, before[name]) for name, weight in model.state_dict().items()
    )


def test_the_file_holds_what_is_judged(tmp_path):
    """The same matrices in the same types: its numbers, as transformers reads them, are
    those that were judged.
    """
    sizes = {
        **WIDE,
        "vocab_size": len(WORDS),
        "num_key_value_heads": 4,
    }  # as many heads: rows keep their order
    write_gguf(family("llama").build(**sizes, eos_token_id=None), tmp_path / "m.gguf")
    four.write_rounded(tmp_path / "m.gguf", "Q3_K", tmp_path / "q.gguf")
    (source, _), (written, _) = (
        load(tmp_path / name, dtype="float32") for name in ("m.gguf", "q.gguf")
    )
    with four.quantised(source, "Q3_K", {}):
        judged, read = four.matrices(source), four.matrices(written)
        for name, one in read.items():
            assert torch.allclose(one.weight, judged[name].weight, atol=1e-6), name
        heads = [model.get_output_embeddings().weight for model in (source, written)]
        assert torch.allclose(*heads, atol=1e-6)


@pytest.mark.slow
def test_what_was_judged_is_not_judged_again(tmp_path, monkeypatch):
    save_tiny_checkpoint(tmp_path / "model", **WIDE, num_key_value_heads=2)
    for name, content in (
        ("wiki.test.raw", "A bird sings. "),
        ("wiki.train.first1MB.txt", "The fox jumps. "),
    ):
        (tmp_path / "wikitext2").mkdir(exist_ok=True)
        (tmp_path / "wikitext2" / name).write_text(content * 50)
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4/sample300.jsonl").write_text(
        '{"text": "A river runs under a bridge."}\n' * 60
    )
    monkeypatch.setattr(four, "CALIBRATING", 1)
    monkeypatch.setattr(four, "LENGTH", 16)
    monkeypatch.setattr(
        sys, "argv", ["below_four_bits.py", "loss", "--model", "/some/where/m.gguf"]
    )
    given = SimpleNamespace(
        model=tmp_path / "model",
        data=tmp_path,
        out=tmp_path,
        dtype="float32",
        windows=2,
    )
    given.plans = {"one": Plan([1])}
    first = four.losses(given)
    named = [(row.model, row.importance) for row in first[::2]]
    assert named[:2] == [("original", False), ("one", False)]
    assert named[2:] == [(kind, by) for kind in four.RULES for by in (False, True)]
    assert {row.text for row in first} == {"WikiText-2", "C4"}
    assert all(row.delta == 0 for row in first[:2])
    assert all(len(row.nll) == 2 for row in first)
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["command"].endswith(
        "loss --model m.gguf"
    )  # and no path of a machine
    (tmp_path / "losses.jsonl").write_text("\n".join(lines[:6]) + "\n")
    judged, score = [], four.score
    monkeypatch.setattr(
        four, "score", lambda *asked: judged.append(asked) or score(*asked)
    )
    assert four.losses(given) == first
    assert len(judged) == len(first) - 5
