"""A repair is what its slow twin comes to, leaves the original model alone, and goes on
where it was stopped.
"""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn

import forked
from api import (
    HELD,
    Fit,
    Kept,
    Moments,
    OutputProjection,
    Projections,
    Replay,
    held_out,
    offloaded,
    record,
    refitting,
    refitting_RIDGES as RIDGES,
    streams,
)
from families import FAMILIES, TRANSFORMERS_5, each_block, family, replayed_logits
from notall import (
    Plan,
    RepairedPlan,
    UnsupportedModel,
    UsageError,
    locate,
    repair,
    skip,
)
from small_disk import room_for
from twin_of_repair import DIRECT, NORMED, Hand, Twin

PLANS = {
    "attentions": Plan([1, 2]),
    "blocks": Plan([1, 3], [1, 3]),
    "portable": Plan(attention=[2], mlp=[1]),
    "MLPs": Plan(mlp=[0, 2]),
    "the first attention": Plan(attention=[0]),  # a gap before the first kept sublayer
}


def texts(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    """Token ids, a batch a shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, shape, generator=generator) for shape in shapes]


TEXTS = texts(
    (3, 12), (9, 10), (5, 12)
)  # 17 sequences: the 8th and the 16th are held out


def with_odd_gains(hand: Hand):
    """Norms behind matrices with gains of both signs, some near none."""
    model = hand.build()
    for name, weight in model.named_parameters():
        if hand.behind and any(f"{norm}.weight" in name for norm in hand.behind):
            weight.data[::5] = -weight.data[::5] - (
                2 if hand.name == "gemma3" else 0
            )  # Gemma's gain is 1 + it
            weight.data[3] = -0.999 if hand.name == "gemma3" else 1e-3
    return model


TWINS = [
    *((DIRECT[0], name) for name in PLANS),
    (NORMED[0], "attentions"),
    (NORMED[0], "blocks"),
]
if TRANSFORMERS_5:
    TWINS += [(NORMED[-1], "attentions")]
OTHER_TWINS = [(NORMED[0], name) for name in PLANS if (NORMED[0], name) not in TWINS]
OTHER_TWINS += [
    (hand, name)
    for hand in (*DIRECT[1:], *NORMED[1:])
    for name in ("attentions", "MLPs")
    if hand.exists
]
OTHER_TWINS = [twin for twin in OTHER_TWINS if twin not in TWINS]


@pytest.mark.any_transformers  # it is about numbers; every family is repaired on both
@pytest.mark.parametrize(
    ("hand", "plan"),
    [pytest.param(hand, PLANS[name], id=f"{hand}-{name}") for hand, name in TWINS]
    + [
        pytest.param(hand, PLANS[name], id=f"{hand}-{name}", marks=pytest.mark.slow)
        for hand, name in OTHER_TWINS
    ],
)
def test_it_comes_to_what_the_slow_twin_comes_to(hand, plan):
    """Ridges and weights, with the change of the next gap aimed at in part, and
    without.
    """
    model = with_odd_gains(hand)
    ridges, all_ahead = ((0.03, 3.0), (0.5,)) if hand.behind else (RIDGES, (0.5, 0.0))
    for ahead in all_ahead:
        found = repair(model, plan, TEXTS, ridges=ridges, ahead=ahead)
        expected = Twin(hand, model, plan, TEXTS, ridges).run(ahead)
        assert [refit.sublayers for refit in found.refits] == [
            one.names for one in expected.found
        ]
        assert [refit.ridge for refit in found.refits] == [
            one.ridge for one in expected.found
        ]
        assert [refit.left for refit in found.refits] == pytest.approx(
            [one.left for one in expected.found], abs=1e-6
        )
        assert found.weights.keys() == expected.weights.keys() != set()
        for path, weight in expected.weights.items():
            # A norm adds its own small number, and computes in float32.
            assert (found.weights[path] - weight).norm() <= (
                1e-5 if hand.behind else 1e-6
            ) * weight.norm(), path


def test_a_bias_is_shared_and_counts_as_its_projection_is_scaled():
    """Two projections side by side, each added times its scale, whose answers are to
    rise by a number for each channel: half of it by the bias of each.
    """
    layer = nn.ModuleDict({"one": nn.Linear(3, 4), "other": nn.Linear(2, 4)})
    scales, rise = {"one": 2.0, "other": 0.5}, torch.arange(1.0, 5.0)
    projections = tuple(OutputProjection(*pair) for pair in scales.items())
    states = [torch.zeros(2, 3, 4)]
    features, held = [torch.zeros(6, 5)], [torch.tensor([True, False])]
    fit = Fit(layer, projections, states, states, states, features, held, torch.ones(4))
    change = torch.cat([torch.zeros(4, 5), rise[:, None]], 1)
    new = fit.weights(change, 1.0)
    for name, scale in scales.items():
        rose = scale * (new[f"{name}.bias"] - layer[name].bias)
        assert torch.allclose(rose, rise / 2, atol=1e-6)
        assert torch.equal(new[f"{name}.weight"], layer[name].weight)


def test_no_ridge_is_plain_least_squares():
    """Of the only step that is refit: with no change aimed at ahead, the one before the
    last attention.
    """
    model = DIRECT[0].build()
    found = repair(
        model, Plan(attention=[3]), texts((128, 24)), ridges=[0.0], ahead=0.0
    )
    refit = found.refits[0]
    assert (refit.sublayers, refit.ridge) == (("mlp.2",), 0.0)
    seen = {}
    layers = model.model.layers
    handles = [
        layers[2].mlp.down_proj.register_forward_pre_hook(
            lambda _, args: seen.update(z=args[0].flatten(0, 1))
        ),
        layers[3].input_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(here=args[0].flatten(0, 1))
        ),
        layers[3].post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(there=args[0].flatten(0, 1))
        ),
    ]
    with torch.no_grad():
        model(*texts((128, 24)))
    for handle in handles:
        handle.remove()
    gains = [model.model.norm.weight, layers[3].post_attention_layernorm.weight]
    metric = (
        sum(gain.detach().square() / gain.detach().square().mean() for gain in gains)
        / 2
    )
    counts = 1 / (seen["there"].square() @ metric)
    weighted = counts[:, None] * seen["z"]
    change = torch.linalg.solve(
        weighted.T @ seen["z"], weighted.T @ (seen["there"] - seen["here"])
    ).T
    expected = layers[2].mlp.down_proj.weight.detach() + change
    torch.testing.assert_close(
        found.weights["model.layers.2.mlp.down_proj.weight"],
        expected,
        rtol=1e-6,
        atol=1e-8,
    )


def test_an_endless_ridge_changes_nothing():
    model = family("llama").build()
    found = repair(model, PLANS["blocks"], TEXTS, ridges=[math.inf])
    assert not found.weights
    assert all(refit.ridge is None and refit.left == 1 for refit in found.refits)
    with torch.no_grad(), skip(model, found):
        repaired = model(TEXTS[0]).logits
    with torch.no_grad(), skip(model, PLANS["blocks"]):
        assert torch.equal(repaired, model(TEXTS[0]).logits)


def test_a_refit_that_does_not_help_is_given_up_soon(monkeypatch):
    """At the strongest ridges: weaker ones leave more still, and would be solved for
    nothing.
    """
    tried = []

    def solve(self, ridge, solve=Moments.solve, **more):
        tried[-1].append(ridge)
        return solve(self, ridge, **more)

    def best(self, ridges, best=Fit.best):
        tried.append([])
        return best(self, ridges)

    monkeypatch.setattr(Moments, "solve", solve)
    monkeypatch.setattr(Fit, "best", best)
    found = repair(family("llama").build(), PLANS["attentions"], TEXTS)
    strongest_first = sorted(RIDGES, reverse=True)
    kinds = {refit.ridge is None for refit in found.refits}
    assert kinds == {True, False}
    for ridges, refit in zip(tried, found.refits, strict=True):
        if refit.ridge is None:
            assert ridges == strongest_first[:2]
        else:  # up to two that leave more; then it is solved with all of the text
            place = strongest_first.index(refit.ridge)
            assert ridges == [*strongest_first[: place + 3], refit.ridge]


# --- what is held out
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "held"),
    [
        ([(2, 8)], [1]),
        ([(3, 8), (2, 8)], [4]),
        ([(3, 8), (9, 8), (5, 8)], [7, 15]),
        ([(8, 8)], [7]),
    ],
)
def test_one_sequence_in_eight_is_held_out_or_the_last_where_there_are_fewer(
    shapes, held
):
    found = torch.cat(held_out(texts(*shapes), HELD))
    assert found.nonzero().flatten().tolist() == held


@pytest.mark.parametrize(
    ("plan", "shapes", "said"),
    [
        (Plan([1]), [(1, 8)], "1 is too few: give 2 or more"),
        (Plan([1]), [], "there is no text"),
        (Plan(), [(4, 8)], "skips nothing"),
        (Plan([9]), [(4, 8)], "layers are 0 to 3"),
        (Plan([0, 1, 2, 3]), [(4, 8)], "keep at least one"),
        (RepairedPlan([1]), [(4, 8)], "repaired already: heal it"),
    ],
)
def test_what_cannot_be_repaired_is_refused(plan, shapes, said):
    with pytest.raises(UsageError, match=said):
        repair(family("llama").build(), plan, texts(*shapes))


def test_a_model_that_is_skipping_is_refused():
    model = family("llama").build()
    with (
        skip(model, Plan([2])),
        pytest.raises(UsageError, match="leave it before repairing"),
    ):
        repair(model, Plan([1]), TEXTS)


# --- the original model stays as it is
# --------------------------------------------------------------------------------------


def parameters(model):
    """The very objects, and their bits."""
    return [(name, id(one), one.clone()) for name, one in model.named_parameters()]


def assert_untouched(model, before):
    for (name, here, bits), (known, there, old) in zip(
        parameters(model), before, strict=True
    ):
        assert (name, here) == (known, there)
        assert torch.equal(bits, old), name


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_model_itself_stays_as_it_is(name):
    model = family(name).build()
    before = parameters(model)
    assert repair(model, PLANS["portable"], TEXTS).weights
    assert_untouched(model, before)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in locate_layers(model)
    )


def locate_layers(model):
    return model.get_submodule(locate(model).layers).modules()


def test_progress_counts_a_refit_as_the_several_runs_that_it_takes():
    """Before the first gap the text is only run: of eleven steps the last three are
    refit.
    """
    seen, model = [], family("llama").build(num_hidden_layers=6)
    repair(
        model,
        Plan([5]),
        TEXTS,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    (total,) = {total for _, total in seen}
    steps = [after - before for (before, _), (after, _) in zip(seen, seen[1:])]
    assert steps == [1] * 8 + [6] * 3
    assert (seen[0][0], seen[-1][0]) == (0, total)


@pytest.mark.parametrize("step", range(5))
def test_also_where_it_fails_in_the_middle(step, monkeypatch):
    """In the middle of a step's run with new weights."""
    model = family("llama").build()
    before, run, runs = parameters(model), refitting.Refitting._run, []

    def fail(self, *args):
        runs.append(args)
        answer = run(self, *args)
        if (
            len(runs) == 2 * step + 2
        ):  # the second run of a step is with its new weights
            raise RuntimeError("planted")
        return answer

    monkeypatch.setattr(refitting.Refitting, "_run", fail)
    with pytest.raises(RuntimeError, match="planted"):
        repair(model, PLANS["portable"], TEXTS)
    assert_untouched(model, before)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in locate_layers(model)
    )


# --- what a projection is, in every family
# --------------------------------------------------------------------------------------

SMALL = texts((3, 10), (3, 10))
ALL_MLPS, LAST_MLPS = ("mlp.0", "mlp.1", "mlp.3"), ("mlp.1", "mlp.3")
ALONE = "no matrix of its own is the last before the stream"
# Of `Plan([1], [2])`: what is left alone, since experts share the work and none is the
# last before the stream.
LEFT_ALONE = {
    **dict.fromkeys(
        (
            "mixtral",
            "olmoe",
            "flex_olmo",
            "granitemoe",
            "gpt_oss",
            "minimax_m2",
            "phimoe",
        ),
        ALL_MLPS,
    ),
    **dict.fromkeys(("granitemoeshared", "mellum", "kolibri1"), ALL_MLPS),
    **dict.fromkeys(("afmoe", "axk1", "mimo_v2_flash"), LAST_MLPS),
    "qwen2_moe": ("mlp.1",),
    "qwen3_moe": ("mlp.0", "mlp.3"),
    "cohere2_moe": ("mlp.1",),
    "jetmoe": ("attn.0", "mlp.0", "mlp.1", "attn.2", "attn.3", "mlp.3"),
}


@each_block(FAMILIES)
@torch.no_grad()
def test_every_family_is_repaired(family):
    if not family.exists:
        pytest.skip(f"this transformers has no {family.model_type}")
    model = family.build()
    try:
        parallel = locate(model).blocks[-1].parallel
    except UnsupportedModel as refusal:
        pytest.skip(str(refusal))
    for plan in (Plan([1], [2]), Plan([1], [1]))[: 1 + parallel]:
        found = repair(model, plan, SMALL)
        left_alone = {
            name for refit in found.refits if refit.why for name in refit.sublayers
        }
        if plan.attention != plan.mlp:
            assert left_alone == set(LEFT_ALONE.get(family.name, ())), (
                "say it in LEFT_ALONE"
            )
        assert {refit.why for refit in found.refits} <= {"", ALONE}
        assert all((refit.ridge is None) == (refit.left == 1) for refit in found.refits)
        check_against_replay(model, plan, found)


def check_against_replay(model, plan, found):
    """Skipping with the weights is what replay says, and its last stream is nearer to
    the dense one.
    """
    left = {1: 0.0, 2: 0.0}
    for tokens in SMALL:
        replay = Replay(model, [Plan(), plan, found])
        streams = {
            n: hidden
            for numbers, hidden in replay.hidden_states(record(model, input_ids=tokens))
            for n in numbers
        }
        for number in left:
            left[number] += float((streams[number] - streams[0]).square().sum())
        replayed = dict(replayed_logits(replay, input_ids=tokens))[2]
        with skip(model, found):
            skipped = model(tokens).logits
        assert (replayed - skipped).abs().max() <= 1e-5 * skipped.abs().max()
    assert left[2] < left[1] if found.weights else left[2] == left[1]


NORMS = {
    **dict.fromkeys(
        ("gemma2", "gemma3", "olmo2", "olmo3", "exaone4"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "hyperclovax": ("post_norm1", "post_norm2"),
}
SCALES = {"granite": 0.7, "granite_swa": 0.7, "minicpm3": 1.4 / 4**0.5}
LAST = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "falcon (ALiBi)": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon (parallel)": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "hyperclovax": ("self_attn.o_proj", "mlp.down_proj"),
    "deepseek_v3": ("self_attn.o_proj", "mlp.shared_experts.down_proj"),
}


@pytest.mark.parametrize("name", [*NORMS, *SCALES, *LAST, "llama", "cohere"])
def test_projections_are_what_one_reads_in_transformers(name):
    if not family(name).exists:
        pytest.skip("this transformers does not have it")
    found = projections(family(name).build())
    norms = NORMS.get(name, (None, None))
    assert tuple(one.path for one in found) == LAST.get(
        name, ("self_attn.o_proj", "mlp.down_proj")
    )
    assert tuple(one.norm for one in found) == norms
    assert [one.scale for one in found] == pytest.approx(
        [SCALES.get(name, 1.0)] * 2, rel=1e-4
    )


@torch.no_grad()
def projections(model, layer=2):
    block, found = locate(model).blocks[layer], Projections(model, SMALL[0])
    return [found.of(part) for part in (block.attention, block.mlp)]


class Bent(torch.nn.Module):
    """An MLP whose answer is bent."""

    def __init__(self, inner, bend):
        super().__init__()
        self.inner, self.bend = inner, bend

    def forward(self, hidden):
        return self.bend(self.inner(hidden))


@pytest.mark.parametrize(
    "bend", [torch.tanh, torch.nn.functional.gelu, lambda answer: answer.flip(-1)]
)
def test_a_matrix_that_something_else_follows_is_no_projection(bend):
    model = family("llama").build()
    model.model.layers[2].mlp = Bent(model.model.layers[2].mlp, bend)
    assert projections(model)[1] is None
    assert projections(model)[0].path == "self_attn.o_proj"


@pytest.mark.parametrize(
    "bend", [torch.nn.Tanh(), torch.nn.GELU(), torch.nn.Softmax(-1)]
)
def test_what_follows_in_the_place_of_a_norm_is_tried_too(bend):
    """A module without weights, called by the layer itself."""
    model = family("gemma3").build()
    model.model.layers[2].post_feedforward_layernorm = bend
    assert projections(model)[1] is None


def test_a_norm_without_weights_is_one():
    model = family("gemma3").build()
    model.model.layers[2].post_feedforward_layernorm = torch.nn.RMSNorm(
        32, elementwise_affine=False
    )
    assert projections(model)[1].norm == "post_feedforward_layernorm"


def test_weights_that_layers_share_are_left_alone():
    model = family("llama").build()
    layers = model.model.layers
    layers[0].mlp.down_proj.weight = layers[3].mlp.down_proj.weight
    refits = {
        refit.sublayers[0]: refit for refit in repair(model, Plan([1, 2]), TEXTS).refits
    }
    assert refits["mlp.0"].why == refits["mlp.3"].why == ALONE
    assert not refits["mlp.1"].why


# --- where the streams are
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_in_files_come_to_the_same_and_leave_none(
    tmp_path, monkeypatch, name, dtype
):
    model, moved = family(name).build().to(dtype), []

    def keep(tensor, folder, keep=offloaded):
        kept = keep(tensor, folder)
        moved.append(kept.data_ptr() != tensor.data_ptr())
        return kept

    monkeypatch.setattr(streams, "offloaded", keep)
    found = repair(model, PLANS["attentions"], TEXTS, offload=tmp_path / "streams")
    assert len(moved) > 20
    assert all(moved)
    assert not list((tmp_path / "streams").iterdir())
    assert found == repair(model, PLANS["attentions"], TEXTS)
    assert found.weights


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(15.0).view(3, 5).T,
        torch.arange(7).to(torch.bfloat16),
        torch.empty(0, 4),
    ],
    ids=["turned", "half", "none"],
)
def test_a_tensor_in_a_file_is_the_tensor(tmp_path, tensor):
    kept = offloaded(tensor, tmp_path)
    assert torch.equal(kept, tensor)
    assert kept.dtype == tensor.dtype
    kept += 1  # it may be written to


def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    with room_for(1000), pytest.raises(UsageError, match="File too large; make room"):
        offloaded(torch.zeros(1 << 10), tmp_path)


# --- a folder that goes on
# --------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
import test_repairing
test_repairing.run_repair(Path(sys.argv[1]), progress=lambda *_: time.sleep(0.1))
"""


def run_repair(folder, plan=PLANS["blocks"], dtype=torch.float32, **options):
    return repair(
        family("llama").build().to(dtype),
        plan,
        TEXTS,
        out=folder,
        provenance={"seed": 0},
        **options,
    )


def same(found, expected):
    return found.weights.keys() == expected.weights.keys() and all(
        torch.equal(found.weights[path], weight)
        for path, weight in expected.weights.items()
    )


@pytest.mark.any_transformers
@pytest.mark.slow  # the next one stops likewise, in this process
@pytest.mark.parametrize("lines", [2, 3, 4])
def test_killed_in_the_middle_it_comes_to_the_same(tmp_path, lines):
    forked.kill_at(
        tmp_path / "killed" / "refits.jsonl", lines, SCRIPT, tmp_path / "killed"
    )
    goes_on(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.any_transformers
@pytest.mark.parametrize("lines", [2, 3, 4])
def test_stopped_in_the_middle_it_comes_to_the_same(tmp_path, lines):
    written = tmp_path / "stopped" / "refits.jsonl"

    def stop(*_):
        if written.exists() and written.read_bytes().count(b"\n") >= lines:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_repair(tmp_path / "stopped", progress=stop)
    assert written.read_bytes().count(b"\n") == lines
    goes_on(tmp_path / "stopped", tmp_path / "whole")


def goes_on(folder, elsewhere):
    """What was cut short in a folder comes to what a whole run comes to, and keeps what
    it had.
    """
    whole = run_repair(elsewhere)
    known = (folder / "refits.jsonl").read_bytes()
    with pytest.raises(
        UsageError, match="was not finished: run the command that began it again"
    ):
        RepairedPlan.load(folder)
    found = run_repair(folder)
    assert (
        (folder / "refits.jsonl")
        .read_bytes()
        .startswith(known[: known.rfind(b"\n") + 1])
    )
    assert len(whole.refits) == 4
    assert same(found, whole)
    assert same(RepairedPlan.load(folder), whole)
    assert RepairedPlan.load(folder) == whole
    assert [one.sublayers for one in RepairedPlan.load(folder).refits] == [
        one.sublayers for one in whole.refits
    ]


def test_new_weights_lie_in_files_and_are_never_in_memory_together(
    tmp_path, monkeypatch
):
    made, alive = [], []

    def add(kept, refit, brought, model, add=Kept.add):
        alive.append(sum(one() is not None for one in made))
        made.extend(weakref.ref(weight) for weight in brought.weights.values())
        add(kept, refit, brought, model)

    monkeypatch.setattr(Kept, "add", add)
    run_repair(tmp_path)
    assert len(made) == 4
    assert alive == [0, 0, 0, 0]


def test_what_is_finished_is_not_refit_again(tmp_path, monkeypatch):
    whole = run_repair(tmp_path)
    monkeypatch.setattr(refitting, "Fit", None)
    with monkeypatch.context() as patch:
        patch.setattr(refitting, "DenseStream", None)  # nor is a stream run
        assert run_repair(tmp_path) == whole
    (tmp_path / "plan.json").unlink()
    assert run_repair(tmp_path) == whole == RepairedPlan.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": Plan([2])}, "results with plan"),
        ({"dtype": torch.bfloat16}, "results with dtype"),
        ({"ridges": [1.0]}, "results with ridges"),
        ({"ahead": 0.25}, "results with ahead"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, changes, said):
    run_repair(tmp_path)
    with pytest.raises(UsageError, match=said):
        run_repair(tmp_path, **changes)


def test_a_folder_of_other_text_or_another_command_is_refused(tmp_path):
    run_repair(tmp_path / "a")
    with pytest.raises(UsageError, match="results with calibration"):
        repair(
            family("llama").build(),
            PLANS["blocks"],
            TEXTS[:2],
            out=tmp_path / "a",
            provenance={"seed": 0},
        )
    with pytest.raises(UsageError, match="results with seed"):
        repair(
            family("llama").build(),
            PLANS["blocks"],
            TEXTS,
            out=tmp_path / "a",
            provenance={"seed": 1},
        )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "healing.jsonl").write_text(
        '{"record": "header", "of": "healing"}\n'
    )
    with pytest.raises(UsageError, match="holds results of notall heal"):
        run_repair(tmp_path / "b")


def test_weights_that_are_damaged_or_gone_are_one_line(tmp_path):
    run_repair(tmp_path)
    weights = sorted(tmp_path.glob("*.safetensors"))[0]
    sound = weights.read_bytes()
    for content in (sound[:-5], sound[:20], b"", b"\xff" * len(sound)):
        weights.write_bytes(content)
        for read in (RepairedPlan.load, run_repair):
            with pytest.raises(
                UsageError,
                match=r"is damaged .*delete the folder, and repair the plan again",
            ):
                read(tmp_path)
    weights.unlink()
    for read in (RepairedPlan.load, run_repair):
        with pytest.raises(
            UsageError, match=r"lacks .*: delete the folder, and repair the plan again"
        ):
            read(tmp_path)


def test_a_folder_of_something_else_is_no_repaired_plan(tmp_path):
    with pytest.raises(UsageError, match="is no repaired plan"):
        RepairedPlan.load(tmp_path)


def test_nothing_is_pickled(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("a pickle was read"))
    monkeypatch.setattr(
        "torch.save", lambda *_, **__: pytest.fail("a pickle was written")
    )
    run_repair(tmp_path)
    RepairedPlan.load(tmp_path)
    assert {
        path.suffix for path in tmp_path.iterdir() if not path.name.startswith(".")
    } == {
        ".jsonl",
        ".json",
        ".safetensors",
    }
