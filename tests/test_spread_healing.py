"""A healing on two workers of a Ray cluster is that of one process, also where one
fails in the middle.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is absent: pip install 'notall[ray]'", allow_module_level=True)

import ray
from accelerate import PartialState

from api import (
    HealRecord,
    RepairedPlan,
    Training,
    cli,
    cluster,
    heal,
    healing,
    healing_Spread as Spread,
    read,
    records_lines as lines,
    spread_module,
)
from notall import Plan, TrainConfig, UsageError, load, repair
from test_healing import HELD_OUT, PLAN, TRAINED, llama
from tiny_tasks import saved, tiny_llama

pytestmark = [pytest.mark.any_transformers, pytest.mark.long]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = saved(llama(), tmp_path_factory.mktemp("spread") / "tiny")
    return {"spec": str(path), "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def two(options):
    """Two workers on a cluster of this file's own, as starting one takes long."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield Spread(options, count=2)
    ray.shutdown()


class FailsOnce(Training):
    """Raises after the third step, in the worker that is first there."""

    def run(self, model, folder, kept, progress):
        def fail(done, *_):
            if done == 3:
                (folder / "failed").touch(
                    exist_ok=False
                )  # another one that comes here later waits, or fails too
                raise RuntimeError("planted")

        found = super().run(
            model, folder, kept, progress if (folder / "failed").exists() else fail
        )
        assert PartialState().num_processes == 2
        return found


class AlwaysFails(Training):
    def run(self, model, folder, kept, progress):
        raise UsageError("planted for good")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_come_to_what_one_process_does(two, tmp_path, monkeypatch):
    """From a repaired plan, with a warm-up, and an odd number of held-out batches; also
    where one of them failed.
    """
    monkeypatch.setattr(healing, "Training", FailsOnce)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    model = load(**two.load_options)[0]
    plan, held_out, told = (
        repair(model, PLAN, TRAINED),
        [*HELD_OUT, HELD_OUT[0] + 1],
        [],
    )
    config = TrainConfig(rate=3e-3, warm_up=0.25)

    def progress(*now):
        told.append(now)

    there = heal(
        model,
        plan,
        TRAINED,
        held_out,
        config,
        out=tmp_path / "two",
        workers=two,
        progress=progress,
    )
    monkeypatch.setattr(healing, "Training", Training)
    here = heal(model, plan, TRAINED, held_out, config, out=tmp_path / "one")
    assert (tmp_path / "two" / "failed").exists()
    assert there.weights.keys() == here.weights.keys()
    for path, weight in here.weights.items():
        torch.testing.assert_close(there.weights[path], weight, rtol=1e-4, atol=1e-6)
        assert (
            not torch.equal(weight, model.get_parameter(path))
            or path not in plan.weights
        )
    one, both = (
        read(tmp_path / name / HealRecord.file, HealRecord) for name in ("one", "two")
    )
    assert [look.tokens for look in both] == [look.tokens for look in one]
    assert len(lines.read_lines(tmp_path / "two" / HealRecord.file)) == 1 + len(
        both
    )  # the first worker alone writes
    for name in ("held_out_kl", "held_out_nll", "held_out_agreement"):
        assert [getattr(look, name) for look in both] == pytest.approx(
            [getattr(look, name) for look in one], rel=1e-5
        )
    assert told == [(0, 1, "healing on 2 workers"), (1, 1, "healed on 2 workers")]
    assert not (tmp_path / "two" / "checkpoints").exists()


ODD = [*TRAINED[:4], TRAINED[4][:3]]  # the last batch is of three sequences
SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from notall import TrainConfig, heal
from test_healing import HELD_OUT, PLAN, llama
from test_spread_healing import ODD
model = llama().to(getattr(torch, sys.argv[2]))
heal(model, PLAN, ODD, HELD_OUT[:1], TrainConfig(rate=3e-3), out=Path(sys.argv[1]))
assert PartialState().num_processes == 2
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-3), ("bfloat16", 0.2)])
def test_processes_of_accelerate_share_each_batch(dtype, rounding, tmp_path):
    """Also one that does not part evenly, and held-out text that is one batch; in the
    model's dtype.
    """
    script, folder = tmp_path / "script.py", tmp_path / "two"
    script.write_text(SCRIPT)
    words = (  # of CPUs, where the model is
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    )
    launch = [
        sys.executable,
        "-m",
        *words.split(),
        "--mixed_precision",
        "bf16",
        "--dynamo_backend",
        "no",
    ]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [*launch, str(script), str(folder), dtype], check=True, env=os.environ | path
    )
    model = llama().to(getattr(torch, dtype))
    here = heal(
        model, PLAN, ODD, HELD_OUT[:1], TrainConfig(rate=3e-3), out=tmp_path / "one"
    )
    there = RepairedPlan.load(folder)
    assert there.weights.keys() == here.weights.keys()
    for name, weight in here.weights.items():
        change = weight.float() - model.get_parameter(name).detach().float()
        assert (
            there.weights[name].float() - weight.float()
        ).norm() <= rounding * change.norm(), name
    one, both = (
        lines.read_lines(tmp_path / name / HealRecord.file)[1:]
        for name in ("one", "two")
    )
    assert [look["tokens"] for look in both] == [look["tokens"] for look in one]
    assert [look["held_out_kl"] for look in both] == pytest.approx(
        [look["held_out_kl"] for look in one], rel=rounding / 50
    )
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_fails_again_is_one_line(two, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "Training", AlwaysFails)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(
        UsageError,
        match=r"a worker failed: .*planted for good; the same command goes on",
    ) as refusal:
        heal(
            load(**two.load_options)[0],
            PLAN,
            TRAINED,
            HELD_OUT,
            out=tmp_path,
            workers=two,
        )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        (
            Spread({}, count=3),
            (
                "3 workers cannot share a batch of 4 evenly: give another --per-step or"
                " --ray-workers"
            ),
        ),
        (Spread({}, count=-1), "-1 workers cannot share"),
        (Spread({}, "ray://there:1"), "give --ray auto or HOST:PORT there"),
        (Spread({}), "8 workers cannot share a batch of 4"),
    ],
)
def test_what_workers_cannot_share_is_refused(spread, said, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "joined", nullcontext)
    monkeypatch.setattr(cluster, "room", lambda: (8, True))
    with pytest.raises(UsageError, match=said):
        heal(llama(), PLAN, TRAINED, HELD_OUT, out=tmp_path / "out", workers=spread)


@pytest.mark.parametrize(
    ("device", "has_gpus", "on_gpus"),
    [("auto", True, True), ("cpu", True, False), ("auto", False, False)],
)
def test_it_runs_on_gpus_where_there_are_some_unless_told_otherwise(
    device, has_gpus, on_gpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "joined", nullcontext)
    monkeypatch.setattr(cluster, "room", lambda: (2, has_gpus))
    monkeypatch.setattr(cluster.ray, "put", lambda asked: asked)
    monkeypatch.setattr(
        spread_module.tensor_files, "read_tensors", lambda path: ({}, {})
    )
    trainer = mock.Mock()
    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    Spread({"device": device}).train(
        mock.Mock(batches=TRAINED), tmp_path, mock.Mock(), mock.Mock()
    )
    scaling, told = (
        trainer.call_args.kwargs["scaling_config"],
        trainer.call_args.kwargs["train_loop_config"],
    )
    assert (scaling.num_workers, scaling.use_gpu, told["on_gpus"]) == (
        2,
        on_gpus,
        on_gpus,
    )


def test_workers_need_a_folder():
    with pytest.raises(UsageError, match="workers share a folder: give one"):
        heal(llama(), PLAN, TRAINED, HELD_OUT, workers=Spread({}, count=2))


@pytest.mark.parametrize(
    ("held", "gpus", "found"),
    [
        ({"CPU": 6.0}, 1, (3, False)),
        ({"CPU": 1.0}, 1, (1, False)),
        ({"CPU": 9.0, "GPU": 5.0}, 2, (2, True)),
    ],
)
def test_room_is_counted_in_gpus_else_in_pairs_of_cpus(held, gpus, found, monkeypatch):
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: held)
    assert cluster.room(gpus) == found


def test_the_command_hands_its_workers_what_they_load(tmp_path, monkeypatch):
    asked, model = {}, saved(tiny_llama(), tmp_path / "tiny")

    def train(self, training, folder, about, progress):
        asked.update(spread=self, training=training, folder=folder)
        raise UsageError("as far as this")

    monkeypatch.setattr(Spread, "train", train)
    plan = tmp_path / "plan.json"
    Plan(attention=[2]).save(plan)
    words = [
        "notall",
        "heal",
        model,
        "--plan",
        plan,
        "--out",
        tmp_path / "out",
        "--tokens",
        "64",
    ]
    words += [
        "--length",
        "16",
        "--batch-size",
        "2",
        "--ray",
        "local",
        "--ray-workers",
        "2",
        "--dtype",
        "float32",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    spread = asked["spread"]
    assert (spread.address, spread.count) == ("local", 2)
    assert (spread.load_options["spec"], spread.load_options["dtype"]) == (
        str(model),
        "float32",
    )
    assert asked["folder"] == tmp_path / "out"
    assert len(asked["training"].batches[0]) == 2
