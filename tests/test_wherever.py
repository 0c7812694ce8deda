"""A skipped model works wherever a model is used, and says there what its slow twin
says.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from api import locating, relative_error
from families import TRANSFORMERS_5, family, silenced
from notall import Plan, locate, skip

pytestmark = [pytest.mark.slow, pytest.mark.each_release]

PLAN = Plan([0, 2], [2, 3])
BATCH = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(5))
ONE = BATCH[:1]
NAMES = [
    "llama",
    "olmo3",
    "falcon (parallel)",
]  # plain, norms behind and windows, a parallel block


def slow_logits(
    model: PreTrainedModel, name: str, tokens: Tensor, plan: Plan = PLAN
) -> Tensor:
    with silenced(model, family(name), plan.attention, plan.mlp), torch.no_grad():
        return model(tokens, use_cache=False).logits


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(found, expected)
    assert error <= tolerance, f"off by {error:.1e}"


def needs(package: str) -> Any:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 20}],
    ids=["beams", "sampling"],
)
def test_generate(name: str, options: dict[str, Any]) -> None:
    model = family(name).build("sdpa")
    options = {"max_new_tokens": 8, "do_sample": False} | options

    def run() -> Tensor:
        torch.manual_seed(0)
        return model.generate(BATCH, attention_mask=torch.ones_like(BATCH), **options)

    with skip(model, PLAN):
        found = run()
    with silenced(model, family(name), PLAN.attention, PLAN.mlp):
        slow = run()
    assert torch.equal(found, slow)
    assert not torch.equal(found, run())


@pytest.mark.parametrize("name", NAMES)
def test_assisted_generation(name: str) -> None:
    target, draft = family(name).build("sdpa"), family(name).build("sdpa")

    def run(**options: Any) -> Tensor:
        return target.generate(
            ONE,
            attention_mask=torch.ones_like(ONE),
            max_new_tokens=8,
            do_sample=False,
            **options,
        )

    dense = run()
    with skip(draft, PLAN):
        assert torch.equal(run(assistant_model=draft), dense)
    with skip(target, PLAN):
        assert torch.equal(run(assistant_model=draft), run())


@pytest.mark.parametrize("first", ["dense", "skipped"])
@pytest.mark.parametrize("name", [*NAMES, "gpt2"])
def test_hidden_states_follow_the_live_layers(name: str, first: str) -> None:
    model = family(name).build("eager")
    plan = Plan([0, 2], [2])

    def states() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return model(BATCH, output_hidden_states=True).hidden_states

    before = states() if first == "dense" else None
    with skip(model, plan):
        skipped = states()
    after = states()
    assert len(skipped) == 3  # the embedding, and two live attentions
    assert len(after) == 5
    with silenced(model, family(name), plan.attention, plan.mlp):
        slow = states()
    # The first live layer begins with the MLP of block 0; the second, block 3, ends in
    # the final norm.
    for found, expected in zip(skipped, (slow[0], slow[3], slow[4])):
        close(found, expected)
    for found, expected in zip(after, before or after):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*NAMES, "mixtral"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = family(name).build("sdpa")
    with skip(model, PLAN):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(BATCH, labels=BATCH, use_cache=False).loss.backward()
        checkpointed = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        model.gradient_checkpointing_disable()
        model(BATCH, labels=BATCH, use_cache=False).loss.backward()
        for parameter, weight in model.named_parameters():
            if "experts" in parameter and not TRANSFORMERS_5:
                continue  # one module an expert, and not every expert is sent a token
            assert checkpointed[parameter] is not None, parameter
            close(checkpointed[parameter], weight.grad)
    silent = [weight for weight in model.parameters() if weight.grad is None]
    assert silent, "what is skipped gets no gradient"


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler",
)
@pytest.mark.slow
def test_compiled_whole_with_a_static_cache() -> None:
    from transformers import StaticCache

    from api import cache_argument

    model = family("gemma3").build("sdpa")
    with skip(model, PLAN), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        assert len(cache.layers) == 2
        torch._dynamo.reset()
        # whole on both lines; machine code takes long to make, and once will do
        backend = "inductor" if TRANSFORMERS_5 else "aot_eager"
        step = torch.compile(model.forward, fullgraph=True, backend=backend)
        found = []
        for start, end in ((0, 6), (6, 7), (7, 8)):
            where = torch.arange(start, end)
            extra = {} if TRANSFORMERS_5 else {"cache_position": where}
            output = step(
                BATCH[:, start:end],
                position_ids=where[None],
                **{cache_argument(model): cache},
                **extra,
            )
            found.append(output.logits)
    close(torch.cat(found, 1), slow_logits(model, "gemma3", BATCH))


@pytest.mark.skipif(
    not TRANSFORMERS_5,
    reason="continuous batching runs on a CPU from transformers 5 on",
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continuous_batching(name: str) -> None:
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model = family(name).build("sdpa")
    small = ContinuousBatchingConfig(
        num_blocks=8, max_batch_tokens=64
    )  # by default it takes most of the memory
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": -1,
        "pad_token_id": 0,
    }
    prompts = [BATCH[0].tolist(), BATCH[1, :5].tolist()]
    with skip(model, PLAN):
        answers = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(**options),
            continuous_batching_config=small,
        )
        found = sorted(answer.generated_tokens for answer in answers.values())
        slow = sorted(
            model.generate(torch.tensor([tokens]), max_new_tokens=6, do_sample=False)[
                0, len(tokens) :
            ].tolist()
            for tokens in prompts
        )
    assert found == slow


@pytest.mark.parametrize("name", ["llama", "falcon (parallel)"])
def test_weights_offloaded_by_accelerate(name: str, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    dense = family(name).build("sdpa")
    expected = slow_logits(dense, name, BATCH)
    layers = locate(dense).layers
    places = {
        n: "cpu"
        for n, m in dense.named_modules()
        if n and not n.startswith(layers) and not list(m.children())
    }
    places |= {
        f"{layers}.{i}": place for i, place in enumerate(["cpu", "disk", "disk", "cpu"])
    }
    places = {
        n: p
        for n, p in places.items()
        if any(True for _ in dense.get_submodule(n).parameters())
    } | {
        n: "cpu"
        for n, m in dense.named_modules()
        if n
        and not list(m.parameters())
        and not n.startswith(layers)
        and not list(m.children())
    }
    model = dispatch_model(
        copy.deepcopy(dense),
        places,
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    with torch.no_grad():
        before = model(BATCH).logits
        with skip(model, PLAN):
            close(model(BATCH).logits, expected)
            close(
                model.generate(
                    BATCH,
                    max_new_tokens=1,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits[0],
                expected[:, -1],
            )
        assert torch.equal(model(BATCH).logits, before)


def test_a_model_whose_embedding_is_offloaded_too_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies on the meta device, as a model without weights does, of which only the
    structure is read.
    """
    from accelerate import disk_offload

    model = family("llama").build("sdpa")
    disk_offload(model, str(tmp_path))
    assert next(model.parameters()).device.type == "meta"
    proved: list[Any] = []
    monkeypatch.setattr(locating, "prove", lambda *layer: proved.append(layer))
    locate(model)
    assert len(proved) == 4


@needs("peft")
@pytest.mark.parametrize("order", ["before", "wrapped"])
def test_lora(order: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = family("llama").build("sdpa")
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
        ),
    )
    wrapped.eval()
    expected = slow_logits(wrapped.get_base_model(), "llama", BATCH)
    through = wrapped if order == "wrapped" else wrapped.get_base_model()
    with skip(through, PLAN), torch.no_grad():
        close(wrapped(BATCH).logits, expected)
        live = [name for name, p in wrapped.named_parameters() if p.requires_grad]
        assert len(live) == 2 * (
            2 * 2 + 2
        )  # two attentions with two adapters and two MLPs with one, A and B each
    with wrapped.disable_adapter(), torch.no_grad():
        assert relative_error(slow_logits(model, "llama", BATCH), expected) > 1e-3


@needs("torchao")
def test_int8_weights_by_torchao() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = family("llama").build("sdpa")
    quantize_(model, Int8WeightOnlyConfig())
    expected = slow_logits(model, "llama", BATCH)
    with skip(model, PLAN), torch.no_grad():
        close(model(BATCH).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    model = family(name).build("sdpa").to(torch.bfloat16)
    expected = slow_logits(model, name, BATCH)
    with skip(model, PLAN), torch.no_grad():
        close(model(BATCH).logits, expected, 2e-2)


@pytest.mark.long
@pytest.mark.any_transformers  # it is torch's; the mask is that of any other attention
@pytest.mark.slow
def test_flex_attention() -> None:
    model = family("mistral").build("flex_attention", head_dim=16)
    tokens = BATCH.repeat(
        1, 4
    )  # on a CPU, torch 2.13 answers noise for fewer than 16 tokens
    expected = slow_logits(model, "mistral", tokens)
    with skip(model, PLAN), torch.no_grad():
        close(model(tokens).logits, expected)


# In transformers 4.57 an OLMoE layer answers one router output, so that of an MLP that
# rides along is not in the list.
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", *(["olmoe"] if TRANSFORMERS_5 else [])]
)
def test_router_outputs_follow_the_live_layers(name: str) -> None:
    model, plan = family(name).build("eager"), Plan([0, 2], [2])
    with silenced(model, family(name), plan.attention, plan.mlp), torch.no_grad():
        slow = model(BATCH, output_router_logits=True).router_logits
    routers = {i for i in range(4) if not (name == "qwen3_moe" and i == 1)}
    with skip(model, plan), torch.no_grad():
        output = model(BATCH, output_router_logits=True, labels=BATCH)
    found = [logits for logits in output.router_logits if logits is not None]
    assert output.aux_loss is not None
    live = sorted(routers - set(plan.mlp))
    dense_order = sorted(routers)
    assert len(found) == len(live), (
        f"{len(found)} router outputs for {len(live)} live routers"
    )
    for logits, index in zip(found, live):
        close(logits, slow[dense_order.index(index)])
