"""Models on devices, placed as a user would: on one, or split over two by
accelerate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn
from transformers import PreTrainedModel

from api import locating

ONE, TWO = torch.device("cuda:0"), torch.device("cuda:1")


def each_place(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Families and where they run: all on two devices, and on a real one.

    On a simulated one the first and the last stand for all: what no hook of accelerate
    moves is the same in each.
    """
    names = [*names]
    for name, place in itertools.product(names, ("one", "two")):
        if place == "two" or torch.cuda.is_available() or name in (names[0], names[-1]):
            yield name, place


def on_one(model: PreTrainedModel) -> PreTrainedModel:
    """All of it on the first device."""
    return model.to(ONE)


def on_two(model: PreTrainedModel) -> PreTrainedModel:
    """Its first layers on the first device, the rest on the second, as
    `device_map="auto"` does.
    """
    places = split(model)
    loose = {
        name: tensor for name, tensor in model.named_parameters() if name in places
    }
    for (
        name,
        tensor,
    ) in loose.items():  # outside of any leaf module; accelerate moves modules alone
        tensor.data = tensor.data.to(f"cuda:{places[name]}")
    return dispatch_model(model, places, force_hooks=True)


def split(model: PreTrainedModel) -> dict[str, int]:
    """Accelerate's own division of the modules, by their paths, that has layers on both
    devices.

    Skips the test where accelerate makes none.
    """
    where, found = locating.decoder_layers(model)  # `locate` is for after the split
    layers = dict(found.named_children())
    whole = {type(layer).__name__ for layer in layers.values()}
    size = sum(weight.nbytes for weight in model.parameters())
    for share in (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.9):
        room = {0: int(share * size), 1: 1 << 60}
        found = infer_auto_device_map(model, room, no_split_module_classes=list(whole))
        if len({device_of(f"{where}.{layer}", found) for layer in layers}) == 2:
            return dict(found)
    pytest.skip("accelerate keeps the layers together")


def device_of(path: str, places: dict[str, int]) -> int | None:
    """Where a module goes: by its own path, or by what it is in."""
    parts = path.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((places[name] for name in paths if name in places), None)


def devices_of(model: nn.Module) -> set[str]:
    """Where its weights are; `meta` for those that accelerate fetches."""
    return {str(weight.device) for weight in model.parameters()}
