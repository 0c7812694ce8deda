"""A cluster of two workers here: what they answer is what one process answers, also
when one is killed.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is absent: pip install 'notall[ray]'", allow_module_level=True)

import forked
from api import (
    Provenance,
    Replay,
    Request,
    Scorer,
    Workers,
    cluster as cluster_module,
    driver_Subject as Subject,
    options_Workload as Workload,
    paper_grid,
    ray_workers as spreading,
    score,
    split_branches,
    sweep,
)
from families import family
from notall import Plan, UsageError, load, locate
from tiny_tasks import saved, tiny_llama

pytestmark = [
    # it is about processes: what each computes is what one computes
    pytest.mark.any_transformers,
    pytest.mark.long,
]

TOKENS = torch.arange(2 * 40).view(2, 40) * 7 % 250 + 3
REQUESTS = [
    Request(tuple(range(5, 40 + n % 7)), (n % 50 + 3, n % 60 + 4)) for n in range(30)
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = saved(tiny_llama(), tmp_path_factory.mktemp("spread") / "tiny")
    return {"spec": str(path), "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def model(options):
    return load(**options)[0]


@pytest.fixture(scope="module")
def plans(model):
    return [row.plan for row in paper_grid(locate(model))]


@pytest.fixture(scope="module")
def workers(options, model):
    """Two for all tests, as starting them takes long; the test that kills them is the
    last to use them.
    """
    with Workers(options, locate(model), count=2) as both:
        yield both


def answers(score_requests, plans, requests):
    found = {}
    for scores in score_requests(plans, requests):
        found |= dict(
            zip(
                scores.requests,
                zip(scores.log_likelihoods.T.tolist(), scores.greedy.T.tolist()),
            )
        )
    return [found[number] for number in range(len(requests))]


def kill(process):
    os.kill(process, signal.SIGKILL)


# As if Ray's server could not start what it starts for each client, the first time.
REFUSED_ONCE = """
import ray.util.client.worker as client

right, asked = client.Worker._server_init, []

def refused(*given):
    asked.append(given)
    if len(asked) == 1:
        raise ConnectionAbortedError("Initialization failure from server")
    return right(*given)

client.Worker._server_init = refused
from api import cli
cli.main()
"""


def sweep_on(options, folder, address, workers=1, program=forked.NOTALL, **environment):
    """`notall sweep` on a cluster, in a process of its own: a process can't leave one
    cluster for another.

    No test looks for a running cluster, as another test process may just run one.
    """
    words = (
        f"sweep {options['spec']} --dtype float32 --device cpu --ray {address}"
        f" --ray-workers {workers} --json"
    )
    words += (
        " --sequences 2 --length 16 --prompt-tokens 4 --generation-tokens 1 --rounds 1"
        f" --out {folder}"
    )
    with mock.patch.dict(
        os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    ):
        return forked.run(program, *words.split())


@pytest.mark.parametrize(
    "address", ["nowhere", pytest.param("ray://127.0.0.1:1", marks=pytest.mark.slow)]
)
def test_no_cluster_is_one_line(options, tmp_path, address):
    quickly = {
        "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1",
        "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1",
    }
    done = sweep_on(options, tmp_path, address, **quickly)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"no Ray cluster at {address}" in said
    assert "give local, auto, HOST:PORT or ray://HOST:PORT" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_answer_as_one_process(workers, model, plans):
    expected = score(model, plans[1:], TOKENS)
    assert workers.score(plans[1:], TOKENS) == expected
    theirs = answers(Scorer(model).score, plans, REQUESTS)
    ours = answers(workers.score_requests, plans, REQUESTS)
    for (likely, greedy), (likely_here, greedy_here) in zip(ours, theirs):
        assert likely == pytest.approx(likely_here, abs=1e-4)
        assert greedy == greedy_here


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_on_workers_is_the_sweep_of_one_process(workers, model, tmp_path):
    here, there = (
        sweep(
            Subject(
                model,
                None,
                [TOKENS],
                tmp_path / name,
                Provenance(what={"model": "tiny"}),
                workers=some,
            ),
            Workload(prompt_tokens=4, generation_tokens=1, rounds=1),
        )
        for name, some in (("here", None), ("there", workers))
    )
    assert len(here) == len(there) == 19
    for ours, theirs in zip(there, here):
        assert ours.plan == theirs.plan
        assert ours.quality == theirs.quality


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_killed_in_the_middle_changes_nothing_and_both_are_told(
    workers, model, plans, monkeypatch
):
    many = [Request(tuple(range(5, 60 + n % 30)), (n % 50 + 3,)) for n in range(120)]
    monkeypatch.setattr(spreading, "SLICE", 20)
    found = []
    for scores in workers.score_requests(plans, many):
        found.append((scores.requests, scores.log_likelihoods, scores.greedy))
        if len(found) == 2:
            kill(workers.pool.processes[0])
    assert len(found) == 6
    assert len(workers.pool.actors) == 1
    expected = answers(Scorer(model).score, plans, many)
    for requests, likely, greedy in found:
        for number, ours, said in zip(requests, likely.T.tolist(), greedy.T.tolist()):
            assert ours == pytest.approx(expected[number][0], abs=1e-4)
            assert said == expected[number][1]
    kill(workers.pool.processes[1])
    with pytest.raises(UsageError, match="lost"):
        workers.score(plans[1:], TOKENS)


@pytest.fixture
def cluster():
    """Ports of a cluster that is not ours: its own and its client's."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0)), other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    folder = tempfile.mkdtemp(
        prefix="ray", dir="/tmp"
    )  # Ray's socket names are long, and may have 107 characters
    words = (
        f"start --head --block --port {ports[0]} --ray-client-server-port {ports[1]}"
        f" --temp-dir {folder}"
    )
    words += " --num-cpus 2 --include-dashboard=false --disable-usage-stats"
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of-this-test" * 6,
    }
    environment["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = (
        "200"  # 30 are few on a busy machine
    )
    running = subprocess.Popen(
        [ray, *words.split()], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(ports[1], running)
        yield (
            ports,
            {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")},
        )
    finally:
        running.terminate()
        running.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port, running):
    while running.poll() is None:
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", port), 1),
        ):
            return
        time.sleep(0.2)
    raise AssertionError("the cluster ended before it listened")


def test_of_a_traceback_that_rays_client_hands_on_its_last_line_is_said(monkeypatch):
    handed_on = (
        "Initialization failure from server:\nTraceback (most recent call last):\n "
        " File x\nRuntimeError: full\n"
    )
    monkeypatch.setattr(cluster_module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster_module.ray, "shutdown", mock.Mock())
    tried = mock.Mock(side_effect=ConnectionAbortedError(handed_on))
    monkeypatch.setattr(cluster_module.ray, "init", tried)
    with pytest.raises(
        UsageError,
        match="no Ray cluster at ray://there:1: RuntimeError: full; give local",
    ):
        Workers({}, None, "ray://there:1")
    assert tried.call_count == 3
    tried.side_effect = ConnectionError("nobody is there")
    with pytest.raises(UsageError, match="nobody is there"):
        Workers({}, None, "ray://there:1")
    assert tried.call_count == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_elsewhere_is_joined_at_its_port_and_by_rays_client(
    options, cluster, tmp_path
):
    ports, token = cluster
    inside, outside = f"127.0.0.1:{ports[0]}", f"ray://127.0.0.1:{ports[1]}"
    places = (
        ("inside", inside, 2, forked.NOTALL),
        ("outside", outside, 1, REFUSED_ONCE),
    )
    for name, address, workers, program in places:
        done = sweep_on(options, tmp_path / name, address, workers, program, **token)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["results"]) == 19


def test_branches_are_cut_in_equal_work_and_lie_together():
    model = family("llama").build(num_hidden_layers=12)
    structure = locate(model)
    plans = [row.plan for row in paper_grid(structure)]
    groups = split_branches(structure, plans, 2)
    assert sorted(number for group in groups for number in group) == list(
        range(len(plans))
    )

    def work(some):
        return [
            Replay(model, [plans[number] for number in group]).executions
            for group in some
        ]

    dealt_out = [range(start, len(plans), 2) for start in (0, 1)]
    assert max(work(groups)) < max(work(dealt_out))
    order = [number for group in groups for number in group]
    every_cut = [max(work([order[:cut], order[cut:]])) for cut in range(1, len(order))]
    assert max(work(groups)) <= min(every_cut) + 2  # heads count as well
    assert len(split_branches(structure, plans[:1], 4)) == 1
    assert sum(map(len, split_branches(structure, [Plan()] * 3, 2))) == 3
