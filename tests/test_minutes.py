"""A healing of so many CPU minutes, alone and behind a repair: by a clock that counts
forward passes, a second each.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from api import (
    HealRecord,
    MeasuredRecord,
    RefitRecord,
    RepairedPlan,
    Training,
    heal,
    heal_by,
    healing_Spread,
    read,
    recover,
    silent,
)
from notall import Plan, TrainConfig, UsageError, repair
from test_healing import HELD_OUT, PLAN, TRAINED, by_hand, llama, same

pytestmark = (
    pytest.mark.any_transformers
)  # of steps and seconds; the healing itself is tested on both
LIMIT = 120.0  # seconds of two minutes
STEP, LOOK = (
    2.0,
    4.0,
    # a step is a pass of each model, an evaluation one of the student and one of the
    # head a batch
)
SLACK = LOOK


class Counted:
    """A model, and a clock that says how often it, or a copy of it, has run; `rows` are
    those that the model read.
    """

    def __init__(self):
        self.model, self.runs, self.rows = llama(), 0, []
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def __deepcopy__(self, memo):
        return self  # a copy of the model counts here too

    def _count(self, asked, _, given):
        self.runs += 1
        if asked is self.model and len(given["input_ids"]) > 1:
            self.rows += given["input_ids"].tolist()

    def __call__(self):
        return float(self.runs)


def healed_for(counted, folder, minutes=2.0, progress=silent, **options):
    config = TrainConfig(rate=3e-3, minutes=minutes, **options)
    training = Training(PLAN, TRAINED, HELD_OUT, config, clock=counted)
    return heal_by(training, counted.model, out=folder, progress=progress)


def recovered_in(counted, folder, minutes=2.0, progress=silent, name="refit"):
    training = Training(
        PLAN, TRAINED, HELD_OUT, TrainConfig(rate=3e-3, minutes=minutes), clock=counted
    )
    return recover(folder, name, counted.model, training, TRAINED, {}, progress)


def looks_of(folder):
    return read(folder / HealRecord.file, HealRecord)


@pytest.fixture
def rates():
    """The learning rate of each step."""
    found = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: found.append(optimizer.param_groups[0]["lr"])
    )
    yield found
    hook.remove()


def test_it_trains_until_the_time_is_up_and_looks_at_even_shares_of_it(tmp_path):
    healed_for(Counted(), tmp_path, patience=0)  # which is of a training over a text
    looks = looks_of(tmp_path)
    assert abs(looks[-1].seconds - looks[0].seconds - LIMIT) <= SLACK
    assert [look.model for look in looks] == [
        "skipped",
        *["healed"] * 5,
    ]  # ten would take over a sixth of the time
    begun, share = looks[0].seconds, LIMIT / 5
    for number, look in enumerate(looks[1:], 1):
        assert abs(look.seconds - begun - number * share) <= 2 * SLACK


def test_the_rate_rises_for_a_tenth_of_the_time_and_is_none_when_it_is_up(
    tmp_path, rates
):
    healed_for(Counted(), tmp_path)
    begun, *looks = (look.seconds for look in looks_of(tmp_path))
    now, about = (
        begun,
        LOOK,
    )  # what the next step takes: before the first as much as an evaluation
    for rate in rates:
        done = (now + about / 2 - begun) / (LIMIT - LOOK)
        wanted = (
            done / 0.1
            if done < 0.1
            else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))
        )
        assert rate == pytest.approx(3e-3 * wanted, rel=1e-6)
        now, about = now + STEP + LOOK * (now + STEP + LOOK in looks), STEP
    assert max(rates) > 0.95 * 3e-3
    assert rates[-1] < 0.02 * 3e-3


def test_a_text_that_ends_before_the_time_is_gone_through_again_in_another_order(
    tmp_path,
):
    counted, every = Counted(), torch.cat(TRAINED).tolist()
    healed_for(counted, tmp_path)
    rows = [row for row in counted.rows if row in every]
    passes = [rows[at : at + len(every)] for at in range(0, len(rows), len(every))]
    assert len(passes) > 3
    assert all(sorted(one) == sorted(every) for one in passes[:3])
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert looks_of(tmp_path)[-1].tokens == len(rows) * 12


def test_one_record_from_the_skipped_model_over_the_repair_to_the_last_evaluation(
    tmp_path,
):
    repaired, healed = recovered_in(Counted(), tmp_path)
    looks, model = looks_of(tmp_path), llama()
    assert [look.model for look in looks][:3] == ["skipped", "repaired", "healed"]
    assert [look.tokens for look in looks][:2] == [0, 0]
    assert looks[0].seconds == 0
    assert [look.seconds for look in looks] == sorted(look.seconds for look in looks)
    assert looks[1].seconds > len(TRAINED)  # the repair's passes are among them
    assert abs(looks[-1].seconds - looks[1].seconds - LIMIT) <= SLACK
    best = min(looks[1:], key=lambda look: look.held_out_kl)
    for look, plan in ((looks[0], PLAN), (looks[1], repaired), (best, healed)):
        found = [look.held_out_kl, look.held_out_nll, look.held_out_agreement]
        assert found == pytest.approx(by_hand(model, plan), rel=1e-4)
    assert same(RepairedPlan.load(tmp_path), healed)
    assert same(RepairedPlan.load(tmp_path / "closed-form"), repaired)
    assert [step.by for step in healed.history] == ["repair", "heal"]


@pytest.mark.parametrize("name", ["refit", "prune-and-comp"])
def test_where_there_is_no_time_to_train_it_is_what_the_repair_leaves(
    name, tmp_path, rates
):
    repaired, healed = recovered_in(Counted(), tmp_path / "both", 1e-9, name=name)
    begun = repair(llama(), PLAN, TRAINED) if name == "refit" else repaired
    alone = heal(llama(), begun, TRAINED, HELD_OUT, TrainConfig(minutes=1e-9))
    assert rates == []
    assert same(repaired, begun)
    assert same(healed, alone)
    own = dict(llama().named_parameters())
    for path, weight in healed.weights.items():
        assert torch.equal(weight, begun.weights.get(path, own[path]))


def fails_at(doing, count):
    seen = []

    def fail(_, __, told):
        seen.append(told.startswith(doing))
        if sum(seen) == count:
            raise RuntimeError("planted")

    return fail


def test_interrupted_in_the_training_it_goes_on_for_what_is_left(tmp_path):
    with pytest.raises(RuntimeError, match="planted"):
        recovered_in(Counted(), tmp_path, progress=fails_at("healing", 16))
    before, more = looks_of(tmp_path), Counted()
    recovered_in(more, tmp_path)
    looks = looks_of(tmp_path)
    assert looks[: len(before)] == before
    assert looks[-1].tokens > before[-1].tokens > 0
    assert abs(looks[-1].seconds - looks[1].seconds - LIMIT) <= 2 * SLACK
    assert (
        more.runs < LIMIT + before[1].seconds - before[-1].seconds + 10
    )  # what it stops by is read by the original model again
    again = Counted()
    recovered_in(again, tmp_path)
    assert again.runs < 10  # where its layers are, and no more


def test_interrupted_in_the_repair_its_seconds_count(tmp_path):
    with pytest.raises(RuntimeError, match="planted"):
        recovered_in(Counted(), tmp_path, progress=fails_at("refitting", 4))
    kept = tmp_path / "closed-form" / RefitRecord.file
    unsealed = re.sub(r', "sealed": "\w+"', "", kept.read_text())
    kept.write_text(re.sub(r'"seconds": ?[\d.e-]+', '"seconds": 20.0', unsealed))
    refits = read(kept, RefitRecord)
    assert refits
    recovered_in(Counted(), tmp_path)
    skipped, repaired, *_, last = looks_of(tmp_path)
    assert (skipped.seconds, skipped.model) == (0, "skipped")
    assert repaired.seconds > 20 * len(refits)
    assert abs(last.seconds - repaired.seconds - LIMIT) <= SLACK


# --- what cannot be
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_refused(minutes):
    with pytest.raises(UsageError, match="give more than 0, such as 3") as refusal:
        TrainConfig(minutes=minutes)
    assert "\n" not in str(refusal.value)


def test_workers_have_no_minutes(tmp_path):
    with pytest.raises(
        UsageError, match="workers do not train by time: drop --minutes or --ray"
    ):
        heal(
            llama(),
            PLAN,
            TRAINED,
            HELD_OUT,
            TrainConfig(minutes=1),
            out=tmp_path / "out",
            workers=healing_Spread({}),
        )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_before_the_repair(tmp_path):
    training = Training(PLAN, TRAINED, [], TrainConfig(minutes=1))
    with pytest.raises(UsageError, match="other text to stop by"):
        recover(tmp_path / "out", "refit", llama(), training, TRAINED, {})
    assert not (tmp_path / "out").exists()


# --- the commands
# --------------------------------------------------------------------------------------

SHORT = [
    "--sequences",
    "8",
    "--length",
    "16",
    "--dtype",
    "float32",
    "--text",
    "prose",
    "--json",
]


@pytest.mark.slow
@pytest.mark.usefixtures("short_prose")
def test_one_command_repairs_and_heals(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "recovered"
    Plan([2, 4]).save(path)
    command = [
        "repair",
        folder,
        "--plan",
        path,
        "--out",
        out,
        "--minutes",
        "0.05",
        *SHORT,
    ]
    code, shown, err = run(*command)
    assert (code, err) == (0, "")
    found = json.loads(shown)
    assert [row["model"] for row in found["quality"]] == [
        "skipped",
        "repaired",
        "healed",
    ]
    assert [row["model"] for row in found["healing"]] == [
        look.model for look in looks_of(out)
    ]
    assert [row["model"] for row in found["healing"]][:3] == [
        "skipped",
        "repaired",
        "healed",
    ]
    assert len(found["refits"]) == len(
        read(out / "closed-form" / RefitRecord.file, RefitRecord)
    )
    assert found["verdict"]["delta_nll"] == found["quality"][-1]["quality"]["delta_nll"]
    assert [one.model for one in read(out / MeasuredRecord.file, MeasuredRecord)] == [
        "skipped",
        "repaired",
        "healed",
    ]
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert run(*command)[:2] == (0, shown)
    assert {
        file.name: file.read_bytes() for file in out.iterdir() if file.is_file()
    } == before
    assert [step.by for step in RepairedPlan.load(out).history] == ["repair", "heal"]
    assert (
        "results with minutes 0.05, not 0.1"
        in run(*(word if word != "0.05" else "0.1" for word in command))[2]
    )
    plain = [word for word in command if word not in ("--minutes", "0.05")]
    assert "holds results of notall heal" in run(*plain)[2]


@pytest.mark.slow
@pytest.mark.usefixtures("short_prose")
def test_heal_takes_minutes_too(run, folder, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "healed"
    Plan([4]).save(path)
    code, shown, err = run(
        "heal", folder, "--plan", path, "--out", out, "--minutes", "0.03", *SHORT
    )
    assert (code, err) == (0, "")
    (step,) = RepairedPlan.load(out).history
    assert step.minutes == 0.03
    assert json.loads(shown)["healing"][0]["model"] == "skipped"


@pytest.mark.parametrize("command", ["repair", "heal"])
def test_minutes_that_are_none_are_one_line(command, run, folder, tmp_path):
    path = tmp_path / "plan.json"
    Plan([4]).save(path)
    for minutes in ("0", "-1", "nan", "inf"):
        code, _, err = run(
            command,
            folder,
            "--plan",
            path,
            "--out",
            tmp_path / "n",
            f"--minutes={minutes}",
            *SHORT,
        )
        assert (code, err.count("\n")) == (2, 1), err
        assert "give more than 0, such as 3" in err
    assert not (tmp_path / "n").exists()
