"""What a load finds wrong with a server: each fault planted in one that answers as
vLLM's does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest

from programs import ROOT, program

pytestmark = [
    pytest.mark.any_transformers,
    pytest.mark.slow,
]  # of a program that only `make bench-engines` runs

REQUESTS, AT_ONCE, NEW = 40, 6, 5


@pytest.fixture(scope="module")
def load():
    return program("benchmarks/engines/load")


class Server(ThreadingHTTPServer):
    """Counts what runs as blocks of its cache; `fault` names what it does wrong."""

    daemon_threads = True

    def __init__(self, fault=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.running, self.most, self.leaked = fault, 0, 0, 0
        self.lock = threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Those who hang up break the pipe."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        used = (
            0.0
            if self.server.fault == "blind"
            else (self.server.running + self.server.leaked) / 64
        )
        labels = '{engine="0",model_name="served"}'
        running = self.server.running + (self.server.fault == "stuck")
        self.answer(
            f"# HELP vllm:kv_cache_usage_perc share\nvllm:kv_cache_usage_perc{labels}"
            f" {used}\nvllm:num_requests_running{labels}"
            f" {running}.0\nvllm:num_requests_waiting{labels} 0.0\n"
        )

    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        except ValueError:
            return self.answer("{}", 200 if self.server.fault == "takes all" else 400)
        if not self.is_sound(asked):
            return self.answer("{}", 500 if self.server.fault == "falls over" else 422)
        with self.server.lock:
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            time.sleep(0.05)
            self.say(asked)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def is_sound(self, asked):
        said = asked.get("prompt", "")
        return (
            asked.get("model") == "served"
            and asked["max_tokens"] > 0
            and asked["temperature"] == 0
            and isinstance(said, str)
            and len(said) < 1000
        )

    def say(self, asked):
        chat = self.path.startswith("/v1/chat")
        said = NEW - (self.server.fault == "short")
        if self.server.fault == "fails" and chat:
            return self.answer("{}", 503)
        form = {"message": {"role": "assistant"}} if chat else {"text": "so"}
        choice = {
            "index": 0,
            **form,
            **({"more": 1} if self.server.fault == "another form" and chat else {}),
        }
        whole = {"id": "x", "choices": [choice], "usage": {"completion_tokens": said}}
        if not asked.get("stream"):
            return self.answer(json.dumps(whole))
        self.send_response(200)
        self.end_headers()
        chunks = [{"choices": [choice]}] * said + [
            {"choices": [], "usage": whole["usage"]}
        ]
        try:
            for chunk in [*map(json.dumps, chunks), "[DONE]"]:
                self.wfile.write(f"data: {chunk}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.01)
        except OSError:
            if self.server.fault == "leaks":
                self.server.leaked += 1

    def answer(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def bear(load, monkeypatch):
    """A function that puts a server with a fault under load."""
    monkeypatch.setattr(load, "PATIENCE", 1.0)

    def bear(fault=None):
        server = Server(fault)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            return load.bear(server.address, REQUESTS, AT_ONCE, NEW), server
        finally:
            server.shutdown()
            server.server_close()

    return bear


def test_a_sound_server_has_no_faults_and_is_asked_for_all_at_once(load, bear):
    held, server = bear()
    assert held.faults == []
    assert AT_ONCE / 2 < server.most <= AT_ONCE + 2  # who hung up is soon noticed
    assert (held.requests, held.refused, held.hung_up, held.used_after) == (
        REQUESTS,
        4,
        2,
        0,
    )
    assert 0 < held.most_used <= (AT_ONCE + 2) / 64
    chunk = (
        "{choices: [], usage: {completion_tokens: int}} {choices: [{index: int, text:"
        " str}]}"
    )
    assert held.forms["stream"] == [chunk]
    assert load.compared({"dense": held, "export": held}) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fails", r"requests failed with \[503\]"),
        ("short", "160 tokens were said, not 200"),
        ("takes all", r"malformed requests were answered with \[200"),
        ("falls over", r"malformed requests were answered with \[500"),
        ("leaks", "of the blocks are still used"),
        ("stuck", "1 requests are left"),
        ("blind", "the load was not seen"),
    ],
)
def test_each_fault_of_a_server_is_said(bear, fault, said):
    held, _ = bear(fault)
    assert any(re.search(said, found) for found in held.faults), held.faults


def test_another_form_of_answers_than_the_dense_model_s_is_said(load, bear):
    (dense, _), (other, _) = bear(), bear("another form")
    fault, *more = load.compared({"dense": dense, "export": other})
    assert more == []
    assert fault.startswith("export: a chat has the form")
    assert "more: int" in fault


def test_every_malformed_request_is_malformed(load):
    bad = load.malformed(NEW)
    assert len({body for _, body in bad}) == len(bad) == 8
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(bad[0][1])


def test_metrics_are_read_under_either_name_and_their_absence_is_no_zero(load):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        assert load.metric(server.address, load.LEFT) == 0
        with pytest.raises(KeyError, match="no metric vllm:nothing"):
            load.metric(server.address, ("vllm:nothing",))
    finally:
        server.shutdown()
        server.server_close()


GUIDELLM = """#!{python}
import json, sys
asked = dict(zip(sys.argv[3::2], sys.argv[4::2]))
path, done = asked["--output"].partition("path=")[2], {done}
rate = lambda at: dict(time_to_first_token_ms=100 * at, inter_token_latency_ms=10, output_tokens_per_second=50 * at)
run = lambda at: {{name: {{"successful": {{"median": of, "mean": of}}}} for name, of in rate(at).items()}}
loads = [int(at) for at in sys.argv[sys.argv.index("profile.streams") + 1].split(",")]
runs = [{{"metrics": run(at) | {{"request_totals": {{"successful": done, "errored": 6 - done}}}}}} for at in loads]
json.dump({{"benchmarks": runs}}, open(path, "w"))
"""


@pytest.mark.parametrize("done", [6, 5])
def test_guidellm_is_asked_for_each_load_and_no_request_may_fail(
    done, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/engines")  # as when it is run
    served, command = program("benchmarks/engines/served"), tmp_path / "guidellm"
    command.write_text(GUIDELLM.format(python=sys.executable, done=done))
    command.chmod(0o755)
    asked = argparse.Namespace(guidellm=command, loads=[1, 4], requests=6, new=16)
    ask = partial(
        served.asked_by_guidellm, asked, 64, tmp_path, count(1), "http://127.0.0.1:1"
    )
    if done < 6:
        with pytest.raises(SystemExit, match="of 6 requests, 1 at once"):
            ask()
        return
    sample = ask()
    assert sample[4] == {"first_ms": 400, "between_ms": 10, "tokens_per_s": 200}
    faster = {
        load: {name: value / (2 if "ms" in name else 0.5) for name, value in of.items()}
        for load, of in sample.items()
    }
    dense, half = served.rows_of({"dense": [sample] * 3, "half": [faster] * 3}, 64, [4])
    assert (dense.model, dense.tokens_speedup.median, dense.first_ms.n) == (
        "dense",
        1,
        3,
    )
    assert (
        half.first_speedup.median,
        half.between_speedup.median,
        half.tokens_speedup.median,
    ) == (2, 2, 2)
