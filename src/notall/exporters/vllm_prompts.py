"""vLLM's native models that skip sublayers for a prompt's tokens alone, as a checkpoint
of `hf` says.

In vLLM the tokens of all requests lie in one row. Those of a prompt but its last ones
skip; these and all that is generated run whole. How long a prompt is tells the model
runner, ahead of each forward: a chunk of a prompt, a prompt whose beginning is in the
cache, and a request that was preempted keep to it. The layers then split the row:

- a skipped MLP runs for the whole tokens alone, and what stands in for it, if anything,
  for the others;
- an attention that runs may have keys and values of its own for the tokens that skip;
- a skipped attention first writes keys and values of the tokens that skip; then it runs
  for the whole ones alone, by metadata that has these as its queries. In vLLM the
  queries of a request are the last of its keys, as these are.

How many tokens skip changes from step to step, so such a step runs as it is written. A
step without them, as all that only generate are, runs what vLLM compiled or captured.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UsageError
from ..running.stand_in import normalised
from ..strict_json import Settings
from ..structure.undoing import Undo
from .vllm_steps import RowsOfStep

PROMPT_MODULE = (
    "prompt_kv_proj"  # the module that makes keys and values of tokens that skip
)
PROJECTION = re.compile(r"(.*layers\.(\d+)\.self_attn\.)([kv]_proj)(\..+)")
CANNOT = (
    "this checkpoint skips sublayers in the prompt alone, and notall does not run it in"
    " vLLM"
)
# of a checkpoint, as vLLM's loader has it
STACKED = {f".prompt_{one}_proj": (f".{PROMPT_MODULE}", one) for one in "kv"}


@functools.cache
def prompt_model(stock: Any, layers_in: Any) -> Any:
    """A class of vLLM's, `stock`, that skips what its config says; `layers_in` makes
    its layers.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.models.utils import WeightsMapper

    class Model(stock):
        packed_modules_mapping = stock.packed_modules_mapping | {
            PROMPT_MODULE: [name[1:] for name in STACKED]
        }

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            refuse(vllm_config)
            skips = vllm_config.model_config.hf_config.prompt_skips
            step = RowsOfStep(skips["last_tokens"])
            with Undo() as undo, _skipping(layers_in, vllm_config, skips, step, undo):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.prompt_skips, self.prompt_step = skips, step
            self.model.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_stacked=STACKED)
            _attach_to_runner()

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
        ) -> Any:
            try:
                if self.prompt_step.splits:
                    context = get_forward_context()
                    context.skip_compiled = True
                    self.prompt_step.part(context, positions.device)
                return super().forward(
                    input_ids, positions, intermediate_tensors, inputs_embeds
                )
            finally:
                self.prompt_step.leave()

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return super().load_weights(_with_own(weights, self.prompt_skips))

    return Model


def refuse(vllm_config: Any) -> None:
    """Raise `UsageError` for what was not seen to answer as transformers does."""
    parallel = vllm_config.parallel_config
    refused = {
        "vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0": (
            vllm_config.use_v2_model_runner
        ),
        "LoRA adapters": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "a transfer of the KV cache": vllm_config.kv_transfer_config is not None,
        "micro-batches": parallel.use_ubatching,
        "context parallelism": (
            parallel.decode_context_parallel_size
            * parallel.prefill_context_parallel_size
            > 1
        ),
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise UsageError(f"{CANNOT} with {what}")


def _attach_to_runner() -> None:
    """Have vLLM's model runner tell a model of this module which tokens are a prompt's,
    ahead of each forward, and neither pad nor replay a forward in which some skip.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner

    prepare, dispatch = (
        Runner._prepare_inputs,
        Runner._determine_batch_execution_and_padding,
    )
    if getattr(prepare, "tells_prompts", False):
        return

    @functools.wraps(prepare)
    def prepared(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, scheduler_output, *args, **kwargs)
        if step := _step_of(self):
            step.enter(*_tokens(self, scheduler_output))
        return found

    @functools.wraps(dispatch)
    def dispatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (step := _step_of(self)) and step.splits:
            kwargs["force_eager"] = True
        return dispatch(self, *args, **kwargs)

    prepared.tells_prompts = True  # type: ignore[attr-defined]
    Runner._prepare_inputs = prepared
    Runner._determine_batch_execution_and_padding = dispatched


def _step_of(runner: Any) -> RowsOfStep | None:
    """What a runner's model skips in its next forward, if it is of this module."""
    return getattr(runner.get_model(), "prompt_step", None)


def _tokens(runner: Any, scheduler_output: Any) -> tuple[NDArray[Any], ...]:
    """Of each request of a batch: tokens in the cache, tokens that run, and tokens of
    the prompt.

    One that asks for the log-probabilities of its prompt has no tokens of a prompt, and
    so runs whole.
    """
    batch = runner.input_batch
    names = batch.req_ids[: batch.num_reqs]
    scheduled = np.array(
        [scheduler_output.num_scheduled_tokens[name] for name in names]
    )
    params = [runner.requests[name].sampling_params for name in names]
    asked = [getattr(one, "prompt_logprobs", None) is not None for one in params]
    prompts = np.where(asked, 0, batch.num_prompt_tokens[: batch.num_reqs])
    return batch.num_computed_tokens_cpu[: batch.num_reqs], scheduled, prompts


def _skipping(
    module: Any, vllm_config: Any, skips: Settings, step: RowsOfStep, undo: Undo
) -> Undo:
    """Have vLLM build layers that skip, until `undo` is left."""
    make_layers = module.make_layers
    backend_of: Any = functools.cache(functools.partial(_backend, step))

    def skipping(count: int, make: Callable[..., nn.Module], prefix: str) -> Any:
        def made(prefix: str) -> nn.Module:
            layer: Any = make(prefix=prefix)
            index = int(prefix.rpartition(".")[2])
            layer.skips_attention, layer.skips_mlp = (
                index in skips[kind] for kind in ("attention", "mlp")
            )
            own = skips["projections"].get(str(index), {})
            if layer.skips_attention or own:
                _write_own(
                    layer.self_attn,
                    any(own.values()),
                    vllm_config.quant_config,
                    f"{prefix}.self_attn",
                )
            if layer.skips_attention:
                attention = layer.self_attn.attn
                attention.attn_backend = backend_of(attention.attn_backend)
                step.attentions.append(attention.layer_name)
            elif own:
                hook = functools.partial(_with_early, step, layer.self_attn)
                layer.self_attn.qkv_proj.register_forward_hook(hook)
            if index in skips["stand_ins"]:
                width = layer.self_attn.hidden_size
                layer.prompt_mlp = nn.Linear(width, width)
            kind: type = type(layer)
            layer.prompt_step, layer.__class__ = step, _skipping_class(kind)
            return layer

        return make_layers(count, made, prefix=prefix)

    return undo.put(vars(module), "make_layers", skipping)


def _write_own(attention: Any, has_bias: bool, quantisation: Any, prefix: str) -> None:
    """Give an attention a projection without queries, for tokens that skip it."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    made = QKVParallelLinear(
        attention.hidden_size,
        attention.head_dim,
        total_num_heads=0,
        total_num_kv_heads=attention.total_num_kv_heads,
        bias=has_bias or attention.qkv_proj.bias is not None,
        quant_config=quantisation,
        prefix=f"{prefix}.{PROMPT_MODULE}",
    )
    if made.bias is not None:
        made.bias.data.zero_()  # one of keys and values may have none
    setattr(attention, PROMPT_MODULE, made)


def _with_early(
    step: RowsOfStep, attention: Any, projection: Any, args: Any, output: Any
) -> Any:
    """What an attention that runs projects, (tokens, queries, keys and values), with
    keys and values of their own for the tokens that skip.
    """
    if not step.splits:
        return output
    both, _ = getattr(attention, PROMPT_MODULE)(args[0][step.early])
    projected, *rest = output
    projected[step.early, attention.q_size :] = both
    return projected, *rest


def _with_own(
    weights: Iterable[tuple[str, Tensor]], skips: Settings
) -> Iterator[tuple[str, Tensor]]:
    """Also the projections of tokens that skip, where a layer has a place for some and
    they are those of all others.
    """
    for name, weight in weights:
        yield name, weight
        found = PROJECTION.fullmatch(name)
        if found is None:
            continue
        before, index, projection, kind = found.groups()
        own = skips["projections"].get(index, {})
        if (own or int(index) in skips["attention"]) and projection not in own:
            # another tensor of the same numbers: vLLM marks each with where it goes
            yield f"{before}prompt_{projection}{kind}", weight.detach()


def _backend(step: RowsOfStep, stock: Any) -> Any:
    """An attention backend of vLLM's, `stock`, whose metadata is that of the whole
    tokens.
    """
    from vllm.v1.attention.backend import subclass_attention_backend

    if stock.forward_includes_kv_cache_update:
        writes = (
            f"{stock.get_name()}, which writes keys and values as it attends: choose"
            " another backend"
        )
        raise UsageError(f"{CANNOT} with {writes}")

    class Builder(stock.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, *more: Any
        ) -> Any:
            common = common_attn_metadata
            if step.counts is not None and step.counts.any():
                common = step.of_whole(common)
            return super().build(common_prefix_len, common, *more)

    return subclass_attention_backend("Prompt", stock, Builder)


@functools.cache
def _skipping_class(layer_class: Any) -> Any:
    class Skipping(layer_class):
        def forward(
            self,
            positions: Tensor,
            hidden: Tensor,
            residual: Tensor | None,
            **kwargs: Any,
        ) -> Any:
            if not self.prompt_step.splits or not (
                self.skips_attention or self.skips_mlp
            ):
                return super().forward(positions, hidden, residual, **kwargs)
            stream = (
                hidden if residual is None else hidden + residual
            )  # (tokens, hidden)
            if self.skips_attention:
                self.write(
                    stream[self.prompt_step.early], positions[self.prompt_step.early]
                )
            stream = stream + self.added(
                self.skips_attention, self.attend, stream, positions
            )
            made = self.added(self.skips_mlp, self.transform, stream)
            if hasattr(self, "prompt_mlp"):
                early = self.prompt_step.early
                made[early] = self.prompt_mlp(normalised(stream[early]))
            return made, stream

        def added(
            self,
            is_skipped: bool,
            run: Callable[..., Tensor],
            stream: Tensor,
            *more: Tensor,
        ) -> Tensor:
            """What a sublayer adds to the stream, (tokens, hidden): nothing where
            tokens skip it.
            """
            if not is_skipped:
                return run(stream, *more)
            found, whole = torch.zeros_like(stream), self.prompt_step.whole
            if len(whole):
                found[whole] = run(stream[whole], *(one[whole] for one in more))
            return found

        def attend(self, stream: Tensor, positions: Tensor) -> Tensor:
            return self.self_attn(
                positions=positions, hidden_states=self.input_layernorm(stream)
            )

        def transform(self, stream: Tensor) -> Tensor:
            return self.mlp(self.post_attention_layernorm(stream))

        def write(self, stream: Tensor, positions: Tensor) -> None:
            """Write keys and values of tokens that skip, (tokens, hidden), to the
            cache.
            """
            attention, to = self.self_attn, self.self_attn.attn
            both, _ = getattr(attention, PROMPT_MODULE)(self.input_layernorm(stream))
            keys, values = (one.contiguous() for one in both.chunk(2, dim=-1))
            if hasattr(attention, "k_norm"):
                keys = attention.k_norm(
                    keys.unflatten(-1, (-1, attention.head_dim))
                ).flatten(-2)
            keys = attention.rotary_emb(positions, torch.zeros_like(keys), keys)[1]
            shape = (-1, attention.num_kv_heads, attention.head_dim)
            slots = self.prompt_step.slots[to.layer_name]
            to.impl.do_kv_cache_update(
                to, keys.view(shape), values.view(shape), to.kv_cache, slots
            )

    return Skipping
