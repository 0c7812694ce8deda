"""The published repairs: each formula against a slow, obvious twin in float64, and maps
against hooks made by hand.
"""

import json
from contextlib import ExitStack

import pytest
import torch

from api import (
    METHODS,
    AskedChoice,
    CalibratedObjective,
    CompareOptions,
    ComparisonRecord,
    LinearMap,
    Measuring,
    Provenance,
    RepairedPlan,
    Replay,
    ScoresRecord,
    Space,
    compare_criteria,
    comparison_points,
    comparison_table,
    driver_Subject as Subject,
    evaluate,
    gaps_of,
    ghosted,
    kept_repair,
    methods,
    methods_cached,
    nbl,
    nll,
    prune_and_comp,
    quality,
    read,
    repaired_with_weights as with_weights,
    replaceme,
    streams as streams_module,
)
from families import family, replayed_logits
from notall import Plan, UsageError, export, locate, remove, skip

BATCHES = list((torch.arange(12 * 40).view(12, 40) * 7 % 89 + 3).split(4))
HELD_OUT = list((torch.arange(4 * 12).view(4, 12) * 11 % 89 + 3).split(2))
BLOCK, MIXED = Plan([2], [2]), Plan([1, 3], [1, 2])


def build():
    """Norms of next to no epsilon, so that the scale of the stream does not matter."""
    sizes = {
        "num_hidden_layers": 5,
        "rms_norm_eps": 1e-12,
        "tie_word_embeddings": False,
    }
    return (
        family("llama").build("sdpa", **sizes).double()
    )  # eager attention takes the softmax in float32


@pytest.fixture(scope="module")
def model():
    return build()


def streams(model):
    """The dense stream before each sublayer and at the end, (tokens, hidden), by hooks
    on what transformers names.
    """
    seen = {}
    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            for name, module in (
                (f"attn.{index}", layer.input_layernorm),
                (f"mlp.{index}", layer.post_attention_layernorm),
            ):
                handle = module.register_forward_pre_hook(
                    lambda _, args, name=name: seen.setdefault(name, []).append(
                        args[0].flatten(0, 1)
                    )
                )
                stack.callback(handle.remove)
        handle = model.model.norm.register_forward_pre_hook(
            lambda _, args: seen.setdefault("end", []).append(args[0].flatten(0, 1))
        )
        stack.callback(handle.remove)
        with torch.no_grad():
            for batch in BATCHES:
                model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def by_hand(model, plan, tokens, edges=None):
    """Logits where each skipped sublayer adds nothing, or what `edges` says of the
    stream before it.
    """
    edges = edges or {}
    with ExitStack() as stack:
        for kind, name in (("attention", "attn"), ("mlp", "mlp")):
            for index in getattr(plan, kind):
                layer, held = model.model.layers[index], []
                norm = (
                    layer.input_layernorm
                    if kind == "attention"
                    else layer.post_attention_layernorm
                )
                module = layer.self_attn if kind == "attention" else layer.mlp
                edge = edges.get(f"{name}.{index}", lambda h: torch.zeros_like(h))
                handle = norm.register_forward_pre_hook(
                    lambda _, args, held=held: held.append(args[0])
                )
                stack.callback(handle.remove)

                def answer(_, args, given, held=held, edge=edge):
                    added = edge(held[-1])
                    return (added, *given[1:]) if isinstance(given, tuple) else added

                stack.callback(module.register_forward_hook(answer).remove)
        with torch.no_grad():
            return model(tokens).logits


def logits(model, plan, tokens):
    ((_, found),) = replayed_logits(Replay(model, [plan]), input_ids=tokens)
    return found


def test_replaceme_is_its_formula(model):
    """T = (M'M)^-1 M'(h_n + M - h_i), as the paper writes it; then T'W is the new
    weight.
    """
    repaired, seen = replaceme(model, BLOCK, BATCHES), streams(model)
    h_i, h_n = seen["attn.2"], seen["attn.3"]
    m = h_i - seen["mlp.1"]
    t = torch.linalg.inv(m.T @ m) @ m.T @ (h_n + m - h_i)
    path = "model.layers.1.mlp.down_proj.weight"
    assert repaired.weights.keys() == {path}
    torch.testing.assert_close(
        repaired.weights[path], t.T @ model.get_parameter(path), rtol=1e-6, atol=1e-8
    )
    assert not repaired.added_bytes


def test_replaceme_folds_over_gaps_of_sublayers(model):
    """Before attn.1 stands mlp.0; before mlp.2, attn.2; each gap is measured on the
    original model.
    """
    repaired, seen = replaceme(model, MIXED, BATCHES), streams(model)
    assert repaired.weights.keys() == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    }
    m = seen["mlp.2"] - seen["attn.2"]
    t = torch.linalg.lstsq(m, seen["mlp.3"] - seen["attn.2"]).solution
    path = "model.layers.2.self_attn.o_proj.weight"
    torch.testing.assert_close(
        repaired.weights[path], t.T @ model.get_parameter(path), rtol=1e-6, atol=1e-8
    )


def test_replaceme_finds_a_gap_that_is_linear_in_what_is_before_it(model):
    """A gap that adds nothing leaves the weight; one that adds M A doubles back to W +
    A'W. Biases go along.
    """
    biased = family("gpt2").build("sdpa").double()
    for net, last, gap in (
        (model, "model.layers.1.mlp.down_proj", [2]),
        (biased, "transformer.h.1.mlp.c_proj", [2]),
    ):
        with torch.no_grad(), ExitStack() as stack:
            silent = net.get_submodule(last.rsplit(".", 3)[0])[2]
            writers = (
                ["self_attn.o_proj", "mlp.down_proj"]
                if net is model
                else ["attn.c_proj", "mlp.c_proj"]
            )
            for parameter in (
                p for name in writers for p in silent.get_submodule(name).parameters()
            ):
                stack.callback(parameter.copy_, parameter.clone())
                parameter.zero_()
            repaired = replaceme(net, Plan(gap, gap), BATCHES)
            for name in ("weight", *(["bias"] if net is biased else [])):
                torch.testing.assert_close(
                    repaired.weights[f"{last}.{name}"],
                    net.get_parameter(f"{last}.{name}").data,
                    rtol=1e-6,
                    atol=1e-7,
                )


def test_a_linear_gap_is_closed_without_a_trace(model, monkeypatch):
    """Where the gap adds A M exactly, the new weight is (I + A) W, as one computes by
    hand.
    """
    a = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)).double() / 10
    seen = streams(model)
    m, before = seen["attn.2"] - seen["mlp.1"], seen["mlp.1"]
    real = streams_module.DenseStream.before

    def linear(self, *places):
        found = real(self, *places)
        return [
            found[0],
            [(before + m + m @ a.T).view(12, 40, 32)[i : i + 4] for i in (0, 4, 8)],
        ]

    monkeypatch.setattr(streams_module.DenseStream, "before", linear)
    path = "model.layers.1.mlp.down_proj.weight"
    new = replaceme(model, BLOCK, BATCHES).weights[path]
    torch.testing.assert_close(
        new, (torch.eye(32) + a) @ model.get_parameter(path), rtol=1e-6, atol=1e-8
    )


def test_a_gap_with_nothing_before_it_stays(model):
    assert not replaceme(model, Plan([0], [0]), BATCHES).weights


def test_nothing_is_folded_through_a_norm():
    net = family("gemma2").build()
    assert not replaceme(net, BLOCK, BATCHES).weights
    with pytest.raises(
        UsageError, match=r"attn\.3 adds to the stream goes through a norm"
    ):
        prune_and_comp(net, BLOCK, BATCHES)


def test_prune_and_comp_is_what_its_paper_scales(model):
    """Its way, gap by gap: embedding, o_proj and down_proj before the gap times the
    ratio of magnitudes.
    """
    repaired = prune_and_comp(model, Plan([1, 3], [1]), BATCHES)
    twin = build()
    closed = []
    for first, last, names in ((2, 4, ["attn.1", "mlp.1"]), (6, 7, ["attn.3"])):
        seen = passed(twin, closed)
        ratio = torch.cat(
            [
                to.abs().mean(1) / at.abs().mean(1)
                for at, to in zip(seen[first], seen[last])
            ]
        ).mean()
        with torch.no_grad():
            twin.model.embed_tokens.weight.mul_(ratio)
            for place in range(first):
                layer = twin.model.layers[place // 2]
                (
                    layer.mlp.down_proj if place % 2 else layer.self_attn.o_proj
                ).weight.mul_(ratio)
        closed += names
    expected = by_hand(twin, Plan([1, 3], [1]), HELD_OUT[0])
    torch.testing.assert_close(
        logits(model, repaired, HELD_OUT[0]), expected, rtol=1e-4, atol=1e-4
    )  # float32 norms
    assert not torch.allclose(
        logits(model, repaired.unrepaired, HELD_OUT[0]), expected, rtol=1e-2
    )
    assert not repaired.added_bytes
    assert "model.embed_tokens.weight" not in repaired.weights


def passed(twin, closed):
    """The stream at each of ten places, a batch each, of a model that skips `closed`
    already.
    """
    places = [[] for _ in range(10)]
    with ExitStack() as stack:
        for index, layer in enumerate(twin.model.layers):
            for place, norm, module, name in (
                (2 * index, layer.input_layernorm, layer.self_attn, f"attn.{index}"),
                (
                    2 * index + 1,
                    layer.post_attention_layernorm,
                    layer.mlp,
                    f"mlp.{index}",
                ),
            ):
                handle = norm.register_forward_pre_hook(
                    lambda _, args, place=place: places[place].append(args[0])
                )
                stack.callback(handle.remove)
                if name in closed:
                    handle = module.register_forward_hook(
                        lambda _, args, given: (
                            (0 * given[0], *given[1:])
                            if isinstance(given, tuple)
                            else 0 * given
                        )
                    )
                    stack.callback(handle.remove)
        with torch.no_grad():
            for batch in BATCHES:
                twin(batch)
    return places


def test_nbl_is_the_linear_minimum_mean_square_estimator(model):
    """W = C_yx C_xx^-1 and b = E y - W E x, from covariances; a block that is skipped
    whole has one map.
    """
    repaired, seen = nbl(model, MIXED, BATCHES), streams(model)
    ends = {
        "attn.1": ("attn.1", "attn.2"),
        "mlp.2": ("mlp.2", "attn.3"),
        "attn.3": ("attn.3", "mlp.3"),
    }
    assert repaired.maps.keys() == ends.keys()
    for name, (first, last) in ends.items():
        x, y = seen[first].T, (seen[last] - seen[first]).T
        both = torch.cov(torch.cat([x, y]))
        w = both[32:, :32] @ torch.linalg.inv(both[:32, :32])
        torch.testing.assert_close(repaired.maps[name].matrix, w, rtol=1e-5, atol=1e-7)
        b = y.mean(1) - w @ x.mean(1)
        torch.testing.assert_close(repaired.maps[name].bias, b, rtol=1e-5, atol=1e-7)
    assert repaired.added_bytes == 3 * (32 * 32 + 32) * 8


def test_ghosted_layers_are_the_pseudoinverse_at_each_cut(model):
    repaired, seen = ghosted(model, MIXED, BATCHES), streams(model)
    ends = {"attn.1": ("attn.1", "attn.2"), "mlp.2": ("mlp.2", "mlp.3")}
    assert repaired.maps.keys() == ends.keys()
    for name, (first, last) in ends.items():
        found = torch.linalg.pinv(seen[first]) @ (seen[last] - seen[first])
        torch.testing.assert_close(
            repaired.maps[name].matrix, found.T, rtol=1e-5, atol=1e-7
        )
        assert repaired.maps[name].bias is None
    assert repaired.added_bytes == 2 * 32 * 32 * 8


def test_a_plan_with_maps_is_a_model_with_hooks(model):
    repaired = nbl(model, MIXED, BATCHES)
    edges = {
        name: lambda h, one=one: h @ one.matrix.T + one.bias
        for name, one in repaired.maps.items()
    }
    expected = by_hand(model, MIXED, HELD_OUT[0], edges)
    torch.testing.assert_close(
        logits(model, repaired, HELD_OUT[0]), expected, rtol=1e-9, atol=1e-9
    )


def test_plans_with_maps_share_only_what_is_the_same(model):
    """All methods together, dense and bare plans among them: each as it is alone; no
    map is counted as a sublayer.
    """
    plans = [
        Plan(),
        MIXED,
        *(one.repair(model, MIXED, BATCHES) for one in METHODS.values()),
        MIXED | BLOCK,
    ]
    together = dict(replayed_logits(Replay(model, plans), input_ids=HELD_OUT[0]))
    for number, plan in enumerate(plans):
        torch.testing.assert_close(together[number], logits(model, plan, HELD_OUT[0]))
    assert len({str(together[number]) for number in range(2, 8)}) == 6
    assert (
        Replay(model, [nbl(model, MIXED, BATCHES)]).executions
        == Replay(model, [MIXED]).executions
    )


def test_weights_and_maps_tell_plans_apart():
    one, other = (
        RepairedPlan.of(BLOCK, maps={"attn.2": LinearMap(torch.eye(2) * n)})
        for n in (1, 2)
    )
    assert one != other
    assert one == RepairedPlan.of(BLOCK, maps={"attn.2": LinearMap(torch.eye(2))})
    assert one != RepairedPlan.of(BLOCK)
    assert (one | Plan([3])).maps == one.maps
    assert (Plan([3]) | one).attention == (2, 3)


def test_a_plan_with_maps_is_refused_where_it_cannot_go(model, tmp_path):
    repaired = ghosted(model, BLOCK, BATCHES)
    with (
        pytest.raises(UsageError, match="keeps matrices at run time") as refused,
        skip(model, repaired),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    with pytest.raises(UsageError, match="keeps matrices at run time"):
        remove(model, repaired)
    for target in ("hf", "nemotron-nas", "gguf"):
        with pytest.raises(UsageError, match="keeps matrices at run time"):
            export(model, repaired, target, tmp_path / target)
    assert not list(tmp_path.iterdir())
    assert evaluate(model, [repaired], HELD_OUT)[0].delta_nll != 0


def test_half_of_a_parallel_block_has_no_gap():
    net = family("phi").build()
    assert [gap.name for gap in gaps_of(locate(net), BLOCK)] == ["attn.2"]
    for name in ("nbl", "ghosted", "prune-and-comp"):
        with pytest.raises(UsageError, match="side by side"):
            METHODS[name].repair(net, Plan([2]), BATCHES)
    repaired = METHODS["nbl"].repair(net, BLOCK, BATCHES)
    assert evaluate(net, [repaired], HELD_OUT)[0].kl >= 0


def test_replaceme_folds_into_the_mlp_of_a_parallel_block():
    net = family("phi").build("sdpa").double()
    repaired = replaceme(net, BLOCK, BATCHES)
    assert repaired.weights.keys() == {
        f"model.layers.1.mlp.fc2.{name}" for name in ("weight", "bias")
    }
    seen = {}
    with torch.no_grad(), ExitStack() as stack:
        for index in (1, 2):
            for name, module in (
                (f"{index}", net.model.layers[index]),
                (f"mlp.{index}", net.model.layers[index].mlp),
            ):
                handle = module.register_forward_hook(
                    lambda _, args, given, name=name: seen.setdefault(name, []).append(
                        (given[0] if isinstance(given, tuple) else given).flatten(0, 1)
                    )
                )
                stack.callback(handle.remove)
        for batch in BATCHES:
            net(batch)
    h_i, h_n, m = (torch.cat(seen[name]) for name in ("1", "2", "mlp.1"))
    t = torch.linalg.lstsq(m, h_n + m - h_i).solution
    fc2 = net.model.layers[1].mlp.fc2
    torch.testing.assert_close(
        repaired.weights["model.layers.1.mlp.fc2.bias"],
        t.T @ fc2.bias,
        rtol=1e-6,
        atol=1e-7,
    )


def test_too_little_text_is_refused(model):
    for name in ("replaceme", "nbl"):
        with pytest.raises(UsageError, match="too short"):
            METHODS[name].repair(model, BLOCK, [torch.full((1, 8), 5)])
    with pytest.raises(UsageError, match="no repair 'luck'"):
        methods.method("luck")


def test_a_repair_is_made_once(model, tmp_path, monkeypatch):
    for name in METHODS:
        made, seconds = kept_repair(tmp_path, name, model, MIXED, BATCHES)
        assert made == METHODS[name].repair(model, MIXED, BATCHES), name
        monkeypatch.setattr(methods_cached, "method", lambda name: None)
        assert kept_repair(tmp_path, name, model, MIXED, BATCHES) == (made, seconds)
        with pytest.raises(AttributeError):
            kept_repair(tmp_path, name, model, MIXED, BATCHES[:2])
        with pytest.raises(AttributeError):
            kept_repair(tmp_path, name, model, BLOCK, BATCHES)
        monkeypatch.undo()
    (damaged,) = tmp_path.glob("nbl-*")
    damaged.write_bytes(b"cut")
    with pytest.raises(UsageError, match="is damaged"):
        kept_repair(tmp_path, "nbl", model, MIXED, BATCHES)


# --- compared
# --------------------------------------------------------------------------------------

ABOUT = Provenance(what={"model": "tiny"})
OBJECTIVES = {"nll": CalibratedObjective(nll(HELD_OUT), HELD_OUT)}


def compared(model, asked, out, **how):
    return compare_criteria(
        Subject(model, None, HELD_OUT, out, ABOUT), asked, OBJECTIVES, Measuring(**how)
    )


@pytest.fixture(scope="module")
def asked(model):
    return [
        AskedChoice(name, "nll", Space(locate(model), "attention"), 2)
        for name in ("deepest", "shallowest")
    ]


def test_each_choice_is_judged_after_each_repair(model, asked, tmp_path, monkeypatch):
    repairs = {"repairs": ("refit", "none", "nbl"), "repair_text": BATCHES}
    before = compared(model, asked, tmp_path)
    held = (tmp_path / ScoresRecord.file).read_bytes()
    records = compared(model, asked, tmp_path, **repairs)
    assert [record.repair for record in records] == ["none", "refit", "nbl"] * 2
    assert (tmp_path / ScoresRecord.file).read_bytes().startswith(held)
    assert [record.quality for record in records[::3]] == [
        record.quality for record in before
    ]
    for record in records:
        (expected,) = evaluate(
            model,
            [METHODS[record.repair].repair(model, record.plan, BATCHES)],
            HELD_OUT,
        )
        assert (record.quality.delta_nll, record.quality.kl) == pytest.approx(
            (expected.delta_nll, expected.kl), abs=1e-9
        )
        assert record.added_bytes == (
            2 * (32 * 32 + 32) * 8 if record.repair == "nbl" else 0
        )
    monkeypatch.setattr(quality, "score", None)
    monkeypatch.setattr(methods_cached, "method", lambda name: None)
    again = compared(model, asked, tmp_path, **repairs)
    assert again == records
    assert {
        record.key
        for record in read(tmp_path / ComparisonRecord.file, ComparisonRecord)
    } == {record.key for record in records}


def test_a_comparison_with_repairs_says_so_and_one_without_is_as_it_was(
    model, asked, tmp_path
):
    plain = compared(model, asked, tmp_path / "plain")
    rows = [
        json.loads(line)
        for line in (
            (tmp_path / "plain" / ComparisonRecord.file).read_text().splitlines()
        )
    ]
    assert not any("repair" in row or "added_bytes" in row for row in rows)
    assert "repair" not in comparison_table(plain)
    assert plain[0].name == "deepest: 2 attentions"
    repaired = compared(
        model, asked, tmp_path / "more", repairs=("ghosted",), repair_text=BATCHES
    )
    table = comparison_table(repaired)
    assert "| criterion | repair | NLL added |" in table  # and by no objective
    assert "| added |" in table
    assert "| deepest | ghosted |" in table
    assert repaired[1].name == "deepest, ghosted: 2 attentions"
    names = {(point.colour, point.shape) for point in comparison_points(repaired)}
    assert names == {
        (name, repair)
        for name in ("deepest", "shallowest")
        for repair in ("none", "ghosted")
    }


def test_an_unknown_repair_is_refused_before_anything_is_done():
    with pytest.raises(UsageError, match="no repair 'luck'"):
        CompareOptions(repair=("luck",)).check()


def test_the_dense_model_keeps_its_own_weights(model):
    """After every method."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for one in METHODS.values():
        repaired = one.repair(model, MIXED, BATCHES)
        with with_weights(model, repaired.weights):
            pass
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
