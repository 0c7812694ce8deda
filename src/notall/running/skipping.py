"""Leave sublayers out of a live model: for a while (`skip`) or for good (`remove`).

The live sublayers are cut again into layers that own exactly one attention each, or another mixer; an MLP that lost
its attention rides along behind the layer before it (or ahead of the first). So `layer_idx` counts the layers that are
left, and whatever counts layers, caches and masks first of all, is right by construction.
This is the only file that changes a live model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UsageError
from ..records.plan import Plan
from ..structure import locating
from ..structure.anatomy import Anatomy, Block, Sublayer, base_model, text_config
from ..structure.locating import locate
from ..structure.observation import LayerCall, child, parameter_names, run_branches
from ..structure.slicing import as_it_is, is_told, renumber, slice_config
from .regrouping import Group, groups_of, is_ordinary
from .repaired import RepairedPlan, holder_of, refuse_maps, set_weight, with_weights


@dataclass
class _Active:
    plan: Plan
    anatomy: Anatomy
    undo: ExitStack


_ACTIVE: WeakKeyDictionary[nn.Module, list[_Active]] = WeakKeyDictionary()


@contextmanager
def skip(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    """Run `model` without the sublayers of `plan`, for the time of the `with`.

    Inside, the model holds no KV cache for a skipped attention and spends no time on what is skipped; its config
    counts live layers. Leaving, also by an exception, gives back the very same modules and config. A `skip` inside a
    `skip` leaves out what either names, by dense indices. Change device, dtype or mode of the model outside.

    Not for two threads at once on one model. Raises `UsageError` when the plan does not fit the model or its repair
    keeps matrices at run time, and `UnsupportedModel` when the model's sublayers cannot be located.
    """
    refuse_maps(plan)
    inner = base_model(model)
    active = _ACTIVE.setdefault(inner, [])
    anatomy = active[-1].anatomy if active else locate(inner)
    plan.check(anatomy)
    whole_plan = active[-1].plan | plan if active else plan
    whole_plan.check(anatomy)
    if active:
        active[-1].undo.close()
    active.append(_Active(whole_plan, anatomy, _apply(inner, anatomy, whole_plan)))
    try:
        yield model
    finally:
        active.pop().undo.close()
        if active:
            active[-1].undo = _apply(inner, anatomy, active[-1].plan)


def is_skipping(model: PreTrainedModel) -> bool:
    """Whether `model` is inside a `with skip(...)`."""
    return bool(_ACTIVE.get(base_model(model)))


def remove(model: PreTrainedModel, plan: Plan) -> None:
    """Take the sublayers of `plan` out of `model` for good: in place, their weights are freed.

    A kept attention and the kept MLP that follows it become one ordinary layer where their form is the same, so that
    a portable plan leaves an ordinary model, which `save_pretrained` writes and any engine loads. Otherwise saving is
    refused, because what it wrote would load as a dense model with random weights.

    Raises as `skip` does, and `UsageError` inside a `skip`.
    """
    inner = base_model(model)
    if is_skipping(inner):
        raise UsageError("the model is inside a `with notall.skip(...)`; leave it before removing anything for good")
    refuse_maps(plan)
    anatomy = locate(inner)
    plan.check(anatomy)
    if not plan:
        return
    dense, groups = _layers(inner, anatomy), groups_of(anatomy, plan)
    weights = plan.weights if isinstance(plan, RepairedPlan) else {}
    for path, weight in weights.items():
        holder_of(inner, path, weight)  # refuse before anything is changed
    for path, weight in weights.items():
        set_weight(inner, path, weight.clone())
    layers = [_merged(anatomy, dense, group) or regrouped_layer(anatomy, dense, group) for group in groups]
    _install(inner, anatomy, nn.ModuleList(layers), groups)
    locating.forget(inner)
    if _are_regrouped(layers) or not _is_built_again(inner):
        inner.save_pretrained = _refuse_to_save


def _are_regrouped(layers: Iterable[nn.Module]) -> bool:
    """Whether a checkpoint of these layers would have names that the architecture does not know."""
    return any(isinstance(layer, RegroupedLayer) for layer in layers)


def _is_built_again(model: PreTrainedModel) -> bool:
    """Whether the model's config alone tells how its layers are built, as a load must."""
    if is_told(text_config(model)):
        return False
    try:
        with torch.device("meta"):
            again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    except (ValueError, KeyError, IndexError, TypeError):
        return False
    return _build(again) == _build(model)


def _build(model: nn.Module) -> list[tuple[str, str, list[torch.Size]]]:
    return [
        (path, type(module).__name__, [weight.shape for weight in module.parameters(recurse=False)])
        for path, module in model.named_modules()
    ]


def _refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    raise UsageError(
        "this plan leaves layers that the architecture's own checkpoint cannot hold or tell apart, and a load would "
        "fill them with random weights; keep the dense checkpoint with the plan file, or choose a portable plan"
    )


def _refuse_to_save_skipped(*args: object, **kwargs: object) -> NoReturn:
    raise UsageError(
        "inside a `with notall.skip(...)` the layers have names that a load would not know, and would fill with random "
        "weights; leave it, then save the dense model, or write the smaller one with notall.export"
    )


# --- changing the model ---------------------------------------------------------------------------------------------


def _layers(model: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    return model.get_submodule(anatomy.layers)  # type: ignore[return-value]


def _parent(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    return model.get_submodule(anatomy.layers.rpartition(".")[0])


def _configs(model: PreTrainedModel, parent: nn.Module) -> list[PretrainedConfig]:
    """The configs that say how many layers there are: the model's text config and the decoder's, if another object."""
    configs = (text_config(model), getattr(parent, "config", None))
    return list({id(config): config for config in configs if config is not None}.values())


def _apply(model: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> ExitStack:
    """Put the regrouped layers in; what comes back puts the dense ones back when it is closed."""
    undo = ExitStack()
    if not plan and not anatomy.lacking:
        return undo
    parent, dense = _parent(model, anatomy), _layers(model, anatomy)
    _install_output_hooks(parent)
    for config in _configs(model, parent):
        undo.callback(as_it_is(config))
    undo.callback(parent._modules.__setitem__, anatomy.layers.rpartition(".")[2], dense)
    undo.callback(locating.remember, model, dense, anatomy)
    static_cache = model.__dict__.pop("_cache", None)  # what `generate` keeps between calls counts dense layers
    undo.callback(_restore_static_cache, model, static_cache)
    groups = groups_of(anatomy, plan)
    regrouped = nn.ModuleList(regrouped_layer(anatomy, dense, group) for group in groups)
    try:
        if isinstance(plan, RepairedPlan):
            undo.enter_context(with_weights(model, plan.weights))
        for change in _install(model, anatomy, regrouped, groups):
            undo.callback(setattr, *change)
        if _are_regrouped(regrouped):
            undo.enter_context(_unsaveable(model))
        locating.remember(model, regrouped, anatomy)
    except BaseException:
        undo.close()
        raise
    return undo


def _install(
    model: PreTrainedModel, anatomy: Anatomy, layers: nn.ModuleList, groups: list[Group]
) -> list[tuple[nn.Module, str, int]]:
    """Make `layers` the model's own and its config count them; returns each changed layer index as it was."""
    parent = _parent(model, anatomy)
    layers.training = parent.training
    for config in _configs(model, parent):
        slice_config(config, [group.layer for group in groups])
    parent._modules[anatomy.layers.rpartition(".")[2]] = layers
    return [change for index, layer in enumerate(layers) for change in renumber(layer, index)]


@contextmanager
def _unsaveable(model: PreTrainedModel) -> Iterator[None]:
    before = model.__dict__.get("save_pretrained")
    model.save_pretrained = _refuse_to_save_skipped
    try:
        yield
    finally:
        del model.save_pretrained
        if before is not None:
            model.save_pretrained = before


def _restore_static_cache(model: nn.Module, cache: Any) -> None:
    model.__dict__.pop("_cache", None)
    if cache is not None:
        model.__dict__["_cache"] = cache


def _install_output_hooks(decoder: nn.Module) -> None:
    """transformers 5 hooks the layers for `output_hidden_states` once, at the first use: have it hook dense ones."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    if isinstance(decoder, PreTrainedModel):
        maybe_install_capturing_hooks(decoder)


# --- the regrouped layers -------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """The modules of one MLP that lost its attention."""

    def forward(self, hidden: Tensor, mlp: Sublayer, call: LayerCall) -> Tensor:
        return run_branches(mlp.branches, self, hidden, call)


class RegroupedLayer(nn.Module):
    """Mixed into the class of a dense layer: runs MLPs ahead, its attention or whole block, and MLPs behind."""

    before: nn.ModuleList
    after: nn.ModuleList
    blocks: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layout: _Layout = self._layout  # type: ignore[assignment]
        arguments = dict(zip(layout.names, args)) | kwargs
        hidden: Tensor = arguments.pop(layout.names[0])
        extras = {name: value for name, value in kwargs.items() if name not in layout.declared}
        call = LayerCall(arguments, extras)
        for mlp, holder in zip(layout.before, self.before):
            hidden = holder(hidden, mlp, call)
        if layout.whole:
            answer = layout.stock_forward(self, hidden, **arguments)
            hidden, rest = (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
        else:
            hidden = run_branches(layout.own.branches, self, hidden, call)
            rest = layout.rest(call)
        for mlp, holder in zip(layout.after, self.after):
            hidden = holder(hidden, mlp, call)
        return hidden if layout.block.answer is None else (hidden, *rest)


@dataclass(frozen=True)
class _Layout:
    """What a regrouped layer runs, apart from its modules."""

    block: Block
    own: Sublayer  # that is run where the layer is not whole
    whole: bool
    before: tuple[Sublayer, ...]
    after: tuple[Sublayer, ...]
    names: tuple[str, ...]  # of the arguments of the dense layer's forward
    declared: frozenset[str]
    stock_forward: Callable[..., Any]

    def rest(self, call: LayerCall) -> tuple[Any, ...]:
        """What the dense layer answers beside the hidden states, as far as the attention gave it."""
        given = call.attention if isinstance(call.attention, tuple) else (call.attention,)
        if call.arguments.get("output_attentions"):
            return given[1:]
        return tuple(None if index is None else given[index] for index in self.block.answer or ())


@functools.cache
def _regrouped_class(layer_class: type) -> type[RegroupedLayer]:
    """A subclass, so that whatever looks for the layer's class (hooks, checkpointing, device maps) finds it.

    Its forward has the signature of the layer's own, by which arguments are told apart.
    """
    if issubclass(layer_class, RegroupedLayer):
        return layer_class
    forward = functools.wraps(layer_class.forward)(RegroupedLayer.forward)  # type: ignore[attr-defined]
    name, bases = f"Regrouped{layer_class.__name__}", (RegroupedLayer, layer_class)
    return type(name, bases, {"__module__": __name__, "forward": forward})


def regrouped_layer(anatomy: Anatomy, dense: nn.ModuleList, group: Group) -> nn.Module:
    """The module that runs `group`: the dense layer itself where nothing in it changes."""
    source = dense[group.layer]
    if group.untouched:
        return source
    block = anatomy.blocks[group.layer]
    own = block.attention if "attention" in block.kinds else block.mlp
    parts = block.sublayers if group.whole else (own,)
    children = {name: child(source, name) for part in parts for name in part.modules}
    layer = _twin(source, children, _regrouped_class(type(source)))  # type: ignore[arg-type]
    layer.before = nn.ModuleList(_holder(dense[index], anatomy.blocks[index].mlp) for index in group.before)
    layer.after = nn.ModuleList(_holder(dense[index], anatomy.blocks[index].mlp) for index in group.after)
    for extras in (layer.before, layer.after):
        extras.training = source.training
    names = tuple(parameter_names(source))
    layer._layout = _Layout(  # type: ignore[assignment]
        block,
        own,
        group.whole,
        tuple(anatomy.blocks[index].mlp for index in group.before),
        tuple(anatomy.blocks[index].mlp for index in group.after),
        names,
        frozenset(names),
        type(source).forward,
    )
    return layer


def _merged(anatomy: Anatomy, dense: nn.ModuleList, group: Group) -> nn.Module | None:
    """Attention i with the MLP of block j as one ordinary layer; None where only a regrouped layer will do."""
    if group.untouched or not is_ordinary(anatomy, group):
        return None
    source, donor = dense[group.layer], dense[group.after[0]]
    if type(source) is not type(donor):
        return None
    block = anatomy.blocks[group.layer]
    swapped = {name: child(donor, name) for name in block.mlp.modules}
    return _twin(source, dict(source.named_children()) | swapped, type(source))


def _twin(source: nn.Module, children: dict[str, nn.Module], layer_class: type[nn.Module]) -> nn.Module:
    """Like `source`, sharing its attributes, parameters and hooks, but of `layer_class` and with `children`."""
    twin = object.__new__(layer_class)
    twin.__dict__.update(source.__dict__)
    for bound_to_source in ("forward", "_old_forward", "_hf_hook"):  # left by output capturing or by accelerate
        twin.__dict__.pop(bound_to_source, None)
    twin.__dict__["_modules"] = {}
    for name, module in children.items():
        _set_child(twin, name, module)
    if "_hf_hook" in source.__dict__:
        _move_inputs_like(source, twin)
    return twin


def _move_inputs_like(source: nn.Module, twin: nn.Module) -> None:
    """Give `twin` the accelerate hook of `source`, which moves what comes in to the layer's device."""
    from accelerate.hooks import add_hook_to_module

    hook: Any = copy.copy(source._hf_hook)
    hook.init_hook = lambda module: module  # the weights are placed already
    add_hook_to_module(twin, hook)


def _holder(source: nn.Module, mlp: Sublayer) -> Holder:
    holder = Holder()
    holder.training = source.training
    for name in mlp.modules:
        _set_child(holder, name, child(source, name))
    if "_hf_hook" in source.__dict__:
        _move_inputs_like(source, holder)
    return holder


def _set_child(holder: nn.Module, path: str, module: nn.Module) -> None:
    """Hang `module` at a dotted `path` below `holder`, with plain modules for what lies between."""
    *between, name = path.split(".")
    for step in between:
        if step not in holder._modules:
            holder._modules[step] = nn.Module()
        holder = holder._modules[step]  # type: ignore[assignment]
    holder._modules[name] = module
