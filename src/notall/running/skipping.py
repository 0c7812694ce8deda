"""Leave sublayers out of a live model: for a while (`skip`), for good (`remove`), or
since its checkpoint has none.

Layers that stay in place (see `structure/in_place.py`) get stubs. Else the live
sublayers are cut again into layers with one mixer each (see `regroup`), so that
whatever counts layers, such as caches and masks, is right.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock, get_ident
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from ..errors import UsageError, expect
from ..plan import Plan, refuse_prefill
from ..results.facts import Footprint
from ..structure.calls import child
from ..structure.locating import LOCATED, locate
from ..structure.model_structure import Sublayer, base_model
from ..structure.undoing import ABSENT, Undo
from ..structure.weights import weights_of
from .cutting import (
    NOT_A_CHECKPOINT,
    apply_plan,
    are_cut,
    cut_out,
    is_built_again,
    layers_in,
    refuse_to_save,
)
from .repaired import refuse_run_time_maps

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
            raise UsageError(
                "a `with notall.skip(...)` was left ahead of one inside of it, and"
                " neither counts any more: leave the one that was entered last first"
            )

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
    refuse_run_time_maps(plan)
    inner = base_model(model)
    mine = _Skip(_ACTIVE.setdefault(inner, []), plan)
    # left twice, as an exception may come ahead of the first line of leaving
    with mine, mine:
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
        plan.check(structure)  # alone, so that a message names what was given
        mine.plan = around[-1].plan | plan if around else plan
        mine.plan.check(structure)
        # begin with the original model: undo outer changes, the latest first
        changes = [entry for other in around for entry in other.entries]
        for place, name, original in reversed(changes):
            mine.put(place, name, original)
        apply_plan(inner, structure, mine.plan, mine)
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
    refuse_run_time_maps(plan)
    refuse_prefill(plan, "removing for good")
    structure = locate(inner)
    plan.check(structure)
    if not plan:
        return
    with Undo() as undo, undo:
        cut_out(inner, structure, plan, undo, for_good=True)
        undo.put(LOCATED, inner, ABSENT)  # `locate` is to look again
        if are_cut(inner, structure) or not is_built_again(inner):
            undo.put(
                inner.__dict__,
                "save_pretrained",
                partial(refuse_to_save, NOT_A_CHECKPOINT),
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
    layers = layers_in(inner, structure)
    running = structure.running(plan)
    kept = [part for part in structure.sublayers if part.name in running]
    gone = [part for part in structure.sublayers if part.name not in running]

    def keys_of(parts: Sequence[Sublayer]) -> set[object]:
        """Of their weights, as `weights_of` has them."""
        modules = [
            child(layers[part.index], name) for part in parts for name in part.modules
        ]
        return {key for module in modules for key in weights_of(module)}

    freed = keys_of(gone) - keys_of(kept)
    weights = weights_of(inner)
    held = [weight for key, weight in weights.items() if key not in freed]
    has_states = any(part.state_bytes for part in structure.sublayers)
    return Footprint(
        params=sum(weight.elements for weight in held),
        weight_bytes=sum(weight.bytes for weight in held),
        kv_bytes_per_token=sum(part.kv_bytes_per_token for part in kept),
        state_bytes=sum(part.state_bytes for part in kept) if has_states else None,
    )
