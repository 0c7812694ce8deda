"""Choosing and measuring on hybrids: the kinds of their mixers, layers of one sublayer,
and what must stay.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from api import (
    CRITERIA,
    Evaluator,
    Replay,
    Setting,
    Space,
    _alike,
    _half,
    by_count,
    choose,
    cli,
    deepest,
    footprint,
    may_lose_retrieval,
    nll,
    quadratic_measure as measure,
    verdict_module,
)
from families import TRANSFORMERS_5, family, replayed_logits, silenced
from notall import Plan, UsageError, locate, repair
from test_architectures import prompt
from test_repairing import SMALL as SMALL_TEXT, check_against_replay
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="hybrids are located from transformers 5 on"
)

NAMES = ["qwen3_next", "nemotron_h", "mamba2", "falcon_h1", "lfm2", "granitemoehybrid"]


@pytest.fixture(scope="module", params=NAMES)
def hybrid(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return family(request.param), family(request.param).build()


@torch.no_grad()
def test_replay_is_what_hooks_leave(hybrid) -> None:
    found, model = hybrid
    structure, tokens = locate(model), prompt(False)[0]
    counting = sorted(structure.counting)
    mlps = [part.index for part in structure.sublayers if part.kind == "mlp"]
    plans = [Plan(), Plan(counting[1:]), Plan([counting[0]], mlps[:1]), Plan([], mlps)]
    answers = dict(replayed_logits(Replay(model, plans), input_ids=tokens))
    for number, plan in enumerate(plans):
        with silenced(model, found, plan.attention, plan.mlp):
            expected = model(tokens, use_cache=False).logits
        assert (
            answers[number] - expected
        ).abs().max() <= 1e-5 * expected.abs().max(), plan


def test_sizes_are_those_of_what_is_kept(hybrid) -> None:
    _, model = hybrid
    structure = locate(model)
    plan = Plan(sorted(structure.counting)[1:])
    kept = [
        part
        for part in structure.sublayers
        if part.index not in getattr(plan, part.kind)
    ]
    assert footprint(model, plan).kv_bytes_per_token == sum(
        part.kv_bytes_per_token for part in kept
    )
    states = sum(part.state_bytes for part in kept)
    assert footprint(model, plan).state_bytes == (
        states if any(p.state_bytes for p in structure.sublayers) else None
    )


def test_a_space_of_each_kind_of_mixer_holds_these_alone(hybrid) -> None:
    _, model = hybrid
    structure = locate(model)
    for kind in structure.mixers:
        names = Space(structure, kind).names
        assert names == tuple(
            part.name for part in structure.sublayers if part.mixer == kind
        )
    with pytest.raises(UsageError, match=f"{structure.mixers[0]}"):
        Space(structure, "linear")


@pytest.mark.parametrize("criterion", ["search", "greedy", "cosine", "quadratic"])
def test_one_attention_that_counts_tokens_is_always_left(hybrid, criterion) -> None:
    _, model = hybrid
    space = Space(locate(model), "attention")
    most = len(space.units) - 1
    batches = [prompt(False)[0]]
    setting = Setting(model, space, batches, Evaluator(model, nll(batches)))
    chosen = choose(criterion, setting, by_count(space, most))
    assert len(chosen.skipped) == most
    space.plan(chosen.skipped).check(space.structure)
    with pytest.raises(UsageError, match=f"at most {most}"):
        by_count(space, most + 1)


def test_the_least_sum_leaves_an_attention_where_every_pair_is_allowed() -> None:
    model = family("falcon_h1").build()
    space = Space(locate(model))
    setting = Setting(
        model, space, [prompt(False)[0]], Evaluator(model, nll([prompt(False)[0]]))
    )
    program = measure(setting, space.units)
    chosen = program.solve(
        program.limited + 1e-3, len(space.structure.counting) - 1, 99
    )
    assert chosen is not None
    assert (
        program.solve(program.limited + 1e-3, len(space.structure.counting), 99) is None
    )


def test_layers_of_one_sublayer_go_one_by_one_and_every_set_is_portable() -> None:
    space = Space(locate(family("nemotron_h").build()), portable=True)
    assert space.moves(frozenset()) == [(name,) for name in space.names]
    assert Space(space.structure, "block").units == tuple(
        (name,) for name in space.names
    )
    assert Space(space.structure, "attention", portable=True).names


def test_the_deepest_are_of_the_layers_that_have_them() -> None:
    structure = locate(
        family("nemotron_h").build()
    )  # a mixer in layers 0, 1, 3 and 5, an MLP in 2 and 4
    assert deepest(structure, "attention", 0.5).attention == (3, 5)
    assert deepest(structure, "attention", 0.5).note == "deepest 2 of 4 attentions"
    assert deepest(structure, "attention", 0.5, keep_last=True).attention == (1, 3)
    assert deepest(structure, "mlp", 0.5).mlp == (4,)
    assert deepest(structure, "block", 0.5).indices == {"attention": [3, 5], "mlp": [4]}


def test_mixers_of_two_kinds_are_timed_apart() -> None:
    model = family("qwen3_next").build()
    groups = _alike(model)
    assert {part.mixer for part in groups[0]} == {"linear_attention"}
    assert all(len({part.mixer for part in group}) == 1 for group in groups)
    full = next(group for group in groups if group[0].mixer == "full_attention")
    assert _half([full[0]], locate(model)).attention == (full[0].index,)
    assert _half(full[::-1] + full, locate(model)).attention != tuple(
        part.index for part in full
    )


@pytest.mark.parametrize(
    "name", ["qwen3_next", "nemotron_h", "mamba2", "lfm2", "falcon_h1"]
)
@torch.no_grad()
def test_what_is_kept_is_refit_nearer_to_the_dense_stream(name) -> None:
    model = family(name).build()
    attentions = sorted(locate(model).counting)
    plan = Plan(attentions[:1])
    found = repair(model, plan, SMALL_TEXT)
    assert any(refit.ridge is not None for refit in found.refits)
    check_against_replay(model, plan, found)


def test_a_criterion_says_which_models_it_fits() -> None:
    gate_norm = CRITERIA["gate-norm"]
    assert gate_norm.fits(family("llama").build())
    assert not gate_norm.fits(family("qwen3_next").build())
    assert not gate_norm.fits(family("gpt2").build())
    assert CRITERIA["search"].fits(family("qwen3_next").build())


def test_what_may_lose_a_fact_far_back() -> None:
    qwen, falcon, mamba = (
        locate(family(name).build()) for name in ("qwen3_next", "falcon_h1", "mamba2")
    )
    assert may_lose_retrieval(qwen, Plan([1]))
    assert not may_lose_retrieval(qwen, Plan([0, 2], [1]))
    assert not may_lose_retrieval(
        falcon, Plan([1])
    )  # all of its mixers hold keys and values
    assert not may_lose_retrieval(mamba, Plan([1]))  # it has none


# --- at the command line
# --------------------------------------------------------------------------------------

SMALL = ["--sequences", "2", "--length", "24", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("hybrid")
    (place / "text.txt").write_text(
        "The river runs under the old bridge, and a green bird sings. " * 60
    )
    save_tiny_checkpoint(place / "model", of="qwen3_next", max_position_embeddings=2048)
    return place


def run(capsys, *words: object) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["notall", *map(str, words)])
        with contextlib.suppress(SystemExit):
            cli.main()
    said = capsys.readouterr()
    assert "error:" not in said.err, said.err
    return said.out


def test_inspect_and_plan_tell_kinds_and_states(folder, tmp_path, capsys) -> None:
    rows = json.loads(run(capsys, "inspect", folder / "model", "--json"))["sublayers"]
    assert [row["mixer"] for row in rows if row["kind"] == "attention"] == [
        "linear_attention",
        "full_attention",
    ] * 2
    assert [bool(row["state_bytes"]) for row in rows[:4]] == [True, False, False, False]
    assert "bytes of states" in run(capsys, "inspect", folder / "model")
    asked = ["--skip", "attention", "-o", tmp_path / "plan.json", "--json"]
    sizes = [
        one["footprint"]
        for one in json.loads(run(capsys, "plan", folder / "model", *asked))["plan"]
    ]
    assert sizes[0]["state_bytes"] == sizes[1]["state_bytes"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("short_prose")
def test_a_sweep_a_search_an_export_and_a_report(folder, tmp_path, capsys) -> None:
    text, out = ["--text", folder / "text.txt", *SMALL], tmp_path / "out"
    run(
        capsys,
        "sweep",
        folder / "model",
        *text,
        "--prompt-tokens",
        "4",
        "--generation-tokens",
        "2",
        "--rounds",
        "1",
        "--out",
        out,
    )
    assert len((out / "results.jsonl").read_text().splitlines()) == 19
    run(capsys, "report", out, "-o", out / "page.html")
    page = (out / "page.html").read_text()
    assert "states" in page
    assert "linear_attention" in page
    mixers = {
        row["mixer"]
        for row in map(json.loads, (out / "similarity.jsonl").read_text().splitlines())
    }
    assert mixers == {"linear_attention", "full_attention", None}
    plan = tmp_path / "plan.json"
    search = ["search", folder / "model", *text, "-o", plan, "--json"]
    found = json.loads(run(capsys, *search, "--skip", "full_attention:1"))
    assert [row["task"] for row in found["tasks"]] == [
        "passkey_256",
        "passkey_512",
        "passkey_1024",
    ]
    assert set(Plan.load(plan).attention) < {1, 3}
    found = json.loads(run(capsys, *search, "--skip", "portable:2"))
    assert isinstance(found, list) == (
        not {1, 3}.intersection(Plan.load(plan).attention)
    )
    export = [
        "export",
        folder / "model",
        "--plan",
        plan,
        "--to",
        "hf",
        "--out",
        tmp_path / "cut",
        "--json",
    ]
    said = json.loads(run(capsys, *export))
    assert "answers as the skipped model" in said["check"]
    assert (
        len(json.loads(run(capsys, "inspect", tmp_path / "cut", "--json"))["sublayers"])
        == 6
    )


# --- periods
# --------------------------------------------------------------------------------------

LONG = {
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
}


def test_a_period_is_as_many_layers_as_it_takes_until_the_kinds_come_again() -> None:
    assert locate(family("qwen3_next").build(**LONG)).period == 4
    assert locate(family("llama").build()).period == 1
    assert locate(family("nemotron_h").build()).period == 0


def test_periods_are_runs_from_any_layer_that_leave_the_kinds_in_their_order() -> None:
    structure = locate(family("qwen3_next").build(**LONG))
    space = Space(structure, "period")
    assert [(unit[0], unit[-1]) for unit in space.units] == [
        (f"attn.{i}", f"mlp.{i + 3}") for i in range(5)
    ]
    for unit in space.units:
        left = [
            part.mixer
            for part in structure.sublayers
            if part.mixer and part.name not in unit
        ]
        assert left == ["linear_attention"] * 3 + ["full_attention"]
        assert (
            space.moves(frozenset(unit)) == []
        )  # one attention with keys and values stays
        assert space.returns(frozenset(unit)) == [unit]
    assert by_count(space, 0.5).target == 1
    assert by_count(space, 1).met(space.units[2])
    assert not by_count(space, 1).met(space.units[2][1:])


def test_what_is_given_back_leaves_whole_periods() -> None:
    types = (["linear_attention"] * 3 + ["full_attention"]) * 3
    space = Space(
        locate(family("qwen3_next").build(num_hidden_layers=12, layer_types=types)),
        "period",
    )
    both = frozenset(space.units[0] + space.units[4])  # layers 0 to 7
    assert space.returns(both) == [
        space.units[0],
        space.units[4],
    ]  # and none from between, which would leave LF LL LF
    assert not space.allows(both.difference(space.units[2]))


@pytest.mark.parametrize(
    "name", [name for name, one in CRITERIA.items() if "period" in one.kinds]
)
def test_every_criterion_chooses_a_period(name: str) -> None:
    model = family("qwen3_next").build(**LONG)
    if not CRITERIA[name].fits(model):
        pytest.skip("asks for other layers")
    batches = [prompt(False)[0]]
    asked = Setting(
        model, Space(locate(model), "period"), batches, Evaluator(model, nll(batches))
    )
    plan = asked.space.plan(choose(name, asked, by_count(asked.space, 1)).skipped)
    assert len(plan.blocks) == 4
    assert plan.blocks == tuple(range(plan.blocks[0], plan.blocks[0] + 4))


def test_a_period_scores_what_its_blocks_do() -> None:
    model, batches = family("qwen3_next").build(**LONG), [prompt(False)[0]]
    scores = {}
    for kind in ("block", "period"):
        asked = Setting(
            model, Space(locate(model), kind), batches, Evaluator(model, nll(batches))
        )
        scores[kind] = CRITERIA["cosine"].scores(asked)
    blocks = [*scores["block"].values()]
    assert [*scores["period"].values()] == pytest.approx(
        [sum(blocks[i : i + 4]) for i in range(5)]
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [("llama", "are all alike"), ("nemotron_h", "do not come again in a period")],
)
def test_there_are_no_periods_where_kinds_do_not_come_again(
    name: str, why: str
) -> None:
    with pytest.raises(
        UsageError, match=f"the layers of {name} {why}: choose among blocks"
    ):
        Space(locate(family(name).build()), "period")


@pytest.mark.slow
def test_an_export_says_that_it_breaks_the_period(tmp_path: Path, capsys) -> None:
    model = save_tiny_checkpoint(tmp_path / "m", of="qwen3_next", **LONG)
    for name, blocks in (("whole", [1, 2, 3, 4]), ("broken", [2])):
        plan, out = tmp_path / f"{name}.json", tmp_path / name
        Plan(blocks, blocks).save(plan)
        said = run(capsys, "export", model, "--plan", plan, "--to", "hf", "--out", out)
        assert ("no longer come again every 4 layers" in said) == (name == "broken")
        assert json.loads((out / "notall.json").read_text()).get("breaks_period") == (
            4 if name == "broken" else None
        )


# --- layers that stay in place
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("usable", [True, False])
def test_what_to_do_next_with_a_plan_of_layers_in_place_is_neither_an_export_nor_a_repair(
    usable: bool, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(verdict_module, "is_usable", lambda _: usable)
    model = save_tiny_checkpoint(
        tmp_path / "m", of="gemma4_text", vocab_size_per_layer_input=259
    )
    (tmp_path / "text.txt").write_text(
        "The river runs under the old bridge, and a green bird sings. " * 60
    )
    plan, text = tmp_path / "plan.json", ["--text", tmp_path / "text.txt", *SMALL]
    said = run(capsys, "search", model, *text, "--skip", "attention:1", "-o", plan)
    assert f"notall bench {model} --plan {plan}" in said
    assert f"notall bench {model} --plan {plan}" in run(
        capsys, "eval", model, *text, "--plan", plan
    )


@pytest.mark.slow
def test_a_sweep_of_layers_in_place_compares_their_layers(
    tmp_path: Path, capsys
) -> None:
    model = save_tiny_checkpoint(
        tmp_path / "m", of="gemma4_text", vocab_size_per_layer_input=259
    )
    (tmp_path / "text.txt").write_text(
        "The river runs under the old bridge, and a green bird sings. " * 60
    )
    out, text = tmp_path / "out", ["--text", tmp_path / "text.txt", *SMALL]
    run(
        capsys,
        "sweep",
        model,
        *text,
        "--prompt-tokens",
        "4",
        "--generation-tokens",
        "2",
        "--rounds",
        "1",
        "--out",
        out,
    )
    rows = [
        json.loads(line) for line in (out / "similarity.jsonl").read_text().splitlines()
    ]
    assert [(row["layer"], row["kind"]) for row in rows][:4] == [
        (0, "block"),
        (0, "attention"),
        (0, "mlp"),
        (1, "block"),
    ]
