"""An exported repair costs in each engine, token by token, what it costs here: see
benchmarks/repairing/served.py.
"""

from __future__ import annotations

import sys

import pytest
import torch

import engines
from families import family
from notall import (
    Plan,
    Source,
    TrainConfig,
    UsageError,
    export,
    heal,
    load,
    repair,
    skip,
)
from programs import program
from tiny_gguf import WORDS, write_gguf as write_tiny

served = program("benchmarks/repairing/served")

PLANS = {
    "portable": Plan(attention=[2], mlp=[1]),
    "mixed": Plan(attention=[0, 3], mlp=[1]),
}
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "eos_token_id": None,
}
TEXTS = [
    torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(n))
    for n in range(3)
]
WINDOWS = torch.cat(TEXTS)[:3].tolist()


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(params=PLANS)
def healed(request, tmp_path):
    """A model, and a plan whose weights a repair and a training made."""
    dense = write_tiny(family("llama").build(**SIZES), tmp_path / "dense.gguf")
    model, _ = load(dense, dtype="float32", device="cpu")
    plan = heal(
        model,
        repair(model, PLANS[request.param], TEXTS),
        TEXTS[1:],
        TEXTS[:1],
        TrainConfig(rate=1e-3),
    )
    assert len(plan.weights) > 8
    return dense, model, plan


def row_of(engine, folder, model, plan):
    there = served.asked_of(engine, sys.executable, folder, WINDOWS)
    return served.compared(engine, "repaired", there, served.ours(model, plan, WINDOWS))


def check(engine, folder, model, plan):
    found = row_of(engine, folder, model, plan)
    assert abs(found.off) < 1e-3
    assert found.worst < 5e-3  # llama.cpp keeps keys and values in float16
    assert found.tokens == 3 * 11
    assert row_of(engine, folder, model, plan.unrepaired).worst > 0.1


@pytest.mark.slow
def test_transformers_loses_the_same(healed, tmp_path):
    dense, model, plan = healed
    folder = export(
        Source(dense, dtype="float32"), plan, "hf", tmp_path / "out", verify=False
    )
    check("transformers", folder, model, plan)


@pytest.mark.slow
@pytest.mark.any_transformers  # llama.cpp runs it
@engines.needs("xllamacpp", "pip install xllamacpp")
def test_llamacpp_loses_the_same(healed, tmp_path):
    dense, model, plan = healed
    check(
        "llama.cpp",
        export(dense, plan, "gguf", tmp_path / "out", verify=False),
        model,
        plan,
    )


def test_ours_is_the_loss_of_the_skipped_model():
    model = family("llama").build()
    rows = served.ours(model, Plan([1]), [[5, 6, 7, 8], [9, 10, 11, 12]])
    for row, ids in zip(rows, ([5, 6, 7, 8], [9, 10, 11, 12]), strict=True):
        with skip(model, Plan([1])), torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert sum(row) / 3 == pytest.approx(float(loss), rel=1e-5)


def test_what_an_engine_does_not_tell_is_left_out_on_both_sides():
    row = served.compared(
        "llama.cpp", "dense", [[1.0, None], [3.5, 2.0]], [[1.5, 9.0], [3.0, 2.0]]
    )
    assert row == served.Compared(
        "llama.cpp", "dense", nll=6.5 / 3, ours=6.5 / 3, worst=0.5, tokens=3
    )
    with pytest.raises(RuntimeError, match="tells of no token"):
        served.compared("llama.cpp", "dense", [[None]], [[1.0]])


def test_an_engine_fails_by_what_it_is_off_beyond_the_dense_model():
    def rows(**off):
        return [
            served.Compared("an engine", name, 2 + value, 2.0, 0.1, 9)
            for name, value in off.items()
        ]

    assert served.too_far(rows(dense=0.02, repaired=-0.029), 0.01) == []
    assert served.too_far(rows(dense=0.0, repaired=-0.011), 0.01) == ["an engine"]
    assert served.too_far(rows(dense=-0.02, repaired=0.031), 0.01) == ["an engine"]


@pytest.mark.slow
def test_an_engine_that_is_not_there_is_said(tmp_path):
    assert "make test-engines installs it" in served.absent(
        "vllm", str(tmp_path / "python")
    )
    assert served.absent("transformers", "") == ""
    with pytest.raises(
        UsageError, match=r"vllm did not score: .*No module named 'vllm'"
    ):
        served.asked_of("vllm", sys.executable, tmp_path, WINDOWS)
