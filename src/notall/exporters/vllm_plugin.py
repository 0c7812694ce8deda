"""vLLM's native models, with layers as a regrouped checkpoint has them: one attention
each, MLPs before and after.

vLLM calls `register` in each of its processes, by the entry point
`vllm.general_plugins`. Each model is vLLM's own, but that the function that makes its
list of layers is replaced while it is built. In vLLM a layer hands on (hidden,
residual), and the next norm adds them: what is left out passes the pair on, at no cost.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..engines.vllm import NATIVE
from ..errors import UsageError
from ..structure.undoing import Undo
from .prompt_code import BASES as PROMPT_BASES, CAUSAL, PromptCode
from .remote_code import FAMILIES, classes_of, model_type_of

# The module of vLLM's in which the layers are made, where it is not the one named as
# the architecture.
LAYERS_IN = {"mistral": "llama", "qwen3": "qwen2", "phi3": "llama"}
# The modules of an MLP, where vLLM calls them otherwise than transformers.
MLP_IN = {
    "phi3": ("post_attention_layernorm", "mlp"),
    "mixtral": ("post_attention_layernorm", "block_sparse_moe"),
}


def register() -> None:
    """Make vLLM and its transformers know the regrouped forms of `NATIVE`. Nothing of
    the models is imported yet.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm import ModelRegistry

    for base in NATIVE:
        name, model_type = classes_of(base), model_type_of(base)
        config = type(
            name["AutoConfig"], (CONFIG_MAPPING[base],), {"model_type": model_type}
        )
        AutoConfig.register(model_type, config, exist_ok=True)
        ModelRegistry.register_model(name[CAUSAL], f"{__name__}:{name[CAUSAL]}")
    for base in PROMPT_BASES:
        code = PromptCode(base)
        config = type(
            code.classes["AutoConfig"],
            (CONFIG_MAPPING[base],),
            {"model_type": code.model_type},
        )
        AutoConfig.register(code.model_type, config, exist_ok=True)
        ModelRegistry.register_model(
            code.classes[CAUSAL], f"{__name__}:{code.classes[CAUSAL]}"
        )


def __getattr__(name: str) -> Any:
    """The class that was registered by this name, made when vLLM first asks for it."""
    for base in NATIVE:
        if classes_of(base)[CAUSAL] == name:
            return _model(base)
    for base in PROMPT_BASES:
        if PromptCode(base).classes[CAUSAL] == name:
            return _prompt_model(base) if base in NATIVE else _refusing(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model(base: str) -> type:
    stock: Any = getattr(_vllm_module(base), f"{FAMILIES[base].name}ForCausalLM")

    class Model(stock):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            with Undo() as undo, _regrouping(base, vllm_config, undo):
                super().__init__(vllm_config=vllm_config, prefix=prefix)

    Model.__name__ = Model.__qualname__ = classes_of(base)[CAUSAL]
    return Model


@functools.cache
def _prompt_model(base: str) -> type:
    from .vllm_prompts import prompt_model

    stock: Any = getattr(_vllm_module(base), f"{FAMILIES[base].name}ForCausalLM")
    made: type = prompt_model(stock, _vllm_module(LAYERS_IN.get(base, base)))
    made.__name__ = made.__qualname__ = PromptCode(base).classes[CAUSAL]
    made.__module__ = __name__
    return made


@functools.cache
def _refusing(base: str) -> type:
    """A class that is never built: vLLM has none of its own for `base`, and its backend
    would skip for every token.
    """
    stock: Any = _vllm_module("llama").LlamaForCausalLM

    class Refused(stock):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            problem = (
                "this checkpoint skips sublayers in the prompt alone, which notall"
                f" does not run in vLLM for {base}"
            )
            raise UsageError(
                f"{problem}; serve the original model, or load this one with transformers"
            )

    Refused.__name__ = Refused.__qualname__ = PromptCode(base).classes[CAUSAL]
    return Refused


def _vllm_module(base: str) -> Any:
    return importlib.import_module(
        f"vllm.model_executor.models.{base.removesuffix('_text')}"
    )


def _regrouping(base: str, vllm_config: Any, undo: Undo) -> Undo:
    """Have vLLM build the layers of `base` as the config of the checkpoint says, until
    `undo` is left.
    """
    module = _vllm_module(LAYERS_IN.get(base, base))
    names = MLP_IN.get(base, FAMILIES[base].mlp)
    make_layers = module.make_layers

    def regrouped(count: int, make: Callable[..., nn.Module], prefix: str) -> Any:
        return make_layers(
            count,
            functools.partial(_regrouped_layer, make, names, vllm_config),
            prefix=prefix,
        )

    return undo.put(vars(module), "make_layers", regrouped)


def _regrouped_layer(
    make: Callable[..., Any], names: Sequence[str], vllm_config: Any, prefix: str
) -> nn.Module:
    """The layer that `make` makes at `prefix`, with the MLPs, modules of these `names`,
    that it has or lacks.
    """
    layers, _, place = prefix.rpartition(".")
    parts = vllm_config.model_config.hf_config.sublayers[int(place)]
    known = vllm_config.compilation_config

    def forget(path: str) -> None:
        """What vLLM would hold a cache for, or wait for as experts to run."""
        for name in [
            name for name in known.static_forward_context if name.startswith(f"{path}.")
        ]:
            del known.static_forward_context[name]
        known.static_all_moe_layers[:] = [
            n for n in known.static_all_moe_layers if not n.startswith(f"{path}.")
        ]

    def mlps(where: str) -> nn.ModuleList:
        found = nn.ModuleList()
        for number, _ in enumerate(parts[where]):
            path = (  # vLLM takes the last for a number
                f"{layers}.{where}_{number}.{place}"
            )
            found.append(MLP(make(prefix=path), names))
            forget(f"{path}.self_attn")
        return found

    before, layer, after = (
        mlps("before"),
        make(prefix=prefix),
        mlps("after"),
    )  # as they run: vLLM counts experts
    layer.__class__ = _regrouped_class(type(layer))  # type: ignore[arg-type]
    layer.before, layer.after = before, after
    if parts["mlp"] is None:
        norm, *rest = names
        setattr(layer, norm, Passed())
        for name in rest:
            forget(f"{prefix}.{name}")
            setattr(layer, name, nn.Identity())
    return layer


@functools.cache
def _regrouped_class(layer_class: Any) -> Any:
    class Regrouped(layer_class):
        def forward(
            self,
            positions: Tensor,
            hidden: Tensor,
            residual: Tensor | None,
            **kwargs: Any,
        ) -> Any:
            for mlp in self.before:
                hidden, residual = mlp(hidden, residual)
            hidden, residual = super().forward(positions, hidden, residual, **kwargs)
            for mlp in self.after:
                hidden, residual = mlp(hidden, residual)
            return hidden, residual

    return Regrouped


class Passed(nn.Module):
    """Stands for the norm before an MLP that was left out."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are."""
        return hidden, residual


class MLP(nn.Module):
    """An MLP without an attention, with its norms, from a layer of vLLM's; both
    tensors, (tokens, hidden), add up.
    """

    def __init__(self, layer: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in names:
            setattr(self, name, getattr(layer, name))

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream behind it, as vLLM splits it in two."""
        norm, *rest = (getattr(self, name) for name in self.names)
        if residual is None:  # ahead of the first attention
            hidden, residual = norm(hidden), hidden
        else:
            hidden, residual = norm(hidden, residual)
        for module in rest:
            hidden = module(hidden)
        return hidden, residual
