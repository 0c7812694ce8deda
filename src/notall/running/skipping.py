"""Leave sublayers out of a live model: for a while (`skip`), for good (`remove`), or
since its checkpoint has none.

Layers that stay in place (see `structure/in_place.py`) get stubs. Else the live
sublayers are cut again into layers with one mixer each (see `regroup`), so that
whatever counts layers, such as caches and masks, is right.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from threading import RLock, get_ident
from typing import NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UsageError, expect
from ..plan import Fingerprint, Plan, refuse_prefill
from ..results.facts import Footprint
from ..structure.in_place import stubbed_layer
from ..structure.locating import LOCATED, locate
from ..structure.model_structure import (
    Block,
    ModelStructure,
    Sublayer,
    base_model,
    text_config,
)
from ..structure.observation import (
    LayerCall,
    called_with,
    child,
    parameter_names,
    run_branches,
)
from ..structure.slicing import (
    free_cache_slots,
    move_inputs_like,
    renumber,
    runs_on,
    set_child,
    shallow_clone,
    slice_config,
)
from ..structure.undoing import ABSENT, Undo
from ..structure.weights import weights_of
from .prefill import InPrompt, Prompt, declaring, in_prompts
from .regrouping import Layer, layers_of
from .repaired import RepairedPlan, placed_at, refuse_maps

Model = TypeVar("Model", bound=PreTrainedModel)


class _Skip(Undo):
    """One `with skip(...)`, among all `active` ones of its model, the innermost
    last.
    """

    def __init__(self, active: list["_Skip"], plan: Plan) -> None:
        super().__init__()
        self.active, self.plan, self.thread = active, plan, get_ident()

    def expect_innermost(self) -> None:
        """Raise `UsageError` where it isn't, as another was left out of turn."""
        if self.active[-1:] != [self]:
            told = (
                "a `with notall.skip(...)` was left ahead of one inside of it, and"
                " neither counts any more"
            )
            raise UsageError(f"{told}: leave the one that was entered last first")

    def __exit__(self, *_: object) -> None:
        while self in self.active:  # and any that is inside of it still
            Undo.__exit__(self.active[-1])
            self.active.pop()


_ACTIVE: WeakKeyDictionary[nn.Module, list[_Skip]] = WeakKeyDictionary()
_ENTERING = RLock()


@contextmanager
def skip(model: Model, plan: Plan) -> Iterator[Model]:
    """Run `model` without the sublayers of `plan`, for the time of the `with`.

    Inside, the model holds no KV cache for a skipped attention and spends no time on
    what is skipped; its config counts live layers. Leaving, also by an exception and
    wherever Ctrl-C falls, gives back the very same modules and config. A `skip` inside
    a `skip` leaves out what either names, by dense indices; leaving the outer one first
    leaves both, and each raises `UsageError`. Change device, dtype or mode of the model
    outside.

    Raises `UsageError` when the plan does not fit the model, its repair keeps matrices
    at run time, or another thread is inside a `skip` of the model, and
    `UnsupportedModel` when the model's sublayers cannot be located.
    """
    expect(
        model,
        nn.Module,
        "first the model, as notall.load returns it, and then the plan",
    )
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    refuse_maps(plan)
    inner = base_model(model)
    with (mine := _Skip(_ACTIVE.setdefault(inner, []), plan)), mine:
        with _ENTERING:
            around = mine.active.copy()
            if around and around[-1].thread != mine.thread:
                fix = (
                    "take turns, or give each thread a model of its own, as"
                    " notall.draft_model makes them"
                )
                raise UsageError(
                    "another thread is inside a `with notall.skip(...)` of this model:"
                    f" {fix}"
                )
            mine.active.append(mine)
        structure = locate(inner)
        plan.check(structure)
        mine.plan = around[-1].plan | plan if around else plan
        mine.plan.check(structure)
        for place, name, dense in [
            entry for other in around for entry in other.entries
        ][::-1]:  # from the original
            mine.put(place, name, dense)
        _apply(inner, structure, mine.plan, mine)
        yield model
        mine.expect_innermost()


def is_skipping(model: PreTrainedModel) -> bool:
    """Whether `model` is inside a `with skip(...)`."""
    return bool(_ACTIVE.get(base_model(model)))


def refuse_skipping(model: PreTrainedModel, doing: str) -> None:
    """Raise `UsageError` inside a `with skip(...)`, which is to be left before `doing`
    something.
    """
    if is_skipping(model):
        raise UsageError(
            f"the model is inside a `with notall.skip(...)`; leave it before {doing}"
        )


def remove(model: PreTrainedModel, plan: Plan) -> None:
    """Take the sublayers of `plan` out of `model` for good: in place, their weights are
    freed.

    A kept attention and the kept MLP that follows it become one ordinary layer where
    their form and device are the same, so that a portable plan leaves an ordinary
    model, which `save_pretrained` writes. Otherwise saving is refused, as what it wrote
    would load with random weights; such a model generates, and nothing else of notall
    takes it again.

    Raises as `skip` does, and `UsageError` inside a `skip`; whatever is raised leaves
    the model whole.
    """
    inner = base_model(model)
    refuse_skipping(inner, "removing anything for good")
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    refuse_maps(plan)
    refuse_prefill(plan, "removing for good")
    structure = locate(inner)
    plan.check(structure)
    if not plan:
        return
    with Undo() as undo, undo:
        _cut(inner, structure, plan, undo, for_good=True)
        undo.put(LOCATED, inner, ABSENT)  # `locate` is to look again
        if _are_cut(inner, structure) or not _is_built_again(inner):
            undo.put(
                inner.__dict__,
                "save_pretrained",
                partial(_refuse_to_save, NOT_A_CHECKPOINT),
            )
        undo.entries.clear()


def draft_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A model without the sublayers of `plan` that shares its weights with `model`,
    which stays as it is.

    It is for speculative decoding: `model.generate(...,
    assistant_model=draft_model(model, plan))` says what `model` says. Only the weights
    that a repair brings along are its own. Raises as `remove` does.
    """
    inner = base_model(model)
    refuse_skipping(inner, "making a draft model of it")
    draft = copy.deepcopy(
        inner,
        {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())},
    )
    remove(draft, plan)
    return draft


def footprint(model: PreTrainedModel, plan: Plan) -> Footprint:
    """What `model` weighs without the sublayers of `plan`, shared weights once. Raises
    as `skip` does.
    """
    inner = base_model(model)
    structure = locate(inner)
    plan.check(structure)
    layers, names = _layers(inner, structure), structure.running(plan)
    kept, gone = (
        [part for part in structure.sublayers if (part.name in names) == live]
        for live in (True, False)
    )
    live, dead = (
        {
            key
            for part in parts
            for name in part.modules
            for key in weights_of(child(layers[part.index], name))
        }
        for parts in (kept, gone)
    )
    held = [
        weight for key, weight in weights_of(inner).items() if key not in dead - live
    ]
    has_states = any(part.state_bytes for part in structure.sublayers)
    return Footprint(
        params=sum(weight.elements for weight in held),
        weight_bytes=sum(weight.bytes for weight in held),
        kv_bytes_per_token=sum(part.kv_bytes_per_token for part in kept),
        state_bytes=sum(part.state_bytes for part in kept) if has_states else None,
    )


# Why a model is not saved: a load would fill what it does not find under the names that
# it knows with random weights.
NOT_A_CHECKPOINT = (
    "these layers are ones that a checkpoint cannot hold or tell apart; keep the"
    " original checkpoint"
)
SKIPPED = (
    "leave the `with notall.skip(...)` and save the original model, or write the"
    " smaller one with notall.export"
)
MISSING = (
    "a load would fill what this model lacks with random weights; copy the folder that"
    " it was loaded from"
)


def _refuse_to_save(reason: str, *args: object, **kwargs: object) -> NoReturn:
    raise UsageError(reason)


def _are_cut(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether a checkpoint would lack what the architecture has, or have names that it
    does not know.
    """
    return structure.in_place or any(
        isinstance(layer, RegroupedLayer) for layer in _layers(model, structure)
    )


def _is_built_again(model: PreTrainedModel) -> bool:
    """Whether the model's config alone tells how its layers are built, as a load
    must.
    """
    if "told" in vars(
        type(text_config(model))
    ):  # lists that it would not read from a file
        return False
    try:
        with torch.device("meta"):
            again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    except Exception:  # whatever a config's own checks raise
        return False

    def is_alike(plain: nn.Module, module: nn.Module) -> bool:
        """A quantised projection is of another class, and as wide."""
        quantised = getattr(model, "is_quantized", False) and isinstance(
            plain, nn.Linear
        )
        if quantised and type(plain) is not type(module):
            return all(
                getattr(plain, name) == getattr(module, name, None)
                for name in ("in_features", "out_features")
            )
        shapes = (
            [weight.shape for weight in one.parameters(recurse=False)]
            for one in (plain, module)
        )
        return type(plain).__name__ == type(module).__name__ and next(shapes) == next(
            shapes
        )

    pairs = zip_longest(
        again.named_modules(), model.named_modules(), fillvalue=("", nn.Identity())
    )
    return all(
        there == here and is_alike(plain, module)
        for (there, plain), (here, module) in pairs
    )


def _layers(model: nn.Module, structure: ModelStructure) -> nn.ModuleList:
    return model.get_submodule(structure.layers)  # type: ignore[return-value]


def _place(
    model: PreTrainedModel, structure: ModelStructure
) -> tuple[nn.Module, str, list[PretrainedConfig]]:
    """The module that holds the list of layers, its name there, and the configs that
    say how many there are.
    """
    above, _, name = structure.layers.rpartition(".")
    parent = model.get_submodule(above)
    configs = (
        text_config(model),
        getattr(parent, "config", None),
    )  # which may be one object
    return (
        parent,
        name,
        list({id(config): config for config in configs if config is not None}.values()),
    )


def _put(
    model: PreTrainedModel, structure: ModelStructure, layers: nn.ModuleList, undo: Undo
) -> None:
    parent, name, _ = _place(model, structure)
    layers.training = parent.training
    undo.put(parent._modules, name, layers)


def _apply(
    model: PreTrainedModel, structure: ModelStructure, plan: Plan, undo: Undo
) -> None:
    """Put the regrouped layers in, until `undo` is closed."""
    if not plan and not structure.missing:
        return
    with suppress(
        ImportError
        # transformers 5 hooks the layers for `output_hidden_states` once, at the first
        # use
    ):
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        if isinstance(parent := _place(model, structure)[0], PreTrainedModel):
            maybe_install_capturing_hooks(parent)
    undo.put(
        model.__dict__, "_cache", ABSENT
    )  # what `generate` keeps between calls counts layers
    prompt = (
        declaring(model, _place(model, structure)[0], plan, undo)
        if plan.prefill
        else None
    )
    _cut(model, structure, plan, undo, prompt=prompt)
    if _are_cut(model, structure):
        undo.put(model.__dict__, "save_pretrained", partial(_refuse_to_save, SKIPPED))
    undo.put(LOCATED, model, (_layers(model, structure), structure))


def _cut(
    model: PreTrainedModel,
    structure: ModelStructure,
    plan: Plan,
    undo: Undo,
    *,
    for_good: bool = False,
    prompt: Prompt | None = None,
) -> None:
    """Make the layers without what `plan` skips the model's own, and have its config
    and its caches count them.

    What it skips in the prompt alone stays in its layers, which ask `prompt` for how
    many tokens it runs.
    """
    dense, configs = _layers(model, structure), _place(model, structure)[2]
    if isinstance(plan, RepairedPlan):
        plan.check_replaced(model)
    for path, weight in plan.weights.items() if isinstance(plan, RepairedPlan) else ():
        undo.put(*placed_at(model, path, weight.clone() if for_good else weight))
    skipped = (
        in_prompts(model, structure, plan, prompt) if prompt else {}
    )  # of the weights that are there now
    for config in configs:
        undo.put_fields(config)
    if structure.in_place:
        running = structure.running(plan)

        def stubbed(layer: nn.Module, block: Block) -> nn.Module:
            """With stubs for what is skipped, or silenced where others read it."""
            skipped = [
                part
                for part in block.sublayers
                if block.index in getattr(plan, part.kind)
            ]
            scales = {
                part.stub: torch.zeros_like if part.name in running else None
                for part in skipped
                if part.stub
            }
            return stubbed_layer(layer, block.index, scales) if scales else layer

        layers = nn.ModuleList(map(stubbed, dense, structure.blocks))
        freed = [index for index in plan.attention if f"attn.{index}" not in running]
        for config in configs if freed else ():
            free_cache_slots(config, freed)
    else:
        merges = for_good and not structure.scaled
        groups = layers_of(
            structure, plan, lambda i, j: merges and _are_alike(dense[i], dense[j])
        )
        layers = nn.ModuleList(
            regrouped_layer(structure, dense, group, skipped) for group in groups
        )
        for config in configs:
            slice_config(config, [group.attention for group in groups])
        for index, layer in enumerate(layers):
            renumber(layer, index, undo)
    _put(model, structure, layers, undo)


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether a sublayer of one layer can be the other's own: of one class, on one
    device.
    """
    return type(one) is type(other) and runs_on(one) == runs_on(other)


def without(model: PreTrainedModel, missing: Plan) -> ModelStructure:
    """Take out of `model`, in place, the sublayers of `missing`, which its checkpoint
    lacks: numbers stay.
    """
    whole = locate(model)
    dense = _layers(model, whole)
    missing.check(whole)
    if missing.blocks:
        raise UsageError(
            f"layer {missing.blocks[0]} would have neither an attention nor an MLP"
        )
    blocks = []
    for block in whole.blocks:
        left = tuple(
            part
            for part in block.sublayers
            if block.index not in getattr(missing, part.kind)
        )
        if block.parallel and len(left) < len(block.sublayers):
            raise UsageError(
                "layers whose sublayers run side by side lack none of them alone"
            )
        blocks.append(replace(block, sublayers=left))
    shape = Fingerprint.parse(whole.fingerprint)
    assert shape
    named = replace(shape, model_type=f"notall_{shape.model_type}")
    structure = replace(
        whole, blocks=tuple(blocks), fingerprint=str(named), missing=missing
    )
    layers = nn.ModuleList(
        (
            layer
            if block == before
            else regrouped_layer(
                structure,
                dense,
                Layer(block.index, None, start=block.index, end=block.index + 1),
            )
        )
        for layer, block, before in zip(dense, blocks, whole.blocks)
    )
    _put(model, structure, layers, Undo())
    LOCATED[model] = layers, structure
    model.save_pretrained = partial(_refuse_to_save, MISSING)
    kinds = getattr(text_config(model), "layer_types", None) or ["one"] * len(blocks)
    # transformers counts the tokens of a cache by the first layer of each kind
    if not all(
        "attention" in structure.kinds[kinds.index(kind)] for kind in set(kinds)
    ):
        model.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    return structure


def _refuse_cache(
    model: PreTrainedModel, args: object, arguments: Mapping[str, object]
) -> None:
    held = any(arguments.get(name) is not None for name in ("past_key_values", "cache"))
    if held and not is_skipping(model):
        told = (
            "transformers counts the tokens of a cache by the first layer, and this"
            " model's has no attention"
        )
        raise UsageError(
            f"{told}: run it inside `with notall.skip(model, notall.Plan()):`"
        )


class Holder(nn.Module):
    """The modules of one MLP that lost its attention, those of a dense layer."""

    def __init__(
        self, source: nn.Module, mlp: Sublayer, in_prompt: InPrompt | None = None
    ) -> None:
        super().__init__()
        self.sublayer, self.training = mlp, source.training
        self.in_prompt = in_prompt
        for name in mlp.modules:
            set_child(self, name, child(source, name))
        move_inputs_like(source, self)

    def forward(self, hidden: Tensor, call: LayerCall) -> Tensor:
        if self.in_prompt and self.in_prompt.splits:
            return self.in_prompt.run([self.sublayer], self, hidden, call)
        return run_branches(self.sublayer.branches, self, hidden, call)


class Scales(nn.Module):
    """Numbers that dense layers multiply their stream by, on its way to a part of a
    regrouped layer, or behind all.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        super().__init__()
        for place, number in enumerate(numbers):
            self.register_buffer(str(place), number, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        for number in self.buffers():  # of another device or a finer dtype, maybe
            hidden = (hidden * number.to(hidden.device)).to(hidden.dtype)
        return hidden


class RegroupedLayer(nn.Module):
    """Mixed into the class of a dense layer: runs MLPs ahead, its attention or whole
    block, and MLPs behind.

    Each MLP runs where its own layer did, and the stream comes back from there.
    """

    is_cut = True
    before: nn.ModuleList
    after: nn.ModuleList
    scales: Iterable[nn.Module]  # one for each part and one behind all, or none
    _layout: tuple[
        Block, Sublayer, bool
    ]  # its own block, what it runs of it, and whether that is all of it
    in_prompt: InPrompt | None  # what of its own block is skipped in the prompt

    def forward(self, *args: object, **kwargs: object) -> object:
        arguments, hidden = called_with(self, args, kwargs)
        declared, (block, own, whole), ways = (
            parameter_names(self),
            self._layout,
            iter(self.scales),
        )
        call = LayerCall(
            arguments,
            {name: value for name, value in kwargs.items() if name not in declared},
        )
        here = hidden.device

        def scaled(hidden: Tensor) -> Tensor:
            way = next(ways, None)
            return hidden if way is None else way(hidden)

        for holder in self.before:
            hidden = holder(scaled(hidden), call).to(here)
        hidden = scaled(hidden)
        splits = self.in_prompt is not None and self.in_prompt.splits
        if whole and not splits:
            answer = super().forward(hidden, **arguments)
            hidden, rest = (
                (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
            )
        else:
            run = (
                self._run_split if splits else partial(run_branches, own.branches, self)
            )
            hidden = run(hidden, call)
            given = (
                call.attention
                if isinstance(call.attention, tuple)
                else (call.attention,)
            )
            places = (
                block.answer or ()
            )  # of what the dense layer answers beside, as far as the attention gave it
            as_asked = call.arguments.get("output_attentions")
            if call.attention is None:  # it ran for no token
                rest = tuple(None for _ in places)
            else:
                rest = (
                    given[1:]
                    if as_asked
                    else tuple(None if at is None else given[at] for at in places)
                )
        for holder in self.after:
            hidden = holder(scaled(hidden), call).to(here)
        hidden = scaled(hidden)
        return hidden if block.answer is None else (hidden, *rest)

    def _run_split(self, hidden: Tensor, call: LayerCall) -> Tensor:
        """What it runs of its own block on (batch, tokens, hidden), some of it for the
        last tokens alone.
        """
        assert self.in_prompt is not None
        block, own, whole = self._layout
        if not whole:
            lines: list[tuple[Sublayer, ...]] = [(own,)]
        elif block.parallel:
            lines = [block.sublayers]
        else:
            lines = [(part,) for part in block.sublayers]
        for parts in lines:
            hidden = self.in_prompt.run(parts, self, hidden, call)
        if whole and block.scaled_by:
            hidden = (hidden * getattr(self, block.scaled_by)).to(hidden.dtype)
        return hidden


@functools.cache
def _regrouped_class(layer_class: type) -> type[RegroupedLayer]:
    """A subclass, which whatever looks for the layer's class finds, with the signature
    of the layer's own forward.
    """
    if issubclass(layer_class, RegroupedLayer):
        return layer_class

    @functools.wraps(layer_class.forward)  # type: ignore[attr-defined]
    def forward(self: RegroupedLayer, *args: object, **kwargs: object) -> object:
        return RegroupedLayer.forward(self, *args, **kwargs)

    name, bases = f"Regrouped{layer_class.__name__}", (RegroupedLayer, layer_class)
    return type(name, bases, {"__module__": __name__, "forward": forward})


def regrouped_layer(
    structure: ModelStructure,
    dense: nn.ModuleList,
    layer: Layer,
    skipped: Mapping[int, InPrompt] = {},
) -> nn.Module:
    """The module that runs `layer`: the dense one itself where nothing in it changes.

    `skipped` holds for dense blocks what of them is skipped in the prompt.
    """
    source, block = dense[layer.attention], structure.blocks[layer.attention]
    after = [*([] if layer.whole or layer.mlp is None else [layer.mlp]), *layer.after]
    is_split = not skipped.keys().isdisjoint([layer.attention, *after])
    if (
        layer.is_ordinary and after and not is_split
    ):  # the MLP of another block, in the place of its own
        swapped = {name: child(dense[after[0]], name) for name in block.mlp.modules}
        return shallow_clone(
            source, dict(source.named_children()) | swapped, type(source)
        )
    here, ways = (
        layer.start,
        [],
        # the blocks that multiply the stream on its way to each part, and behind all of
        # them
    )
    for index in [*layer.before, layer.attention, *after, layer.end]:
        ways.append(
            [
                between
                for between in range(here, index)
                if structure.blocks[between].scaled_by
            ]
        )
        here = index + (layer.whole and index == layer.attention)
    if layer.whole and layer.is_ordinary and not any(ways) and not is_split:
        return source
    own = block.attention if "attention" in block.kinds else block.mlp
    parts = block.sublayers if layer.whole else (own,)
    children = {name: child(source, name) for part in parts for name in part.modules}
    made = shallow_clone(source, children, _regrouped_class(type(source)))  # type: ignore[arg-type]
    made.before, made.after = (
        nn.ModuleList(
            Holder(dense[index], structure.blocks[index].mlp, skipped.get(index))
            for index in indices
        )
        for indices in (layer.before, after)
    )
    numbers = [
        [
            getattr(dense[index], structure.blocks[index].scaled_by or "")
            for index in way
        ]
        for way in ways
    ]
    made.scales = nn.ModuleList(map(Scales, numbers)) if any(ways) else ()
    for extras in (made.before, made.after):
        extras.training = source.training
    made._layout = block, own, layer.whole
    made.in_prompt = skipped.get(layer.attention)
    return made
