"""The paper's time tables of a shape with dummy weights: see
benchmarks/shapes/paper_times.py.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from api import TimesRecord, read, text_config
from families import family
from notall import Plan, locate
from programs import program

paper_times = program("benchmarks/shapes/paper_times")


@pytest.mark.parametrize("alone", [False, True], ids=["each its own", "one layer's"])
def test_a_tiny_shape_has_all_tables_and_bounds(alone, tmp_path, monkeypatch, capsys):
    shape, out = tmp_path / "config.json", tmp_path / "out"
    shape.write_text(
        json.dumps(family("llama").build(num_hidden_layers=4).config.to_dict())
    )
    asked = [
        "--shape",
        shape,
        "--out",
        out,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--prompt",
        "8",
        "--batch",
        "1",
    ]
    asked += [
        "--new",
        "2",
        "--rounds",
        "1",
        "--fractions",
        "0.5",
        *(["--one-layer"] if alone else []),
    ]
    monkeypatch.setattr(sys, "argv", ["paper_times.py", *map(str, asked)])
    paper_times.main()
    said = capsys.readouterr().out
    for name in (
        "prefill-last-skipped",
        "prefill-last-kept",
        "decode-last-skipped",
        "decode-last-kept",
    ):
        assert f"\n{name}\n" in said
        assert "dummy weights" in (out / f"{name}.tex").read_text()
    assert "by FLOPs" in said
    rows = read(out / TimesRecord.file, TimesRecord)
    assert [(row.variant, row.keep_last) for row in rows] == [
        ("dense", False),
        *(
            (variant, keep)
            for variant in ("attention", "mlp", "block")
            for keep in (False, True)
        ),
    ]


def test_layers_that_share_one_layers_weights_run_as_many_times():
    config = family("llama").build(num_hidden_layers=4).config
    model = paper_times.with_one_layer(config, dtype=torch.float32, device="cpu")
    layers = model.model.layers
    assert (
        len({id(layer) for layer in layers})
        == text_config(model).num_hidden_layers
        == 4
    )
    assert len({id(layer.self_attn.q_proj.weight) for layer in layers}) == 1
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert len(locate(model).blocks) == 4


def test_what_is_promised_is_work_over_work():
    model = family("llama").build(num_hidden_layers=4, tie_word_embeddings=False)
    structure = locate(model)
    (attention, mlp), head = structure.blocks[0].sublayers, model.lm_head.weight
    width, prompt, new = model.config.hidden_size, 64, 4
    flops = 2 * prompt * attention.parameters + 2 * prompt**2 * width
    dense = 2 * head.numel() + 4 * (flops + 2 * prompt * mlp.parameters)
    read = attention.weight_bytes + 3 * attention.kv_bytes_per_token * (
        prompt + new / 2
    )
    all_read = 4 * head.numel() + 4 * (read + mlp.weight_bytes)
    prefill, decode = paper_times.promised(model, Plan([1, 2]), prompt, new, 3)
    assert prefill == pytest.approx(dense / (dense - 2 * flops))
    assert decode == pytest.approx(all_read / (all_read - 2 * read))
