"""Leave sublayers out of a live model: for a while (`skip`) or for good (`remove`).

Layers that keep their seats (see `structure/seats.py`) get stubs. Else the live sublayers are cut again into layers
that own exactly one attention each, or another mixer; an MLP that lost its attention rides along behind the layer
before it (or ahead of the first). So `layer_idx` counts the layers that are left, and whatever counts layers, caches
and masks first of all, is right by construction.
This is the only file that changes a live model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UsageError, expect
from ..records.plan import Plan
from ..structure import locating
from ..structure.anatomy import Anatomy, Block, Sublayer, base_model, text_config
from ..structure.locating import locate
from ..structure.observation import LayerCall, child, parameter_names, run_branches
from ..structure.seats import emptied
from ..structure.slicing import as_it_is, free_places, is_told, renumber, slice_config
from ..structure.twins import move_inputs_like, set_child, twin_of
from .regrouping import Group, groups_of, is_ordinary
from .repaired import RepairedPlan, holder_of, refuse_maps, set_weight, with_weights


@dataclass
class _Active:
    plan: Plan
    anatomy: Anatomy
    undo: ExitStack


Model = TypeVar("Model", bound=PreTrainedModel)
_ACTIVE: WeakKeyDictionary[nn.Module, list[_Active]] = WeakKeyDictionary()


@contextmanager
def skip(model: Model, plan: Plan) -> Iterator[Model]:
    """Run `model` without the sublayers of `plan`, for the time of the `with`.

    Inside, the model holds no KV cache for a skipped attention and spends no time on what is skipped; its config
    counts live layers. Leaving, also by an exception, gives back the very same modules and config. A `skip` inside a
    `skip` leaves out what either names, by dense indices. Change device, dtype or mode of the model outside.

    Not for two threads at once on one model. Raises `UsageError` when the plan does not fit the model or its repair
    keeps matrices at run time, and `UnsupportedModel` when the model's sublayers cannot be located.
    """
    expect(model, nn.Module, "first the model, as notall.load returns it, and then the plan")
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
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
    refused, because what it wrote would load as a dense model with random weights. Such a model generates, and nothing
    else of notall takes it again: measure, search and export with the dense one.

    Raises as `skip` does, and `UsageError` inside a `skip`.
    """
    inner = base_model(model)
    if is_skipping(inner):
        raise UsageError("the model is inside a `with notall.skip(...)`; leave it before removing anything for good")
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    refuse_maps(plan)
    anatomy = locate(inner)
    plan.check(anatomy)
    if not plan:
        return
    dense = _layers(inner, anatomy)
    weights = plan.weights if isinstance(plan, RepairedPlan) else {}
    for path, weight in weights.items():
        holder_of(inner, path, weight)  # refuse before anything is changed
    for path, weight in weights.items():
        set_weight(inner, path, weight.clone())
    if anatomy.seated:
        layers = _with_stubs(anatomy, dense, plan)
        _seat(inner, anatomy, layers, plan)
    else:
        groups = groups_of(anatomy, plan)
        layers = nn.ModuleList(
            _merged(anatomy, dense, group) or regrouped_layer(anatomy, dense, group) for group in groups
        )
        _install(inner, anatomy, layers, groups)
    locating.forget(inner)
    if anatomy.seated or _are_regrouped(layers) or not _is_built_again(inner):
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
    except Exception:  # whatever a config's own checks raise
        return False
    quantized = bool(getattr(model, "is_quantized", False))
    built, held = list(again.named_modules()), list(model.named_modules())
    return len(built) == len(held) and all(
        there == here and _is_alike(plain, module, quantized) for (there, plain), (here, module) in zip(built, held)
    )


def _is_alike(plain: nn.Module, module: nn.Module, quantized: bool) -> bool:
    """Whether `module` is what a config builds; a quantised projection is of another class, and as wide."""
    if quantized and type(plain) is not type(module) and isinstance(plain, nn.Linear):
        return (plain.in_features, plain.out_features) == tuple(
            getattr(module, name, None) for name in ("in_features", "out_features")
        )
    shapes = ([weight.shape for weight in one.parameters(recurse=False)] for one in (plain, module))
    return type(plain).__name__ == type(module).__name__ and next(shapes) == next(shapes)


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
    try:
        if isinstance(plan, RepairedPlan):
            undo.enter_context(with_weights(model, plan.weights))
        if anatomy.seated:
            layers = _with_stubs(anatomy, dense, plan)
            _seat(model, anatomy, layers, plan)
        else:
            layers = nn.ModuleList(regrouped_layer(anatomy, dense, group) for group in groups)
            for change in _install(model, anatomy, layers, groups):
                undo.callback(setattr, *change)
        if anatomy.seated or _are_regrouped(layers):
            undo.enter_context(_unsaveable(model))
        locating.remember(model, layers, anatomy)
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


def _with_stubs(anatomy: Anatomy, dense: nn.ModuleList, plan: Plan) -> nn.ModuleList:
    """The dense layers, with stubs for what is skipped, or silenced where others read it."""
    running = anatomy.running(plan)
    layers = []
    for block, layer in zip(anatomy.blocks, dense):
        skipped = [part for part in block.sublayers if block.index in getattr(plan, part.kind)]
        stubs = [part.stub for part in skipped if part.stub and part.name not in running]
        muted = {part.stub: torch.zeros_like for part in skipped if part.stub and part.name in running}
        layers.append(emptied(layer, block.index, stubs, muted) if skipped else layer)
    return nn.ModuleList(layers)


def _seat(model: PreTrainedModel, anatomy: Anatomy, layers: nn.ModuleList, plan: Plan) -> None:
    """Make `layers` the model's own, and have its caches keep no place for mixers that do not run."""
    parent, running = _parent(model, anatomy), anatomy.running(plan)
    layers.training = parent.training
    freed = [index for index in plan.attention if f"attn.{index}" not in running]
    for config in _configs(model, parent) if freed else ():
        free_places(config, freed)
    parent._modules[anatomy.layers.rpartition(".")[2]] = layers


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


class Scales(nn.Module):
    """The numbers that dense layers multiply their stream by, on the way to each part of a regrouped one and behind."""

    def __init__(self, ways: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.ways: list[list[str]] = []
        for way, numbers in enumerate(ways):
            self.ways.append([f"{way}_{place}" for place in range(len(numbers))])
            for name, number in zip(self.ways[-1], numbers):
                self.register_buffer(name, number, persistent=False)

    def forward(self, hidden: Tensor, way: int) -> Tensor:
        for name in self.ways[way]:
            hidden = (hidden * getattr(self, name)).to(hidden.dtype)  # a number may be of a finer one
        return hidden


class RegroupedLayer(nn.Module):
    """Mixed into the class of a dense layer: runs MLPs ahead, its attention or whole block, and MLPs behind."""

    is_cut = True
    before: nn.ModuleList
    after: nn.ModuleList
    scales: Scales | None
    blocks: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layout: _Layout = self._layout  # type: ignore[assignment]
        arguments = dict(zip(layout.names, args)) | kwargs
        hidden: Tensor = arguments.pop(layout.names[0])
        extras = {name: value for name, value in kwargs.items() if name not in layout.declared}
        call, way = LayerCall(arguments, extras), 0

        def scaled(hidden: Tensor) -> Tensor:
            nonlocal way
            way += 1
            return self.scales(hidden, way - 1) if self.scales else hidden

        for mlp, holder in zip(layout.before, self.before):
            hidden = holder(scaled(hidden), mlp, call)
        hidden = scaled(hidden)
        if layout.whole:
            answer = layout.stock_forward(self, hidden, **arguments)
            hidden, rest = (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
        else:
            hidden = run_branches(layout.own.branches, self, hidden, call)
            rest = layout.rest(call)
        for mlp, holder in zip(layout.after, self.after):
            hidden = holder(scaled(hidden), mlp, call)
        hidden = scaled(hidden)
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
    source, ways = dense[group.layer], _ways(anatomy, group)
    if group.untouched and not any(ways):
        return source
    block = anatomy.blocks[group.layer]
    own = block.attention if "attention" in block.kinds else block.mlp
    parts = block.sublayers if group.whole else (own,)
    children = {name: child(source, name) for part in parts for name in part.modules}
    layer = twin_of(source, children, _regrouped_class(type(source)))  # type: ignore[arg-type]
    layer.before = nn.ModuleList(_holder(dense[index], anatomy.blocks[index].mlp) for index in group.before)
    layer.after = nn.ModuleList(_holder(dense[index], anatomy.blocks[index].mlp) for index in group.after)
    for extras in (layer.before, layer.after):
        extras.training = source.training
    numbers = [[_scale(anatomy, dense, index) for index in way] for way in ways]
    layer.scales = Scales(numbers) if any(ways) else None  # type: ignore[assignment]
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


def _ways(anatomy: Anatomy, group: Group) -> list[list[int]]:
    """The blocks that multiply the stream and whose ends lie before each part of a regrouped layer, and behind all."""
    parts = [*group.before, group.layer, *group.after]
    here, ways = group.start, []
    for block in [*parts, group.end]:
        ways.append([index for index in range(here, block) if anatomy.blocks[index].scaled_by])
        here = block + (group.whole and block == group.layer)
    return ways


def _scale(anatomy: Anatomy, dense: nn.ModuleList, index: int) -> Tensor:
    return getattr(dense[index], anatomy.blocks[index].scaled_by)  # type: ignore[arg-type]


def _merged(anatomy: Anatomy, dense: nn.ModuleList, group: Group) -> nn.Module | None:
    """Attention i with the MLP of block j as one ordinary layer; None where only a regrouped layer will do."""
    if group.untouched or anatomy.scaled or not is_ordinary(anatomy, group):
        return None
    source, donor = dense[group.layer], dense[group.after[0]]
    if type(source) is not type(donor):
        return None
    block = anatomy.blocks[group.layer]
    swapped = {name: child(donor, name) for name in block.mlp.modules}
    return twin_of(source, dict(source.named_children()) | swapped, type(source))


def _holder(source: nn.Module, mlp: Sublayer) -> Holder:
    holder = Holder()
    holder.training = source.training
    for name in mlp.modules:
        set_child(holder, name, child(source, name))
    if "_hf_hook" in source.__dict__:
        move_inputs_like(source, holder)
    return holder
