"""A healed plan is nearer to the dense model, which stays as it is, and goes on where it was killed."""

from __future__ import annotations

import copy

import pytest
import torch

import forked
from families import family
from notall import Plan, UnsupportedModel, UsageError, repair, skip
from notall.records.healing import HealRecord
from notall.records.ledger import read
from notall.repairing import healing
from notall.repairing.healing import heal
from notall.repairing.kept import load_repaired
from notall.running.replay import Replay

PLAN = Plan(attention=[2], mlp=[1])
OUTPUTS = ("layernorm.weight", "o_proj.weight", "down_proj.weight")


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (4, 12), generator=generator) for _ in range(count)]


TRAINED, HELD_OUT = texts(8, 0), texts(2, 1)
pytestmark = pytest.mark.any_transformers


def llama():
    return family("llama").build()


def run_heal(folder=None, model=None, plan=PLAN, **options):
    return heal(model or llama(), plan, TRAINED, HELD_OUT, folder=folder, **{"rate": 3e-3} | options)


@torch.no_grad()
def logits_of(model, plan, tokens):
    with skip(model, plan):
        return model(tokens).logits


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def distance(model, plan):
    losses = [
        kl(model(ids).logits.log_softmax(-1), logits_of(model, plan, ids).log_softmax(-1)).mean() for ids in HELD_OUT
    ]
    return float(sum(losses) / len(losses))


def same(found, expected):
    return found.weights.keys() == expected.weights.keys() and all(
        torch.equal(found.weights[path], weight) for path, weight in expected.weights.items()
    )


def kept_paths(model, plan=PLAN):
    """Of every parameter of a kept sublayer of a llama, by hand."""
    gone = [f"layers.{n}.{part}" for n in plan.attention for part in ("self_attn.", "input_layernorm.")]
    gone += [f"layers.{n}.{part}" for n in plan.mlp for part in ("mlp.", "post_attention_layernorm.")]
    return {name for name, _ in model.named_parameters() if "layers." in name and not any(one in name for one in gone)}


@pytest.mark.parametrize("train", ["outputs", "all"])
def test_it_comes_nearer_to_the_dense_model_which_stays_as_it_is(train, tmp_path):
    model = llama()
    before = [(name, id(one), one.detach().clone(), one.requires_grad) for name, one in model.named_parameters()]
    healed = run_heal(tmp_path, model, train=train)
    for (name, one), (known, there, bits, grad) in zip(model.named_parameters(), before, strict=True):
        assert (name, id(one), one.requires_grad) == (known, there, grad)
        assert torch.equal(one, bits)
    assert distance(model, healed) < 0.95 * distance(model, PLAN)
    wanted = {path for path in kept_paths(model) if train == "all" or path.endswith(OUTPUTS)}
    own = dict(model.named_parameters())
    assert {path for path, weight in healed.weights.items() if not torch.equal(weight, own[path])} == wanted
    looks = read(tmp_path / HealRecord.file, HealRecord)
    assert looks[0].held_out_kl == pytest.approx(distance(model, PLAN), rel=1e-4)
    assert min(look.held_out_kl for look in looks) == pytest.approx(distance(model, healed), rel=1e-4)
    assert same(load_repaired(tmp_path), healed)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        *("healing.jsonl", "healed.safetensors", "plan.json"),
    }
    replayed = dict(Replay(model, [healed]).logits(input_ids=HELD_OUT[0]))[0]
    torch.testing.assert_close(replayed, logits_of(model, healed, HELD_OUT[0]), rtol=1e-5, atol=1e-5)


def test_one_step_is_one_step_of_adamw_on_the_plain_loss():
    model = llama()
    begun = repair(model, PLAN, TRAINED)  # whose weights it begins with
    found = heal(model, begun, TRAINED[:1], HELD_OUT, rate=1e-3)
    twin = copy.deepcopy(model)
    for path, weight in begun.weights.items():
        twin.get_parameter(path).data.copy_(weight)
    trained = {path: twin.get_parameter(path) for path in kept_paths(model) if path.endswith(OUTPUTS)}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    with torch.no_grad():
        aim = model(TRAINED[0]).logits.log_softmax(-1)
    with skip(twin, PLAN):
        loss = kl(aim, twin(TRAINED[0]).logits.log_softmax(-1)).mean()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    scale = min(1.0, 1 / float(torch.cat([one.flatten() for one in gradients]).norm()))  # as transformers clips
    for parameter, gradient in zip(trained.values(), gradients):
        parameter.grad = scale * gradient
    optimizer.step()
    assert found.weights.keys() == begun.weights.keys() | trained.keys()
    for path, parameter in trained.items():
        torch.testing.assert_close(found.weights[path], parameter.detach(), rtol=1e-4, atol=2e-5)


def test_the_dense_model_answers_on_each_text_once(monkeypatch):
    """What is trained on is seen once, what it stops by at every look."""
    model, seen = llama(), []

    def states(asked, ids, plain=healing._states):
        seen.append((asked is model, ids.tolist()))
        return plain(asked, ids)

    monkeypatch.setattr(healing, "_states", states)
    heal(model, PLAN, TRAINED, HELD_OUT, rate=1e-3)
    of_dense = [ids for is_dense, ids in seen if is_dense]
    assert len(of_dense) == len(TRAINED) + len(HELD_OUT)
    assert all(of_dense.count(batch.tolist()) == 1 for batch in HELD_OUT)
    assert sum(ids == HELD_OUT[0].tolist() for is_dense, ids in seen if not is_dense) > 5


def test_where_nothing_gets_better_it_keeps_what_it_began_with():
    model = llama()
    begun = repair(model, PLAN, TRAINED)
    found = run_heal(model=model, plan=begun, rate=0.9)
    for path, weight in found.weights.items():
        assert torch.equal(weight, begun.weights.get(path, model.get_parameter(path)))


def test_a_capped_head_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "_Run", lambda *_: pytest.fail("a training was begun"))
    with pytest.raises(UnsupportedModel, match="is no matrix, and cannot be aimed at") as refusal:
        run_heal(tmp_path / "out", family("gemma2").build())
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


# --- a folder that goes on --------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
import test_healing
test_healing.run_heal(Path(sys.argv[1]), progress=lambda *_: time.sleep(0.3))
"""


def test_killed_in_the_middle_it_comes_to_the_same(tmp_path):
    whole = run_heal(tmp_path / "whole")
    folder = tmp_path / "killed"
    forked.kill_at(folder / "healing.jsonl", 5, SCRIPT, folder)
    with pytest.raises(UsageError, match="was not finished: run the same `notall heal`"):
        load_repaired(folder)
    assert same(run_heal(folder), whole)
    assert same(load_repaired(folder), whole)


@pytest.mark.parametrize("rate", [3e-3, 0.1])
def test_stopped_by_an_error_it_comes_to_the_same(rate, tmp_path):
    """Also where nothing gets better, and its patience is soon at an end."""

    def fail(done, *_):
        if done == 3:
            raise RuntimeError("planted")

    whole = run_heal(tmp_path / "whole", rate=rate)
    with pytest.raises(RuntimeError, match="planted"):
        run_heal(tmp_path / "stopped", rate=rate, progress=fail)
    torn = tmp_path / "stopped" / "checkpoints" / "checkpoint-7"
    torn.mkdir()
    (torn / "optimizer.pt").write_bytes(b"torn")
    assert same(run_heal(tmp_path / "stopped", rate=rate), whole)
    whole_looks, looks = (read(tmp_path / name / HealRecord.file, HealRecord) for name in ("whole", "stopped"))
    assert [(one.tokens, one.held_out_kl) for one in looks] == [(one.tokens, one.held_out_kl) for one in whole_looks]


def test_what_is_finished_is_not_trained_again_and_other_settings_are_refused(tmp_path, monkeypatch):
    whole = run_heal(tmp_path)
    monkeypatch.setattr(healing, "_Run", lambda *_: pytest.fail("it was trained again"))
    assert same(run_heal(tmp_path), whole)
    for changes, said in (({"rate": 1e-3}, "another rate"), ({"train": "all"}, "another train")):
        with pytest.raises(UsageError, match=said):
            run_heal(tmp_path, **changes)
