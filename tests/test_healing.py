"""A healed plan is nearer to the original model, which stays as it is, and goes on
where it was killed.
"""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch

import forked
from api import (
    Checkpoints,
    HealRecord,
    RepairedPlan,
    Replay,
    Student,
    heal,
    read,
    silent,
    states_of,
    tensor_files,
    training,
    training_loop,
)
from families import family, replayed_logits
from notall import (
    Plan,
    TrainConfig,
    UnsupportedModel,
    UsageError,
    evaluate,
    repair,
    skip,
)
from small_disk import room_for

PLAN = Plan(attention=[2], mlp=[1])
OUTPUTS = ("layernorm.weight", "o_proj.weight", "down_proj.weight")


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (4, 12), generator=generator) for _ in range(count)]


TRAINED, HELD_OUT = texts(8, 0), texts(2, 1)
pytestmark = pytest.mark.any_transformers


def llama():
    return family("llama").build()


def run_heal(folder=None, model=None, plan=PLAN, progress=silent, **options):
    config = TrainConfig(**{"rate": 3e-3} | options)
    return heal(
        model or llama(), plan, TRAINED, HELD_OUT, config, out=folder, progress=progress
    )


@torch.no_grad()
def logits_of(model, plan, tokens):
    with skip(model, plan):
        return model(tokens).logits


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def by_hand(model, plan):
    """KL, NLL and the share of same first choices on the held-out text, of all tokens
    that are predicted.
    """
    ids = torch.cat(HELD_OUT)
    log_p, log_q = (
        one[:, :-1].log_softmax(-1)
        for one in (model(ids).logits, logits_of(model, plan, ids))
    )
    nll = -log_q.gather(2, ids[:, 1:, None]).mean()
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
    return [float(kl(log_p, log_q).mean()), float(nll), float(same)]


def distance(model, plan):
    return by_hand(model, plan)[0]


def same(found, expected):
    return found.weights.keys() == expected.weights.keys() and all(
        torch.equal(found.weights[path], weight)
        for path, weight in expected.weights.items()
    )


def looks_in(folder):
    return read(folder / HealRecord.file, HealRecord)


def kept_paths(model, plan=PLAN):
    """Of every parameter of a kept sublayer of a llama, by hand."""
    gone = [
        f"layers.{n}.{part}"
        for n in plan.attention
        for part in ("self_attn.", "input_layernorm.")
    ]
    gone += [
        f"layers.{n}.{part}"
        for n in plan.mlp
        for part in ("mlp.", "post_attention_layernorm.")
    ]
    return {
        name
        for name, _ in model.named_parameters()
        if "layers." in name and not any(one in name for one in gone)
    }


@pytest.mark.parametrize("train", ["outputs", "all", "lora"])
def test_it_comes_nearer_to_the_dense_model_which_stays_as_it_is(train, tmp_path):
    model = llama()
    before = [
        (name, id(one), one.detach().clone(), one.requires_grad)
        for name, one in model.named_parameters()
    ]
    healed = run_heal(tmp_path, model, train=train)
    for (name, one), (known, there, bits, grad) in zip(
        model.named_parameters(), before, strict=True
    ):
        assert (name, id(one), one.requires_grad) == (known, there, grad)
        assert torch.equal(one, bits)
    assert distance(model, healed) < 0.95 * distance(model, PLAN)
    chosen = {"outputs": OUTPUTS, "all": ("",), "lora": ("_proj.weight",)}[train]
    wanted = {path for path in kept_paths(model) if path.endswith(chosen)}
    own = dict(model.named_parameters())
    assert {
        path
        for path, weight in healed.weights.items()
        if not torch.equal(weight, own[path])
    } == wanted
    looks = [
        (look.held_out_kl, look.held_out_nll, look.held_out_agreement)
        for look in read(tmp_path / HealRecord.file, HealRecord)
    ]
    assert looks[0] == pytest.approx(by_hand(model, PLAN), rel=1e-4)
    assert min(looks) == pytest.approx(by_hand(model, healed), rel=1e-4)
    assert len({same for *_, same in looks}) > 1
    assert same(RepairedPlan.load(tmp_path), healed)
    assert {
        path.name for path in tmp_path.iterdir() if not path.name.startswith(".")
    } == {
        *("healing.jsonl", "healed.safetensors", "plan.json", "finished.json"),
    }
    replayed = dict(replayed_logits(Replay(model, [healed]), input_ids=HELD_OUT[0]))[0]
    torch.testing.assert_close(
        replayed, logits_of(model, healed, HELD_OUT[0]), rtol=1e-5, atol=1e-5
    )


def with_larger_features(model, times):
    """A llama that answers the same: what its MLPs' last matrices are given is so many
    times as large, and their weights are smaller.
    """
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.mul_(times)
        layer.mlp.down_proj.weight.data.div_(times)
    return model


def rates_by_hand(model):
    """Of the columns of each matrix, what a step is multiplied by: 100 over the sum of
    the inputs' sizes, each token relative to its output, to the next power of 2, and
    never more than 1.
    """
    sizes = {}

    def keep(path):
        def hook(_, args, output):
            ratios = args[0] / output.square().mean(-1, keepdim=True).sqrt()
            size = ratios.square().mean((0, 1)).sqrt()
            size = size.maximum(size.mean() / 2)
            rates = (100 / len(size) / size).clamp_max(1)
            sizes[path] = rates.log2().round().exp2()

        return hook

    hooks = [
        module.register_forward_hook(keep(f"{path}.weight"))
        for path, module in model.named_modules()
        if path.endswith(("o_proj", "down_proj"))
    ]
    logits_of(model, PLAN, TRAINED[0][:2])
    for hook in hooks:
        hook.remove()
    return sizes


def stepped(trained, loss, rates):
    """The weights after a step of AdamW at a rate of 1e-3, in the coordinates that
    columns are divided by their rates for.
    """
    rates = {path: rates.get(path, torch.tensor(1.0)) for path in trained}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    whitened = [
        torch.nn.Parameter(one.detach() / rates[path]) for path, one in trained.items()
    ]
    for one, path, gradient in zip(whitened, trained, gradients, strict=True):
        one.grad = rates[path] * gradient
    torch.nn.utils.clip_grad_norm_(whitened, 1.0)
    torch.optim.AdamW(
        whitened, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0
    ).step()
    return {
        path: (one * rates[path]).detach()
        for path, one in zip(trained, whitened, strict=True)
    }


def test_one_step_is_one_step_of_adamw_on_the_plain_loss():
    """In the coordinates that columns are divided by their rates for."""
    model = with_larger_features(llama(), 64)
    begun = repair(model, PLAN, TRAINED)  # whose weights it begins with
    found = heal(model, begun, TRAINED[:1], HELD_OUT, TrainConfig(rate=1e-3))
    twin = copy.deepcopy(model)
    for path, weight in begun.weights.items():
        twin.get_parameter(path).data.copy_(weight)
    trained = {
        path: twin.get_parameter(path)
        for path in kept_paths(model)
        if path.endswith(OUTPUTS)
    }
    with torch.no_grad():
        aim = model(TRAINED[0]).logits.log_softmax(-1)
    with skip(twin, PLAN):
        loss = kl(aim, twin(TRAINED[0]).logits.log_softmax(-1)).mean()
    assert found.weights.keys() == begun.weights.keys() | trained.keys()
    rates = rates_by_hand(twin)
    assert min(rate.max() for rate in rates.values()) < 0.1
    for path, weight in stepped(trained, loss, rates).items():
        torch.testing.assert_close(found.weights[path], weight, rtol=1e-4, atol=2e-6)


def test_the_dense_model_answers_on_each_text_once():
    """What is trained on is seen once, what it stops by at every look."""
    model, seen = llama(), []
    model.register_forward_pre_hook(  # the copy has it too
        lambda asked, _, given: seen.append(
            (asked is model, given["input_ids"].tolist())
        ),
        with_kwargs=True,
    )
    heal(model, PLAN, TRAINED, HELD_OUT, TrainConfig(rate=1e-3))
    of_dense = [ids for is_dense, ids in seen if is_dense]
    rows = [
        row for ids in of_dense if len(ids) > 1 for row in ids
    ]  # one alone is to find projections with
    assert all(rows.count(row) == 1 for batch in TRAINED for row in batch.tolist())
    assert all(of_dense.count(batch.tolist()) == 1 for batch in HELD_OUT)
    assert (
        sum(ids == HELD_OUT[0].tolist() for is_dense, ids in seen if not is_dense) > 5
    )


@pytest.mark.parametrize("train", ["outputs", "all", "lora"])
def test_what_is_not_trained_shares_its_memory_with_the_dense_model(train, students):
    model = llama()
    begun = repair(model, PLAN, TRAINED)
    before = {path: one.detach().clone() for path, one in model.named_parameters()}
    heal(model, begun, TRAINED, HELD_OUT, TrainConfig(train, rate=3e-3))
    dense = {
        one.data_ptr()
        for one in (*model.parameters(), *model.buffers(), *begun.weights.values())
    }
    trained = {id(one) for one in students[0].running.values()}
    for path, one in students[0].model.named_parameters():
        assert (one.data_ptr() in dense) == (id(one) not in trained), path
        assert one.requires_grad == (id(one) in trained), path
    assert all(one.data_ptr() in dense for one in students[0].model.buffers())
    for path, one in model.named_parameters():
        assert torch.equal(one, before[path]), path
        assert one.requires_grad


def test_a_model_of_16_bits_is_healed(tmp_path):
    """Its numbers are not those that it is trained in."""
    model = llama().half()
    healed = heal(
        model, PLAN, TRAINED * 2, HELD_OUT, TrainConfig("all", rate=1e-3), out=tmp_path
    )
    looks = [one.held_out_kl for one in read(tmp_path / HealRecord.file, HealRecord)]
    assert min(looks) < 0.95 * looks[0]
    assert {weight.dtype for weight in healed.weights.values()} == {torch.float16}


# --- LoRA
# --------------------------------------------------------------------------------------


@pytest.fixture
def students(monkeypatch):
    """Those that are trained."""
    found = []

    class Kept(Student):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            found.append(self)

    monkeypatch.setattr(training, "Student", Kept)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("opt", "qwen2", "gemma3")
        ),
    ],
)
def test_merged_it_answers_as_with_the_matrices_beside(name, students, monkeypatch):
    monkeypatch.setattr(
        training, "refuse_overlap", lambda *_: None
    )  # on what it trains on it gains for certain
    model = family(name).build()
    begun = repair(model, PLAN, TRAINED, ridges=[10.0])  # which leaves much to do
    healed = heal(model, begun, TRAINED, TRAINED[:2], TrainConfig("lora", rank=3))
    with torch.no_grad():
        adapted = students[0].model(HELD_OUT[0]).logits
    merged, before = (
        logits_of(model, healed, HELD_OUT[0]),
        logits_of(model, begun, HELD_OUT[0]),
    )
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert (merged - before).abs().max() > 1e-3
    own = dict(model.named_parameters())
    for path in students[0].adapters:
        change = healed.weights[f"{path}.weight"] - begun.weights.get(
            f"{path}.weight", own[f"{path}.weight"]
        )
        assert torch.linalg.matrix_rank(change.detach(), atol=1e-6) == 3
    assert healed.weights.keys() == begun.weights.keys() | {
        f"{path}.weight" for path in students[0].adapters
    }


def test_beside_experts_a_dense_mlp_has_matrices_too(students):
    """Of its names peft makes those of experts, as checkpoints of transformers 4 have
    them.
    """
    model = family("qwen3_moe").build(mlp_only_layers=[3])
    healed = run_heal(model=model, train="lora")
    dense = {
        f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    assert {
        path
        for path in healed.weights
        if ".mlp." in path and ".gate.weight" not in path
    } == dense
    assert {path.partition(".lora_")[0] for path in students[0].trained} == {
        *students[0].adapters
    }


def test_without_peft_there_is_no_lora(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"needs peft: pip install 'notall\[lora\]'"):
        run_heal(tmp_path / "out", train="lora")


@pytest.mark.parametrize("train", ["outputs", "all", "lora"])
def test_weights_that_layers_share_stay_as_they_are(train):
    """A plan has one value for a path, and would leave the other layer with the old
    one.
    """
    model = llama()
    layers = model.model.layers
    layers[0].mlp.down_proj.weight = layers[3].mlp.down_proj.weight
    healed = run_heal(model=model, train=train)
    assert not any(
        "down_proj" in path for path in healed.weights if "layers.2" not in path
    )
    assert "model.layers.2.mlp.down_proj.weight" in healed.weights


# --- the warm-up
# --------------------------------------------------------------------------------------


def test_a_step_of_the_warm_up_is_one_step_of_adamw_on_each_sublayer_alone():
    """By hand: each sublayer is given the student's own stream, and is to end where the
    dense one is behind the gap.
    """
    model = llama()
    found = heal(
        model, PLAN, TRAINED[:1], HELD_OUT, TrainConfig(rate=1e-3, warm_up=1.0)
    )
    ids, twin = TRAINED[0], copy.deepcopy(model)
    names = [(layer, kind) for layer in range(4) for kind in ("attention", "mlp")]
    kept = [one for one in names if one not in ((2, "attention"), (1, "mlp"))]
    with torch.no_grad():
        dense = [model.model.embed_tokens(ids)]
        for name in names:
            dense.append(dense[-1] + added(model, *name, dense[-1]))
    ends = [names.index(one) for one in kept[1:]] + [len(names)]
    trained = {
        path: twin.get_parameter(path)
        for path in kept_paths(model)
        if path.endswith(OUTPUTS)
    }
    hidden, losses = dense[0], []
    for place, (name, end) in enumerate(zip(kept, ends, strict=True)):
        behind = hidden + added(twin, *name, hidden)
        metric = read_by(model, kept[place + 1 : place + 5])
        losses.append(
            (
                ((behind - dense[end]) ** 2) @ metric / ((dense[end] ** 2) @ metric)
            ).mean()
        )
        hidden = behind.detach()
    assert found.weights.keys() == trained.keys()
    rates = rates_by_hand(twin)
    loss = sum(losses) / len(losses)
    for path, weight in stepped(trained, loss, rates).items():
        torch.testing.assert_close(found.weights[path], weight, rtol=1e-4, atol=2e-5)


def added(model, layer, kind, hidden):
    """What a llama's sublayer adds to the stream."""
    block = model.model.layers[layer]
    if kind == "mlp":
        return block.mlp(block.post_attention_layernorm(hidden))
    tokens = hidden.shape[1]
    mask = torch.full((tokens, tokens), torch.finfo(hidden.dtype).min).triu(1)[
        None, None
    ]
    angles = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    return block.self_attn(
        block.input_layernorm(hidden), position_embeddings=angles, attention_mask=mask
    )[0]


def read_by(model, readers):
    """How much each channel counts: the mean of the squared gains of these norms and
    the last one.
    """
    layers = model.model.layers
    gains = [
        (
            layers[layer].input_layernorm
            if kind == "attention"
            else layers[layer].post_attention_layernorm
        ).weight
        for layer, kind in readers
    ] + [model.model.norm.weight]
    squares = torch.stack(
        [gain.detach().square() / gain.detach().square().mean() for gain in gains]
    )
    return squares.mean(0) / squares.mean(0).mean()


@pytest.mark.slow
def test_the_warm_up_comes_nearer_and_what_follows_aims_at_the_next_token(tmp_path):
    model = llama()
    warm = heal(model, PLAN, TRAINED * 2, HELD_OUT, TrainConfig(rate=3e-3, warm_up=1.0))
    both = heal(model, PLAN, TRAINED * 2, HELD_OUT, TrainConfig(rate=3e-3, warm_up=0.5))
    assert distance(model, warm) < 0.95 * distance(model, PLAN)
    assert not same(both, warm)
    assert not same(
        both, heal(model, PLAN, TRAINED * 2, HELD_OUT, TrainConfig(rate=3e-3))
    )


@pytest.mark.slow
def test_looks_in_the_warm_up_do_not_try_the_patience(tmp_path):
    """At a rate where nothing changes: neither better, nor so bad that it goes back."""
    for warm_up, looks in ((0.0, 2 + 5), (0.5, 1 + 8 + 5)):
        folder = tmp_path / str(warm_up)
        heal(
            llama(),
            PLAN,
            TRAINED * 2,
            HELD_OUT,
            TrainConfig(rate=1e-12, warm_up=warm_up),
            out=folder,
        )
        assert len(read(folder / HealRecord.file, HealRecord)) == looks


@pytest.mark.slow
def test_a_run_that_goes_on_in_its_warm_up_has_as_much_patience(tmp_path):
    def fail(done, *_):
        if done == 3:
            raise RuntimeError("planted")

    def run(name, **more):
        heal(
            llama(),
            PLAN,
            TRAINED * 2,
            HELD_OUT,
            TrainConfig(rate=0.9, warm_up=0.5),
            out=tmp_path / name,
            **more,
        )
        return [
            look.held_out_kl
            for look in read(tmp_path / name / HealRecord.file, HealRecord)
        ]

    with pytest.raises(RuntimeError, match="planted"):
        run("stopped", progress=fail)
    assert run("stopped") == run("whole")


@pytest.mark.parametrize("warm_up", [-0.1, 1.1, float("nan")])
def test_a_warm_up_is_a_share(warm_up):
    with pytest.raises(UsageError, match="give one from 0 to 1"):
        run_heal(warm_up=warm_up)


# --- in half precision
# --------------------------------------------------------------------------------------


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("train", ["outputs", "lora"])
def test_in_half_precision_what_is_trained_is_in_float32_meanwhile(
    train, dtype, students, tmp_path
):
    """Small steps would be rounded away."""
    model, seen = llama().to(dtype), set()
    config = TrainConfig(train, rate=1e-3, warm_up=0.25)

    def look(*_):
        assert {one.dtype for one in students[0].trained.values()} == {torch.float32}
        seen.update(one.dtype for one in students[0].model.parameters())

    healed = heal(
        model, PLAN, TRAINED * 2, HELD_OUT, config, out=tmp_path, progress=look
    )
    assert seen == {dtype}
    assert {weight.dtype for weight in healed.weights.values()} == {dtype}
    assert distance(model, healed) < 0.95 * distance(model, PLAN)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("train", ["outputs", "all", "lora"])
def test_the_first_look_is_what_evaluate_measures_of_the_plan(train, dtype, tmp_path):
    """Student and original model run in one precision, that of the model."""
    model = llama().to(dtype)
    heal(model, PLAN, TRAINED[:1], HELD_OUT, TrainConfig(train), out=tmp_path)
    first, (plain,) = looks_in(tmp_path)[0], evaluate(model, [PLAN], HELD_OUT)
    assert first.held_out_kl == pytest.approx(plain.kl, rel=1e-6)
    assert first.held_out_nll == pytest.approx(plain.nll, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("train", ["outputs", "lora"])
def test_the_kl_of_a_plan_that_changes_nothing_starts_at_none(
    train, dtype, students, tmp_path
):
    model = llama().to(dtype)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data.zero_()
    plan = Plan(mlp=[1])
    heal(
        model, plan, TRAINED[:1], HELD_OUT, TrainConfig(train, rate=1e-12), out=tmp_path
    )
    first = looks_in(tmp_path)[0]
    assert (first.held_out_kl, first.held_out_agreement) == (
        pytest.approx(0, abs=1e-5),
        1,
    )
    ids = HELD_OUT[0]
    assert torch.equal(states_of(students[0].model, ids), states_of(model, ids))


def test_small_gradients_count_in_half_precision_too(monkeypatch):
    """A first step of AdamW moves each weight by the rate; float16 has no numbers for
    gradients below 6e-8.
    """
    told, moved = (
        iter([[2.0, 1.0, 1.0, 1.0], [1.0] * 4] * 2),
        {},
    )  # so that the step counts as a gain
    monkeypatch.setattr(
        training_loop.Loop, "_held_out_sums", lambda *_: torch.tensor(next(told))
    )
    for dtype in (torch.float32, torch.float16):
        model = llama().half().to(dtype)
        model.lm_head.weight.data.mul_(2**-6)
        healed = heal(
            model, PLAN, [torch.cat(TRAINED)], HELD_OUT, TrainConfig("all", rate=0.01)
        )
        own = dict(model.named_parameters())
        moved[dtype] = [
            weight.float() - own[path].float()
            for path, weight in healed.weights.items()
        ]
    agree = [(one * other > 0).float().mean() for one, other in zip(*moved.values())]
    assert min(agree) > 0.9


def test_a_healing_in_float16_that_goes_on_scales_its_loss_as_before(tmp_path):
    """By less than it began with: its first gradients were infinite, and their steps
    are left out.
    """

    def run(name, **more):
        model = llama().half()
        model.lm_head.weight.data.mul_(2**8)
        return heal(
            model,
            PLAN,
            TRAINED * 2,
            HELD_OUT,
            TrainConfig(rate=3e-3),
            out=tmp_path / name,
            **more,
        )

    def fail(done, *_):
        if done == 4:
            raise RuntimeError("planted")

    whole = run("whole")
    with pytest.raises(RuntimeError, match="planted"):
        run("stopped", progress=fail)
    assert same(run("stopped"), whole)


# --- what comes out
# --------------------------------------------------------------------------------------


def test_where_nothing_gets_better_it_keeps_what_it_began_with_and_says_so(recwarn):
    model = llama()
    begun = repair(model, PLAN, TRAINED)
    run_heal(model=model, plan=begun, rate=1e-4)
    assert not [one for one in recwarn if "--rate" in str(one.message)]
    with pytest.warns(
        UserWarning, match="KL on held-out text did not fall.*try a lower --rate"
    ):
        found = run_heal(model=model, plan=begun, rate=0.9)
    for path, weight in found.weights.items():
        assert torch.equal(weight, begun.weights.get(path, model.get_parameter(path)))


def test_a_loss_of_nothing_is_the_best_there_is(monkeypatch):
    told = iter([[2.0, 1.0, 1.0, 1.0], *([[0.0, 1.0, 1.0, 1.0]] * 8)])
    monkeypatch.setattr(
        training_loop.Loop, "_held_out_sums", lambda *_: torch.tensor(next(told))
    )
    model = llama()
    healed = run_heal(model=model, patience=1)
    assert not any(
        torch.equal(weight, model.get_parameter(path))
        for path, weight in healed.weights.items()
    )


def test_windows_of_several_lengths_are_refused():
    with pytest.raises(UsageError, match="give windows of one"):
        heal(llama(), PLAN, [TRAINED[0], TRAINED[1][:, :5]], HELD_OUT)


def test_a_capped_head_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training_loop, "Loop", lambda *_: pytest.fail("a training was begun")
    )
    with pytest.raises(
        UnsupportedModel, match="is no matrix, and cannot be aimed at"
    ) as refusal:
        run_heal(tmp_path / "out", family("gemma2").build())
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


# --- a folder that goes on
# --------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
import test_healing
test_healing.run_heal(Path(sys.argv[1]), progress=lambda *_: time.sleep(0.3))
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_comes_to_the_same(tmp_path):
    whole = run_heal(tmp_path / "whole")
    folder = tmp_path / "killed"
    forked.kill_at(folder / "healing.jsonl", 5, SCRIPT, folder)
    with pytest.raises(
        UsageError, match="was not finished: run the command that began it again"
    ):
        RepairedPlan.load(folder)
    assert same(run_heal(folder), whole)
    assert same(RepairedPlan.load(folder), whole)


def test_what_safetensors_leaves_when_killed_is_ours(tmp_path, monkeypatch):
    """Of 0.8: it writes a file of its own beside the one to write, and renames it."""
    checkpoints, save_file = Checkpoints.of(tmp_path), tensor_files.save_file
    saved = []

    def save(tensors, file, notes):
        (file.parent / ".tmpW6aE4p").write_bytes(b"")
        checkpoints.refuse_others()
        save_file(tensors, file, notes)
        saved.append(file)

    monkeypatch.setattr(tensor_files, "save_file", save)
    tensor_files.write_tensors(checkpoints.last, {"weight": torch.ones(2)})
    assert len(saved) == 1
    assert [path.name for path in checkpoints.folder.iterdir()] == ["last.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rate": 3e-3}, marks=pytest.mark.slow),
        pytest.param({"rate": 0.1}, marks=pytest.mark.slow),
        pytest.param({"rate": 3e-3, "train": "lora"}, marks=pytest.mark.slow),
        {"rate": 3e-3, "warm_up": 0.8},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_stopped_by_an_error_it_comes_to_the_same(options, tmp_path):
    """Also where nothing gets better, and its patience is soon at an end."""

    def fail(done, *_):
        if done == 3:
            raise RuntimeError("planted")

    whole = run_heal(tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="planted"):
        run_heal(tmp_path / "stopped", **options, progress=fail)
    kept = tmp_path / "stopped" / HealRecord.file
    unsealed = re.sub(r', "sealed": "\w+"', "", kept.read_text())
    kept.write_text(re.sub(r'"seconds": ?[\d.e-]+', '"seconds": 1000.0', unsealed))
    assert same(run_heal(tmp_path / "stopped", **options), whole)
    whole_looks, looks = (
        read(tmp_path / name / HealRecord.file, HealRecord)
        for name in ("whole", "stopped")
    )
    assert [(one.tokens, one.held_out_kl) for one in looks] == [
        (one.tokens, one.held_out_kl) for one in whole_looks
    ]
    assert all(one.seconds >= 1000 for one in looks)


def test_what_is_finished_is_not_trained_again_and_other_settings_are_refused(
    tmp_path, monkeypatch
):
    whole = run_heal(tmp_path)
    monkeypatch.setattr(
        training_loop, "Loop", lambda *_: pytest.fail("it was trained again")
    )
    assert same(run_heal(tmp_path), whole)
    others = {"rate": 1e-3}, {"train": "all"}, {"warm_up": 0.5}
    for changes, said in (
        (one, f"results with {name}") for one in others for name in one
    ):
        with pytest.raises(UsageError, match=said):
            run_heal(tmp_path, **changes)


def test_checkpoints_of_a_run_that_was_killed_as_it_ended_go(tmp_path):
    left = stopped(tmp_path).read_bytes()
    healed = run_heal(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.safetensors").write_bytes(left)
    assert same(run_heal(tmp_path), healed)
    assert not (tmp_path / "checkpoints").exists()


def test_a_plan_file_in_the_folder_is_no_finished_healing(tmp_path):
    """As where the plan to heal is given from there."""
    PLAN.save(tmp_path / "plan.json")
    assert same(run_heal(tmp_path), run_heal())
    assert RepairedPlan.load(tmp_path).weights


def test_another_plan_in_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "Loop", lambda *_: pytest.fail("it was trained"))
    Plan(mlp=[3]).save(tmp_path / "plan.json")
    with pytest.raises(
        UsageError, match=r"holds another plan, in plan.json: choose another folder"
    ) as refusal:
        run_heal(tmp_path)
    assert "\n" not in str(refusal.value)
    assert Plan.load(tmp_path / "plan.json") == Plan(mlp=[3])


def test_a_finished_folder_that_others_wrote_is_refused(tmp_path):
    RepairedPlan.of(PLAN).save(tmp_path / "saved")
    with pytest.raises(
        UsageError,
        match="holds a repaired plan that others wrote: choose another folder",
    ):
        run_heal(tmp_path / "saved")


def stopped(folder):
    def fail(done, *_):
        if done == 3:
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        run_heal(folder, progress=fail)
    return folder / "checkpoints" / "last.safetensors"


def test_a_damaged_checkpoint_is_one_line_and_without_it_the_healing_begins_anew(
    tmp_path,
):
    whole, last = run_heal(tmp_path / "whole"), stopped(tmp_path / "stopped")
    content = bytearray(last.read_bytes())
    content[-9] ^= 1
    last.write_bytes(content)
    with pytest.raises(
        UsageError, match=r"last.safetensors is damaged .*: delete it, and run again"
    ) as refusal:
        run_heal(tmp_path / "stopped")
    assert "\n" not in str(refusal.value)
    last.unlink()
    assert same(run_heal(tmp_path / "stopped"), whole)


def test_a_checkpoint_without_a_record_of_what_it_is_of_is_not_gone_on_from(tmp_path):
    stopped(tmp_path)
    (tmp_path / HealRecord.file).unlink()
    assert same(run_heal(tmp_path, rate=1e-3), run_heal(rate=1e-3))


@pytest.mark.parametrize("size", [200, 9_000, 200_000])
def test_a_full_disk_is_one_line(tmp_path, size):
    """In the middle of a record, of the first checkpoint, and of a later one."""
    with (
        room_for(size),
        pytest.raises(
            UsageError, match=r"cannot write .*: File too large.*; make room"
        ) as refusal,
    ):
        run_heal(tmp_path, train="all")
    assert ("last" in str(refusal.value)) == (size > 100_000)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.rglob(".*")] in ([], [".lock"])
    assert same(run_heal(tmp_path, train="all"), run_heal(train="all"))
