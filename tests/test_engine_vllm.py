"""vLLM runs exports: the regrouped form natively and through transformers, ordinary
ones, and nemotron-nas.
"""

import json
import os
import sys

import pytest
import torch

import engines
from api import VLLM, call, weight_bytes
from families import family
from notall import Plan, Source, TrainConfig, export, heal, repair, skip
from programs import program
from tiny_tokenizer import VOCABULARY, byte_tokenizer

pytestmark = [engines.needs("vllm"), pytest.mark.timeout(900)]

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)
# An MLP ahead of the first attention, an attention alone, a whole block and an MLP
# behind it.
MIXED = Plan(attention=[0, 3], mlp=[1])
PORTABLE = Plan(attention=[2], mlp=[1])
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": len(VOCABULARY),
}
PROMPTS = [[5, 9, 77, 31, 62, 8, 120], [44, 3, 250]]
NEW = 6
CHANGED = {
    "mistral": {"sliding_window": None},
    "gemma2": {
        "final_logit_softcapping": 30.0
    },  # a lower cap makes likely tokens alike
}


@pytest.fixture
def written(tmp_path):
    """A function that exports a tiny model with a tokenizer: the original model and the
    folder.
    """

    def write(name, plan, target="hf", **changes):
        model = family(name).build(**SIZES | changes)
        out = export(
            Source(model, byte_tokenizer()),
            plan,
            target,
            tmp_path / "out",
            verify=False,
        )
        return model, out

    return write


def start(folder, **options):
    from vllm import LLM
    from vllm.model_executor.models import registry

    # vLLM looks at each class of models in a process of its own, to leave CUDA alone
    # here: most of what a start took.
    registry._run_in_subprocess = lambda look: look()
    options = {"enforce_eager": True, "trust_remote_code": False} | options
    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        disable_log_stats=True,
        **options,
    )


def layers_with_cache(llm):
    groups = (
        llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    )
    return sorted(name for group in groups for name in group.layer_names)


def assert_same_answers(llm, model, plan):
    """The log-probabilities of the likeliest tokens, of prompts and of what is
    generated, and the tokens.
    """
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=5, logprobs=5, ignore_eos=True
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], asked, use_tqdm=False
    )
    for prompt, answer in zip(PROMPTS, answers):
        said = list(answer.outputs[0].token_ids)
        with skip(model, plan), torch.no_grad():
            logprobs = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        found = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        assert len(found) == len(prompt) - 1 + NEW
        for place, likeliest in zip(logprobs, found):
            for token, value in likeliest.items():
                assert value.logprob == pytest.approx(float(place[token]), abs=2e-4)
        assert said == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma3",
        "gemma2",
        "phi3",
        "mixtral",
        "qwen3_moe",
    ],
)
def test_native_classes_run_the_regrouped_form_without_trust(written, name):
    model, folder = written(name, MIXED, **CHANGED.get(name, {}))
    llm = start(folder)
    assert layers_with_cache(llm) == [
        "model.layers.0.self_attn.attn",
        "model.layers.1.self_attn.attn",
    ]
    from api import vllm_plugin

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert type(runner.get_model()).__module__ == vllm_plugin.__name__
    assert_same_answers(llm, model, MIXED)
    engines.works(
        "vLLM", "vllm-cpu", "hf", name, "any", "native classes, no trust flag"
    )


@pytest.mark.parametrize("plan", [Plan(), MIXED], ids=["dense", "mixed"])
def test_a_front_scores_as_the_model_and_holds_eight_bits_in_less_room(
    written, plan, tmp_path
):
    model, folder = written("llama", plan)
    engine, packed = VLLM(1), tmp_path / "packed"
    engine.quantise(folder, "int8", packed)
    with skip(model, plan), torch.no_grad():
        logprobs = [
            model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            for prompt in PROMPTS
        ]
    expected = [
        rows.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
        for rows, prompt in zip(logprobs, PROMPTS)
    ]
    found = [
        call(engine, "score", checkpoint=one, windows=PROMPTS)
        for one in (folder, packed)
    ]
    for exact, rounded, values in zip(*found, expected):
        assert exact == pytest.approx((-values).tolist(), abs=2e-4)
        assert rounded != exact
        assert sum(rounded) / len(rounded) == pytest.approx(
            sum(exact) / len(exact), abs=0.1
        )
    assert weight_bytes(packed) < 0.6 * weight_bytes(folder)
    assert engine.version[0].isdigit()
    taken = call(engine, "time", checkpoint=packed, prompt=PROMPTS[0] * 4, new=4)
    assert taken["prefill_ms"] > 0
    assert taken["decode_ms_per_token"] > 0


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_native_classes_compile(name, written):
    model, folder = written(name, MIXED)
    assert_same_answers(start(folder, enforce_eager=False), model, MIXED)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_transformers_backend_runs_the_regrouped_form(written, name):
    model, folder = written(name, MIXED)
    llm = start(folder, trust_remote_code=True, model_impl="transformers")
    assert len(layers_with_cache(llm)) == 2
    assert_same_answers(llm, model, MIXED)
    engines.works(
        "vLLM",
        "vllm-cpu",
        "hf",
        name,
        "any",
        "transformers backend, `--trust-remote-code`",
    )


def test_a_portable_export_is_an_ordinary_model(written):
    model, folder = written("llama", PORTABLE)
    llm = start(folder)
    assert len(layers_with_cache(llm)) == 3
    assert_same_answers(llm, model, PORTABLE)
    engines.works("vLLM", "vllm-cpu", "hf", "llama", "portable")


@pytest.mark.parametrize("plan", [PORTABLE, MIXED], ids=["portable", "regrouped"])
def test_repaired_and_healed_weights_are_served(plan, tmp_path):
    model = family("llama").build(**SIZES)
    texts = list(
        torch.randint(
            3, 93, (256, 12), generator=torch.Generator().manual_seed(0)
        ).split(16)
    )
    repaired = repair(model, plan, texts)
    healed = heal(model, repaired, texts[1:], texts[:1], TrainConfig(rate=1e-3))
    assert healed.digest != repaired.digest, "it was not trained"
    assert {path.split(".")[-2] for path in healed.weights} >= {
        "o_proj",
        "down_proj",
        "input_layernorm",
    }
    out = export(
        Source(model, byte_tokenizer()), healed, "hf", tmp_path / "out", verify=False
    )
    llm = start(out)
    assert_same_answers(llm, model, healed)
    with pytest.raises(AssertionError):
        assert_same_answers(llm, model, healed.unrepaired)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_nemotron_nas_runs(written, name):
    plan = Plan(attention=[2], mlp=[1, 3])
    model, folder = written(name, plan, "nemotron-nas")
    llm = start(folder, trust_remote_code=True)
    assert len(layers_with_cache(llm)) == 3
    assert_same_answers(llm, model, plan)
    how = "`--trust-remote-code`, first attention kept"
    engines.works("vLLM", "vllm-cpu", "nemotron-nas", name, "any", how)


def test_the_server_completes_as_transformers_does(written, tmp_path):
    model, folder = written("llama", MIXED)
    tokenizer, text = byte_tokenizer(), "The server says"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with skip(model, MIXED):
        said = model.generate(ids, max_new_tokens=NEW, do_sample=False)[
            0, ids.shape[1] :
        ]
    load = program("benchmarks/engines/load")
    asked = {
        "model": load.NAME,
        "prompt": ids[0].tolist(),
        "max_tokens": NEW,
        "temperature": 0,
        "ignore_eos": True,
    }
    with load.serving(
        sys.executable, folder, tmp_path / "log", 4, 64, "--enforce-eager"
    ) as address:
        answer = json.load(
            load.post(address, "/v1/completions", asked | {"return_token_ids": True})
        )
    assert answer["choices"][0]["token_ids"] == said.tolist()
    engines.works(
        "vLLM", "vllm-cpu", "hf", "llama", "any", "the OpenAI server, no trust flag"
    )


def test_the_server_bears_many_requests_at_once_as_it_does_of_the_dense_model(tmp_path):
    load = program("benchmarks/engines/load")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    model = family("llama").build(**SIZES | {"max_position_embeddings": 512})
    found = {}
    for name, plan in {"dense": Plan(), "export": MIXED}.items():
        out = export(
            Source(model, tokenizer), plan, "hf", tmp_path / name, verify=False
        )
        with load.serving(
            sys.executable, out, tmp_path / f"{name}.log", 8, 512, "--enforce-eager"
        ) as address:
            found[name] = load.bear(address, 160, 8, 4 * NEW)
    assert load.compared(found) == []
