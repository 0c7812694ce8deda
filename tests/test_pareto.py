"""Skipping beside quantising: what engines answer is what the model answers, and a run
measures each model once.
"""

import json
import math
import shutil
import stat
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

import engines
from api import (
    EIGHT_BITS,
    VLLM,
    Engine,
    EngineFailed,
    EngineModel,
    EngineTimesRecord,
    LlamaCpp,
    NotAsSkipped,
    ParetoPlans,
    ParetoRecord,
    Provenance,
    Quartiles,
    RepairedPlan,
    Transformers,
    UnknownArchitecture,
    Windows,
    by_another,
    call,
    check_manifest,
    check_verified,
    engine_named,
    engine_Timing as Timing,
    engines_worker,
    export,
    exporters_gguf,
    facts_Times as Times,
    gguf_layout,
    llamacpp,
    measure_pareto,
    options_Workload as Workload,
    pareto,
    pareto_front,
    read_folder,
    read_gguf,
    read_text,
    records_lines as lines,
    remote_code,
    render,
    sentence,
    shown_pareto,
    texts_mix,
    weight_bytes,
    write_pareto,
    write_plain,
)
from families import family
from notall import Plan, Source, UsageError, load, repair, skip
from tiny_gguf import WORDS, write_gguf as write_tiny

pytestmark = pytest.mark.any_transformers  # of records, rows and fronts

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "eos_token_id": None,
}
MIXED = Plan(attention=[0, 3], mlp=[1])
needs_llamacpp = engines.needs("xllamacpp", "pip install xllamacpp")


@pytest.fixture(autouse=True)
def _cache_of_its_own(request, tmp_path_factory, monkeypatch):
    if "default_model" not in request.fixturenames:
        monkeypatch.setenv(
            "NOTALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache")
        )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_tiny(
        family("llama").build(**SIZES), tmp_path_factory.mktemp("gguf") / "llama.gguf"
    )


@pytest.fixture(scope="module")
def windows(dense):
    """Three windows of letters, the second with a character that two tokens make up."""
    _, tokenizer = load(dense, dtype="float32", device="cpu")
    texts = (
        "the quick brown fox jumps over",
        "the caf\u00e9 is where he then was",
        "then the other one, the last one",
    )
    return Windows.of(tokenizer, (tokenizer(text)["input_ids"] for text in texts))


def nll_one_by_one(model, tokens):
    """The slow twin: a forward pass for each token."""
    found = []
    with torch.no_grad():
        for place in range(1, len(tokens)):
            logits = model(torch.tensor([tokens[:place]])).logits[0, -1]
            found.append(-float(logits.log_softmax(-1)[tokens[place]]))
    return found


# --- engines
# --------------------------------------------------------------------------------------


@needs_llamacpp
@pytest.mark.parametrize(
    "plan",
    [pytest.param(Plan(), marks=pytest.mark.slow), MIXED],
    ids=["dense", "mixed"],
)
def test_llamacpp_scores_as_the_model_token_by_token(dense, windows, plan, tmp_path):
    engine = LlamaCpp(1)
    write_plain(engine, Source(dense), plan, tmp_path / "plain.gguf")
    found = call(
        engine, "score", checkpoint=tmp_path / "plain.gguf", windows=windows.tokens
    )
    model, _ = load(dense, dtype="float32", device="cpu")
    torn = 0
    with skip(model, plan):
        for row, tokens in zip(found, windows.tokens):
            for value, expected in zip(row, nll_one_by_one(model, tokens), strict=True):
                torn += value is None
                assert value is None or value == pytest.approx(expected, abs=0.01)
    assert torn == 1  # the first half of the character


@pytest.mark.slow
@needs_llamacpp
def test_llamacpp_scores_the_default_model_as_the_model_does(default_model, tmp_path):
    model, tokenizer = default_model
    rows = torch.tensor(
        tokenizer(
            "The history of the Roman Empire begins with a village on the Tiber. " * 4
        )["input_ids"]
    )
    engine = LlamaCpp(1)
    plan = Plan(attention=[10, 20], mlp=[9])
    write_plain(engine, Source("smollm2"), plan, tmp_path / "plain.gguf")
    (found,) = call(
        engine, "score", checkpoint=tmp_path / "plain.gguf", windows=[rows.tolist()]
    )
    with skip(model, plan), torch.no_grad():
        expected = (
            -model(rows[None])
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(-1, rows[1:, None])[:, 0]
        )
    assert sum(found) / len(found) == pytest.approx(float(expected.mean()), abs=0.01)


@pytest.mark.slow
def test_transformers_scores_as_the_model_token_by_token(dense, windows, tmp_path):
    engine = Transformers(1)
    write_plain(engine, Source(str(dense)), MIXED, tmp_path / "plain")
    found = call(engine, "score", checkpoint=tmp_path / "plain", windows=windows.tokens)
    model, _ = load(dense, dtype="float32", device="cpu")
    with skip(model, MIXED):
        for row, tokens in zip(found, windows.tokens):
            assert row == pytest.approx(nll_one_by_one(model, tokens), abs=1e-4)


@pytest.mark.slow
def test_transformers_holds_eight_bits_in_less_room(dense, windows, tmp_path):
    pytest.importorskip("torchao")
    engine, plain, packed = Transformers(1), tmp_path / "plain", tmp_path / "int8"
    write_plain(engine, Source(str(dense)), MIXED, plain)
    call(engine, "quantise", plain=plain, kind="int8", out=packed)
    sizes = [weight_bytes(folder) for folder in (plain, packed)]
    assert sizes[1] < 0.6 * sizes[0]
    scored = [
        call(engine, "score", checkpoint=one, windows=windows.tokens[:1])[0]
        for one in (plain, packed)
    ]
    assert scored[0] != scored[1]
    assert scored[1] == pytest.approx(scored[0], abs=0.2)


@needs_llamacpp
def test_an_engine_is_timed_and_its_memory_grows(dense, tmp_path):
    engine = LlamaCpp(1)
    write_plain(engine, Source(dense), Plan(), tmp_path / "plain.gguf")
    taken = Timing(
        **call(
            engine,
            "time",
            checkpoint=tmp_path / "plain.gguf",
            prompt=[5, 30, 31, 32] * 8,
            new=4,
        )
    )
    assert taken.prefill_ms > 0
    assert taken.decode_ms_per_token > 0
    assert taken.memory_bytes > (tmp_path / "plain.gguf").stat().st_size


@needs_llamacpp
def test_what_an_engine_says_is_told(dense, tmp_path):
    (tmp_path / "torn.gguf").write_bytes(dense.read_bytes()[:-1])
    with pytest.raises(
        EngineFailed, match=r"did not score: .*is not within the file bounds"
    ):
        call(LlamaCpp(1), "score", checkpoint=tmp_path / "torn.gguf", windows=[[1, 2]])


@pytest.mark.slow
def test_a_file_that_is_called_like_a_library_is_none(monkeypatch, tmp_path):
    (tmp_path / "uuid.py").write_text("raise SystemExit('this is no library')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineFailed, match="did not score: FileNotFoundError"):
        call(Transformers(1), "score", checkpoint=Path("no-model"), windows=[[1, 2]])


def test_eight_bits_for_vllm_are_rounded_a_channel_at_a_time(dense, tmp_path):
    engine = VLLM(1)
    write_plain(engine, Source(str(dense)), MIXED, tmp_path / "plain")
    engine.quantise(tmp_path / "plain", "int8", tmp_path / "packed")
    plain, packed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed")
    )
    scaled = [name for name in packed if name.endswith("_scale")]
    assert len(scaled) == 4 * (4 - 2) + 3 * (4 - 1)
    for name in scaled:
        weight, numbers = (
            plain[name.removesuffix("_scale")],
            packed[name.removesuffix("_scale")],
        )
        assert numbers.dtype == torch.int8
        assert packed[name].shape == (len(weight), 1)
        assert numbers.abs().amax(1).eq(127).all()
        assert (numbers * packed[name] - weight).abs().le(packed[name] / 2 + 1e-7).all()
    kept = {
        name for name in packed if name not in scaled and f"{name}_scale" not in packed
    }
    assert all(torch.equal(packed[name], plain[name]) for name in kept)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config.pop("quantization_config") == EIGHT_BITS
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())
    check_manifest(tmp_path / "packed")  # it is looked at before it is timed


def test_a_process_that_dies_is_an_answer(monkeypatch, tmp_path):
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(dying.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(engines_worker.sys, "executable", str(dying))
    with pytest.raises(EngineFailed, match="ended by signal 9"):
        call(LlamaCpp(1), "score", checkpoint="any.gguf", windows=[[1, 2]])


@needs_llamacpp
def test_engines_and_types_are_named():
    assert engine_named("llama.cpp") is LlamaCpp
    assert LlamaCpp(1).version == version("xllamacpp")
    with pytest.raises(UsageError, match=r"did you mean llama\.cpp"):
        engine_named("llamacpp")
    assert engine_named("vllm") is VLLM
    assert VLLM(1, "bfloat16").checked_types([]) == ["bfloat16", "int8"]
    assert LlamaCpp(1).checked_types(["Q8_0", "F16", "Q8_0"]) == ["Q8_0", "F16"]
    assert LlamaCpp(1).checked_types([])[0] == "F16"
    with pytest.raises(UsageError, match=r"no type 'Q4_K' .*Q4_K_M"):
        LlamaCpp(1).checked_types(["Q4_K"])
    with pytest.raises(UsageError, match=r"needs a \.gguf file"):
        LlamaCpp(1).check("some/model")


def test_a_file_that_is_quantised_already_is_told_of(tmp_path, caplog):
    pytest.importorskip("xllamacpp")
    packed = write_tiny(
        family("llama").build(**SIZES), tmp_path / "packed.gguf", kind=Kind.Q8_0
    )
    LlamaCpp(1).check(packed)
    assert "packed.gguf is quantised already (Q8_0)" in caplog.text


# --- types of llama.cpp
# --------------------------------------------------------------------------------------

# What `llama-quantize` of llama.cpp writes of a Llama with 12 layers: names of layers
# with 6 bits.
FINER = {0, 3, 6, 9, 10, 11}


def shapes_of(width, layers=12, head=True):
    found = {"token_embd.weight": (300, width), "output_norm.weight": (width,)}
    found |= {"output.weight": (300, width)} if head else {}
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            found[f"blk.{layer}.{name}.weight"] = (width, width)
        found[f"blk.{layer}.ffn_down.weight"] = (width, 512)
        found[f"blk.{layer}.attn_norm.weight"] = (width,)
    return found


@pytest.mark.parametrize(
    ("kind", "most"), [("Q5_K_M", Kind.Q5_K), ("Q4_K_M", Kind.Q4_K)]
)
def test_mixed_types_are_llamacpps(kind, most):
    found = llamacpp.types_of(kind, shapes_of(512))
    assert found["output.weight"] == Kind.Q6_K
    assert found["token_embd.weight"] == found["blk.0.attn_q.weight"] == most
    assert found["output_norm.weight"] == found["blk.0.attn_norm.weight"] == Kind.F32
    for part in ("attn_v", "ffn_down"):
        assert {
            n for n in range(12) if found[f"blk.{n}.{part}.weight"] == Kind.Q6_K
        } == FINER
    assert (
        llamacpp.types_of(kind, shapes_of(512, head=False))["token_embd.weight"]
        == Kind.Q6_K
    )


def test_rows_that_are_no_multiple_of_256_get_shorter_blocks():
    found = llamacpp.types_of("Q4_K_M", shapes_of(96))
    assert found["blk.1.attn_q.weight"] == Kind.Q5_0
    assert found["blk.0.attn_v.weight"] == Kind.Q8_0
    assert found["blk.1.ffn_down.weight"] == Kind.Q4_K
    assert found["output.weight"] == Kind.Q8_0
    assert (
        llamacpp.types_of("Q5_K_M", shapes_of(96))["blk.1.attn_q.weight"] == Kind.Q5_1
    )
    assert llamacpp.types_of("Q4_K_M", shapes_of(48))["blk.1.attn_q.weight"] == Kind.F16


@needs_llamacpp
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.Q5_1])
def test_numbers_are_packed_as_the_gguf_package_packs_them(kind):
    values = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    ours, theirs = llamacpp.pack(values, kind), quantize(values, kind)
    assert ours.shape == theirs.shape
    difference = np.abs(dequantize(ours, kind) - dequantize(theirs, kind))
    assert difference.max() < 0.02  # they round halves differently


@needs_llamacpp
@pytest.mark.parametrize(
    ("kind", "most"), [("Q8_0", 0.01), ("Q5_K_M", 0.06), ("Q4_K_M", 0.12)]
)
def test_files_hold_what_they_are_called(kind, most, tmp_path):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    source = write_tiny(family("llama").build(**sizes), tmp_path / "dense.gguf")
    llamacpp.write_in_type(source, "F16", tmp_path / "plain.gguf")
    llamacpp.write_in_type(tmp_path / "plain.gguf", kind, tmp_path / "packed.gguf")
    plain, packed = (
        read_gguf(tmp_path / "plain.gguf"),
        read_gguf(tmp_path / "packed.gguf"),
    )
    assert packed.fields["general.file_type"].value == int(llamacpp.FILE_TYPES[kind])
    assert packed.path.stat().st_size < 0.75 * plain.path.stat().st_size
    for name, tensor in packed.tensors.items():
        values = dequantize(tensor.data, tensor.quantization)
        other = plain.tensors[name].data.astype(np.float32)
        assert np.abs(values - other).mean() <= most * np.abs(other).mean()


@pytest.mark.slow
@needs_llamacpp
def test_repaired_weights_are_in_the_plain_file(dense, tmp_path):
    model, _ = load(dense, dtype="float32", device="cpu")
    repaired = repair(model, MIXED, [torch.arange(8 * 12).view(8, 12) * 7 % 90 + 3])
    assert repaired.weights
    for name, plan in (("repaired", repaired), ("skipped", MIXED)):
        write_plain(LlamaCpp(1), Source(dense), plan, tmp_path / f"{name}.gguf")
    held = [
        read_gguf(tmp_path / f"{name}.gguf").tensors for name in ("repaired", "skipped")
    ]
    changed = [
        name
        for name in held[0]
        if not np.array_equal(held[0][name].data, held[1][name].data)
    ]
    assert len(changed) == len(repaired.weights)
    assert all(held[0][name].quantization == Kind.F16 for name in changed)


# --- texts
# --------------------------------------------------------------------------------------


def test_windows_count_the_bytes_that_are_predicted(dense, default_model):
    _, ours = default_model
    _, theirs = load(dense, dtype="float32", device="cpu")
    text = "the café is where he then was"
    windows = Windows.of(ours, [ours(text)["input_ids"]])
    first = len(ours.decode(windows.tokens[0][:1]).encode())
    assert windows.text_bytes == (len(text.encode()) - first,)
    other = by_another(theirs, ours, windows)
    assert len(other.tokens[0]) > len(windows.tokens[0])
    assert other.text_bytes == (
        len(text.encode()) - len(theirs.decode(other.tokens[0][:1]).encode()),
    )


# --- a run
# --------------------------------------------------------------------------------------


class Fake(Engine):
    """Answers from a table, and keeps what it was asked."""

    name, package, install = "fake", "json", ""
    types = usual = ("plain", "small")

    quantise = score = time = None


OWN = Windows(((1, 2, 3), (4, 5, 6)), (6, 10))
OTHERS = Windows(((1, 2), (4, 5)), (6, 10))
LESS = Plan(attention=[1])
# NLL a token, by the name of a checkpoint; milliseconds of a new token
ANSWERS = {
    "dense-plain": (1.0, 10.0),
    "dense-small": (1.2, 8.0),
    "less-plain": (1.1, 9.0),
    "less-small": (1.15, 5.0),
    "other-plain": (3.0, 4.0),
    "other-small": (3.0, 4.0),
}


class Asked(list):
    """What the engine was asked; it fails for the checkpoints that are `broken`."""

    def __init__(self):
        self.broken, self.most = set(), math.inf

    def __call__(self, engine, question, *, checkpoint="", **about):
        name = Path(checkpoint or about["out"]).name
        if len(self) >= self.most:
            raise KeyboardInterrupt
        self.append((question, name))
        if name in self.broken:
            raise EngineFailed(f"{name} is broken")
        if question == "quantise":
            Path(about["out"]).write_text("x" * 50)
            return None
        nll, decode = ANSWERS[name]
        if question == "score":
            return [[nll] * (len(tokens) - 1) for tokens in about["windows"]]
        slower = 1 + sum(
            one == (question, name) for one in self
        )  # each round twice as slow, and so on
        return {
            "prefill_ms": 2.0 * decode,
            "decode_ms_per_token": decode * slower,
            "memory_bytes": 7,
        }


def write_text(engine, spec, plan, checkpoint, stored=False, **loading):
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text("x" * (100 - len(plan)))


@pytest.fixture
def asked(monkeypatch):
    found = Asked()
    monkeypatch.setattr(engines_worker, "call", found)
    monkeypatch.setattr(pareto, "write_plain", write_text)
    return found


def subjects(*more):
    return [
        EngineModel("dense", "m", Plan(), OWN),
        EngineModel("less", "m", LESS, OWN),
        *more,
    ]


def measured(out, *more, plan=LESS, rounds=3, command="", **what):
    models = [
        EngineModel("dense", "m", Plan(), OWN),
        EngineModel("less", "m", plan, OWN),
        *more,
    ]
    about = Provenance(
        what={"model": "m", **what}, where={"date": str(uuid4()), "command": command}
    )
    found = measure_pareto(
        Fake(1), models, ("plain", "small"), Workload(4, 2, rounds=rounds), out, about
    )
    return {(record.model, record.type): record for record in found}


def test_models_are_compared_round_by_round_and_window_by_window(asked, tmp_path):
    found = measured(tmp_path)
    small = found["less", "small"]
    assert small.delta_nll == pytest.approx(0.15)
    assert small.times.speedup_decode.median == pytest.approx(
        2
    )  # in each round, though rounds differ
    assert small.times.decode_ms_per_token.median == pytest.approx(15)
    assert small.bits_per_byte == pytest.approx(
        (1.15 * 2 / 6 + 1.15 * 2 / 10) / 2 / math.log(2)
    )
    assert (small.file_bytes, small.memory_bytes, small.skipped) == (50, 7, "attn.1")
    assert found["less", "plain"].file_bytes == 99
    assert {key for key, record in found.items() if record.best} == {
        ("dense", "plain"),
        ("less", "plain"),
        ("less", "small"),
    }
    order = [name for question, name in asked if question == "time"]
    assert (
        order[:4]
        == order[8:]
        == ["dense-plain", "dense-small", "less-plain", "less-small"]
    )
    assert order[4:8] == order[3::-1]


def beside(name, loss, low, median, high):
    speedup = Quartiles(median=median, low=low, high=high, n=5)
    names = ("prefill_ms", "decode_ms_per_token", "speedup_prefill", "speedup_decode")
    times = Times(**dict.fromkeys(names, speedup))
    return ParetoRecord(
        model=name,
        repaired=False,
        type="plain",
        delta_nll=loss,
        bits_per_byte=1.0,
        delta_bits=-loss,
        times=times,
    )


def test_a_greater_loss_is_worth_it_for_what_is_faster_beyond_the_rounds_spread():
    records = [
        beside("dense", 0.0, 1.0, 1.0, 1.0),
        beside("maybe faster", 0.1, 1.01, 1.1, 1.2),
        beside("faster", 0.2, 1.28, 1.3, 1.32),
        beside("maybe faster than that", 0.25, 1.34, 1.5, 1.6),
        beside("worse and no faster", 0.4, 1.2, 1.25, 1.3),
        beside("fastest", 0.5, 1.48, 1.5, 1.52),
    ]
    assert [one.model for one in pareto_front(records)] == [
        "dense",
        "faster",
        "fastest",
    ]
    assert [one.model for one in pareto_front(records[::-1])] == [
        "dense",
        "faster",
        "fastest",
    ]


def test_what_is_faster_in_each_round_is_on_the_front_however_the_machine_drifts():
    """Rounds are paired: a slow round is slow for both."""
    steady, drifting = (10.0, 10.1, 9.9, 10.0, 10.0), (10.0, 14.0, 19.0, 9.0, 12.0)

    def found(ours, theirs):
        records = [
            beside("dense", 0.0, 0.8, 1.0, 1.2),
            beside("less", 0.1, 0.9, 1.1, 1.3),
        ]
        rounds = (tuple(theirs), tuple(ours))
        records = [
            one.model_copy(update={"round_ms": ms}) for one, ms in zip(records, rounds)
        ]
        return [one.model for one in pareto_front(records)]

    assert found([0.9 * ms for ms in drifting], drifting) == ["dense", "less"]
    assert found([9.9, 9.8, 10.1, 9.7, 10.0], steady) == ["dense"]
    assert found([9.0, 9.1], [10.0, 10.1]) == ["dense", "less"]  # two rounds that agree
    assert found([9.0, 9.9], [10.0, 10.1]) == ["dense"]
    assert found([9.0], [10.0]) == ["dense"]  # one tells nothing


def test_skipping_pays_where_nothing_whole_is_as_good():
    def said(*changes):
        rounds = {"dense": 10.0, "eight bits": 8.0, "less": 5.0} | dict(changes[:1])
        records = [
            beside(name, loss, 0.9, 10 / rounds[name], 1.1).model_copy(
                update={
                    "round_ms": tuple(
                        rounds[name] * (1 + 0.001 * number) for number in range(5)
                    ),
                    "delta_nll_se": 0.01 if loss else 0.0,
                    "windows": 8,
                    "skipped": "attn.1" if name == "less" else "",
                }
            )
            for name, loss in {
                "dense": 0.0,
                "eight bits": 0.2,
                "less": 0.1,
                **dict(changes[1:]),
            }.items()
        ]
        return sentence(records)

    assert "Leaving sublayers out pays from 2.00 times on" in said()
    assert "Leaving sublayers out may pay from 1.25 times on: rounds" in said(
        ("less", 8.0), ("less", 0.19)
    )
    assert "Leaving sublayers out is nowhere on this front" in said(
        ("less", 10.0), ("less", 0.1)
    )


def test_models_of_one_shape_share_their_times(asked, tmp_path):
    ANSWERS["again-plain"], ANSWERS["again-small"] = (1.05, 9.6), (1.05, 6.0)
    found = measured(tmp_path, EngineModel("again", "m", LESS, OWN))
    for kind, mean in (
        ("plain", (10 / 9 + 10 / 9.6) / 2),
        ("small", (10 / 5 + 10 / 6) / 2),
    ):
        first, second = found["less", kind], found["again", kind]
        assert first.times == second.times
        assert first.times.speedup_decode.median == pytest.approx(mean)
        assert first.rounds == 3
    assert [key for key, record in found.items() if record.best] == [
        ("dense", "plain"),
        ("again", "small"),
    ]
    asked.broken = {"again-small"}
    alone = measured(tmp_path / "broken", EngineModel("again", "m", LESS, OWN))[
        "less", "small"
    ]
    assert alone.times.speedup_decode.median == 2


def test_a_run_goes_on_and_takes_an_interrupted_round_again(asked, tmp_path):
    asked.most = 4 + 2 + 2  # scores, quantising, and half of a round
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    done, asked.most = len(asked), math.inf
    measured(tmp_path)
    assert [question for question, _ in asked[done:]] == ["time"] * 12
    done = len(asked)
    measured(tmp_path)
    assert len(asked) == done
    assert len(lines.read_lines(tmp_path / ParetoRecord.file)) == 4
    measured(tmp_path, rounds=4)
    assert [question for question, _ in asked[done:]] == ["time"] * 4
    assert len(lines.read_lines(tmp_path / EngineTimesRecord.file)) == 2 + 4 * 4


def test_what_an_engine_cannot_run_is_told_and_tried_again(asked, tmp_path):
    asked.broken = {"less-small"}
    found = measured(tmp_path)
    assert found["less", "small"].failed == "less-small is broken"
    assert found["less", "small"].times is None
    assert found["less", "plain"].times
    asked.broken = set()
    assert measured(tmp_path)["less", "small"].delta_nll == pytest.approx(0.15)
    asked.broken = {"dense-plain"}
    with pytest.raises(EngineFailed):
        measured(tmp_path / "other")


def test_plans_are_measured_in_the_types_that_were_asked_for(asked, tmp_path):
    """The plain weights that a type is made of are neither scored nor timed, and don't
    stay.
    """
    models = subjects(EngineModel("other", "n", Plan(), OWN))
    about = Provenance(what={"model": "m"})
    found = measure_pareto(
        Fake(1), models, ("small",), Workload(4, 2, rounds=1), tmp_path, about
    )
    assert [(one.model, one.type) for one in found] == [
        ("dense", "plain"),
        ("dense", "small"),
        ("less", "small"),
        ("other", "small"),
    ]
    assert {name for question, name in asked if question != "quantise"} == {
        "dense-plain",
        "dense-small",
        "less-small",
        "other-small",
    }
    held = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert held == [
        "dense-plain",
        "dense-small",
        "less-small",
        "other-small",
        "written.jsonl",
    ]
    assert found[2].delta_nll == pytest.approx(0.15)


def test_a_plain_checkpoint_is_written_once_for_all_types(asked, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(
        pareto,
        "write_plain",
        lambda *given, **how: written.append(given[3].name) or write_text(*given),
    )
    monkeypatch.setattr(Fake, "types", ("plain", "small", "smaller"))
    for name in ("dense", "less"):
        monkeypatch.setitem(ANSWERS, f"{name}-smaller", (1.5, 4.0))
    about = Provenance(what={"model": "m"})
    measure_pareto(
        Fake(1),
        subjects(),
        ("small", "smaller"),
        Workload(4, 2, rounds=1),
        tmp_path,
        about,
    )
    assert written == ["dense-plain", "less-plain"]


def test_what_does_not_answer_as_the_skipped_model_is_not_scored(
    asked, monkeypatch, tmp_path
):
    def write(engine, spec, plan, *rest, **loading):
        if plan:
            raise NotAsSkipped("fake answers differently from the skipped model")
        write_text(engine, spec, plan, *rest, **loading)

    monkeypatch.setattr(pareto, "write_plain", write)
    found = measured(tmp_path)
    assert found["less", "plain"].failed == found["less", "small"].failed
    assert (
        found["less", "plain"].failed
        == "fake answers differently from the skipped model"
    )
    assert not any(name.startswith("less") for _, name in asked)
    assert found["dense", "small"].times


@pytest.mark.slow
@needs_llamacpp
def test_a_plain_file_is_verified_before_it_is_measured(dense, monkeypatch, tmp_path):
    """Trap: rows of queries and keys in another order, and what no engine of the export
    has run.
    """
    model, _ = load(dense, dtype="float32", device="cpu")
    queries = {
        name: torch.randn_like(one)
        for name, one in model.named_parameters()
        if "q_proj" in name
    }
    changed = RepairedPlan.of(MIXED, weights=queries)
    write_plain(LlamaCpp(1), Source(dense), changed, tmp_path / "right.gguf")
    monkeypatch.setattr(gguf_layout, "ROTATES_NEIGHBOURS", set())
    with pytest.raises(
        NotAsSkipped, match="answers differently from the skipped model"
    ):
        write_plain(LlamaCpp(1), Source(dense), changed, tmp_path / "wrong.gguf")
    monkeypatch.undo()
    monkeypatch.setattr(exporters_gguf.GGUFExport, "_gaps", unreadable)
    with pytest.raises(
        EngineFailed,
        match="not compared with the skipped model: transformers has no mumble",
    ):
        write_plain(LlamaCpp(1), Source(dense), MIXED, tmp_path / "unseen.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["right.gguf"]


def unreadable(*_):
    raise UnknownArchitecture("transformers has no mumble")


def test_an_export_that_was_not_verified_is_refused(dense, tmp_path):
    out = export(dense, Plan([1], [1]), "gguf", tmp_path / "unseen", verify=False)
    for spec in (out, next(out.glob("*.gguf"))):
        with pytest.raises(
            UsageError,
            match=(
                r"not compared with the skipped model: .*--no-verify.*: export it again"
            ),
        ):
            check_verified(spec)
    check_verified(dense)
    if LlamaCpp(1).is_installed():
        check_verified(export(dense, Plan([1], [1]), "gguf", tmp_path / "seen"))


def test_a_folder_of_other_work_is_refused(asked, tmp_path):
    measured(tmp_path, text="prose")
    with pytest.raises(UsageError, match="results with text"):
        measured(tmp_path, text="book")
    with pytest.raises(UsageError, match="results with subject"):
        measured(tmp_path, text="prose", plan=Plan(mlp=[1]))
    with pytest.raises(UsageError, match="two of the models are called less"):
        measured(tmp_path / "twice", EngineModel("less", "n", Plan(), OWN))
    with pytest.raises(UsageError, match="give --rounds 1 or more"):
        measured(tmp_path / "none", rounds=0)


def test_another_revision_is_what_is_written_too(asked, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(
        pareto,
        "write_plain",
        lambda engine, source, *given: (
            written.append(source) or write_text(engine, source, *given)
        ),
    )
    dense = EngineModel(
        "dense", "m", Plan(), OWN, revision="v2", trust_remote_code=True
    )
    measure_pareto(
        Fake(1),
        [dense],
        ("plain",),
        Workload(4, 2, rounds=1),
        tmp_path,
        Provenance(what={}),
    )
    assert written == [Source("m", revision="v2", trust_remote_code=True)]


def test_what_is_quantised_already_is_measured_as_it_is_stored(
    asked, monkeypatch, tmp_path
):
    stored = []
    monkeypatch.setattr(
        pareto,
        "write_plain",
        lambda *given, **how: stored.append(given[4]) or write_text(*given),
    )
    monkeypatch.setitem(ANSWERS, "four-gptq-4-bit", (1.3, 6.0))
    found = measured(
        tmp_path, EngineModel("four", "n", Plan(), OWN, stored="gptq 4-bit")
    )
    assert [kind for model, kind in found if model == "four"] == ["gptq 4-bit"]
    assert found["four", "gptq 4-bit"].delta_nll == pytest.approx(0.3)
    assert stored == [False, False, True]
    assert [question for question, _ in asked].count("quantise") == 2  # of the others


def test_other_tokens_are_compared_by_bits_per_byte(asked, tmp_path):
    found = measured(tmp_path, EngineModel("other", "n", Plan(), OTHERS))
    other = found["other", "plain"]
    assert math.isnan(other.delta_nll)
    assert other.line()["delta_nll"] is None
    assert other.bits_per_byte == pytest.approx((3 / 6 + 3 / 10) / 2 / math.log(2))
    assert other.delta_bits == pytest.approx((1 / 6 + 1 / 10) / 2 / math.log(2))
    assert "bits per byte" in sentence([*found.values()])


def test_the_sentence_says_what_to_take(asked, tmp_path):
    records = [*measured(tmp_path).values()]
    assert (
        sentence(records)
        == "What to take to decode so many times as fast as dense, plain: 1.00 times,"
        " dense, plain (+0.000 nats, 100 B); 1.11 times, less, plain (+0.100 nats,"
        " 99 B); 2.00 times, less, small (+0.150 nats, 50 B). Leaving sublayers out"
        " pays from 1.11 times on. That is of 3 rounds and 2 windows of text, too"
        " few to judge by: give --rounds 5 and --held-out-sequences 8 or more."
    )

    def of(rounds, windows):
        return sentence(
            [
                record.model_copy(update={"rounds": rounds, "windows": windows})
                for record in records
            ]
        )

    assert "too few" not in of(5, 8)
    assert "of 4 rounds, too few" in of(4, 8)
    assert "of 1 round and 1 window of text, too" in of(1, 1)
    alone = [record for record in records if record.model == "dense"]
    assert "Leaving sublayers out is nowhere on this front" in sentence(alone)
    assert [record.type for record in pareto_front(alone)] == ["plain", "small"]


@pytest.mark.slow
def test_the_table_the_figure_and_the_page_show_each_model(asked, tmp_path):
    asked.broken = {"less-plain"}
    measured(tmp_path)
    asked.broken = set()
    records = [*measured(tmp_path).values()]
    write_pareto(records, tmp_path, "a title")
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(sentence(records))
    assert table.count("| less |") == 2
    assert "| dense | small |" in table
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    folder = read_folder(tmp_path)
    assert [record.model for record in folder.of(ParetoRecord)] == [
        "dense",
        "dense",
        "less",
        "less",
    ]
    page = render(folder)
    assert "Skipping beside quantising" in page
    assert "Loss against decode speedup in the engine" in page
    shown = shown_pareto(folder)
    (section,) = shown.sections
    assert len(section.figures) == 1
    assert len(section.table.rows) == 4
    assert shown.message.sentence == sentence(folder.of(ParetoRecord))
    assert shown.message.command.startswith("notall pareto ")
    assert shown.message.command.endswith(
        f" --out {tmp_path} --speedups 1.1,1.2,1.3,1.5"
    )


@pytest.mark.parametrize(
    ("given", "following"),
    [
        ("pareto m -o out", "pareto m -o out --speedups 1.1,1.2,1.3,1.5"),
        (
            "pareto m --speedups 1.2,1.5 --text a.txt",
            "pareto m --speedups 1.2,1.5 --text a.txt --speedups 1.3,1.5",
        ),
        (
            "pareto m --speedups=1.4 --rounds 7",
            "pareto m --speedups=1.4 --rounds 7 --speedups 1.3,1.5",
        ),
        (
            "pareto m --skip mlp:4 --text 'a b.txt'",
            "pareto m --skip mlp:4 --text 'a b.txt' --speedups 1.3,1.5",
        ),
        ("pareto m --plan=plan.json", "pareto m --plan=plan.json --speedups 1.3,1.5"),
    ],
)
def test_the_next_command_is_the_one_that_was_given_with_more_speedups(
    asked, tmp_path, given, following
):
    measured(tmp_path, command=f"notall {given}")
    assert shown_pareto(read_folder(tmp_path)).message.command == f"notall {following}"


# --- the command
# --------------------------------------------------------------------------------------


SMALL = [
    *(
        "--sequences",
        "6",
        "--held-out-sequences",
        "2",
        "--length",
        "32",
        "--rounds",
        "1",
        "--prompt-tokens",
        "8",
    ),
    *("--generation-tokens", "2", "--threads", "1", "--dtype", "float32", "--json"),
]


@pytest.mark.slow
@needs_llamacpp
def test_the_command_measures_plans_as_they_are_and_repaired(dense, run, tmp_path):
    words = [
        "pareto",
        dense,
        "--skip",
        "attention:1",
        "--types",
        "Q8_0",
        "--out",
        tmp_path / "out",
        *SMALL,
    ]
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(out)["pareto"]
    assert [(one["model"], one["repaired"], one["type"]) for one in found] == [
        ("dense", False, "F16"),  # what the others are compared with
        ("dense", False, "Q8_0"),
        ("less 1 attention", False, "Q8_0"),
        ("less 1 attention", True, "Q8_0"),
    ]
    assert len({one["nll"] for one in found}) == 4
    names = (
        "dense-F16",
        "dense-Q8_0",
        "less-1-attention-Q8_0",
        "less-1-attention-repaired-Q8_0",
    )
    assert sorted(
        file.name for file in (tmp_path / "out" / "checkpoints").glob("*.gguf")
    ) == [f"{one}.gguf" for one in names]
    assert run(*words)[1] == out
    code, _, err = run(*words, "--held-out-sequences", "3")
    assert (code, "results with held_out_sequences 2, not 3" in err) == (2, True)
    told = run(*words[: -len(SMALL)], *SMALL[:-1])[1]  # without --json
    folder = tmp_path / "out"
    assert f"Next: notall report {folder} -o {folder / 'report.html'}" in " ".join(
        told.split()
    )


@pytest.mark.slow
@needs_llamacpp
def test_the_mix_is_not_written_where_nothing_is_fitted(
    dense, run, monkeypatch, tmp_path
):
    """A repaired plan with evaluation data of its own needs no calibration data."""
    monkeypatch.setattr(
        texts_mix, "text_of", lambda *given, **_: reads_all_but_the_mix(*given)
    )
    (tmp_path / "held.txt").write_text(
        "the quick brown fox jumps over the other one. " * 40
    )
    LESS.save(tmp_path / "less.json")
    words = [
        "pareto",
        dense,
        "--plan",
        tmp_path / "less.json",
        "--repair",
        "none",
        "--types",
        "Q8_0",
    ]
    words += [
        "--held-out",
        tmp_path / "held.txt",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--sequences",
        "2",
    ]
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(out)["pareto"]
    assert [(one["model"], one["type"]) for one in found] == [
        ("dense", "F16"),
        ("dense", "Q8_0"),
        ("less", "Q8_0"),
    ]
    assert found[0]["windows"] == 2


def reads_all_but_the_mix(model, tokenizer, source, *_):
    assert source != "mix", "the mix is written"
    return read_text(source)


@needs_llamacpp
@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(
            ["--engine", "vllm"],
            "vllm is not installed: install it and notall in an environment of"
            " their own",
            marks=pytest.mark.skipif(
                find_spec("vllm") is not None, reason="vLLM is installed"
            ),
        ),
        (["--skip", "attention:few"], "--skip attention:few is no kind and number"),
        (["--speedups", "few"], "--speedups few: 'few' is no number"),
        (["--speedups", "1.1,few"], "--speedups 1.1,few: 'few' is no number"),
        (["--sequences", "2"], "--sequences 2 is too few"),
        (
            ["--concurrency", "2"],
            "engines are timed on one sequence: leave --concurrency at 1",
        ),
        (["--types", "Q3"], "llama.cpp has no type 'Q3'"),
        (
            ["--plan", "a/plan.json", "--plan", "b/plan.json"],
            "two of the plans have the same name",
        ),
    ],
)
def test_what_the_command_refuses(dense, words, said, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        LESS.save(Path(folder) / "plan.json")
    code, _, err = run("pareto", dense, *SMALL, *words)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_plans_are_called_as_their_files_and_published_ones_by_their_whole_names(
    tmp_path,
):
    LESS.save(tmp_path / "less 1.5x.json")
    names = [f"qwen2.5-coder-1.5b-block-{count}-by-mix" for count in (1, 2)]
    files = [
        *(Path(f"published:{name}") for name in names),
        tmp_path / "less 1.5x.json",
    ]
    assert [*ParetoPlans(plan=tuple(files)).given()] == [*names, "less 1.5x"]


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/less-plain"])
def test_a_link_among_the_checkpoints_is_not_followed(asked, linked, tmp_path):
    measured(tmp_path / "out", rounds=1)
    shutil.move(tmp_path / "out" / linked, tmp_path / "elsewhere")
    (tmp_path / "out" / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UsageError, match=r"is a link, or holds one: .* choose a new --out"
    ):
        measured(tmp_path / "out", rounds=2)
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("runs", [True, False])
def test_code_beside_a_checkpoint_is_looked_at_where_the_engine_runs_it(
    asked, runs, monkeypatch, tmp_path
):
    looked = []
    monkeypatch.setattr(Fake, "runs_code", lambda self, checkpoint: runs)
    monkeypatch.setattr(
        remote_code, "check_code", lambda folder: looked.append(folder.name)
    )
    measured(tmp_path / "out", rounds=1)
    assert set(looked) == (
        {"dense-plain", "dense-small", "less-plain", "less-small"} if runs else set()
    )


@pytest.mark.parametrize(
    ("model_type", "runs"),
    [("llama", False), ("notall_llama", False), ("notall_smollm3", True)],
)
def test_vllm_runs_the_code_of_layers_that_it_has_no_class_for(
    model_type, runs, tmp_path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert VLLM(1).runs_code(tmp_path) is runs
    assert not Transformers(1).runs_code(tmp_path)
