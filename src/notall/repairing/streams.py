"""The original model's residual stream, line by line, for all batches: what a repair
aims at.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import shortened
from ..files import writing
from ..plan import Plan
from ..running.recording import Recording, record
from ..running.steps import live_steps
from ..structure.branches import run_branches, scaled
from ..structure.calls import LayerCall
from ..structure.locating import locate
from ..structure.model_structure import Block, ModelStructure, Sublayer, layer_modules
from .projections import Projections

HELD = 8  # one sequence in so many chooses the ridge


def offloaded(tensor: Tensor, folder: Path | None) -> Tensor:
    """The tensor, or its like on the CPU, with its bytes in a file of `folder` that
    goes when it does.
    """
    if folder is None or not tensor.numel():
        return tensor
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    with writing(f"to {shortened(folder)}", "make room, or name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # a full disk is an error here, and not a crash in reading
            file.write(flat.data)
            file.flush()
            held = np.memmap(file, dtype=np.uint8, mode="r+", shape=flat.shape)
    return torch.from_numpy(held).view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class Line:
    """A sublayer, or both of a parallel block, which add to the stream at once; then it
    is multiplied by `scale`.
    """

    block: Block
    parts: tuple[Sublayer, ...]
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of its sublayers."""
        return tuple(part.name for part in self.parts)

    def run(self, layers: nn.Module, hidden: Tensor, recording: Recording) -> Tensor:
        """The stream behind it, (batch, tokens, hidden), given the one before it: on
        the device where that is.
        """
        index = self.block.index
        branches = tuple(branch for part in self.parts for branch in part.branches)
        layer = layers.get_submodule(str(index))
        call = LayerCall(recording.arguments[index])
        behind = run_branches(
            branches, layer, hidden.to(recording.devices[index]), call
        )
        return scaled(behind, self.scale).to(hidden.device)


def lines_of(structure: ModelStructure) -> list[Line]:
    """All lines of a model, in the order in which they run."""
    return [
        Line(block, parts, block.scale if parts[-1] is block.sublayers[-1] else 1.0)
        for block, parts in live_steps(structure, Plan())
    ]


@dataclass(frozen=True)
class LiveStep(Line):
    """What a plan keeps of a line, or of a parallel block's two. Its `scale` is up to
    the next step.
    """

    line: int  # its place
    behind: int  # that of the next step
    gap: bool  # whether something is skipped up to there
    own_scale: float  # up to the next line


def steps_of(structure: ModelStructure, plan: Plan) -> list[LiveStep]:
    """What a plan keeps of the lines of a model, in order."""
    lines, live = lines_of(structure), list(live_steps(structure, plan))
    places = {
        part.name: place for place, line in enumerate(lines) for part in line.parts
    }
    starts = [places[parts[0].name] for _, parts in live] + [len(lines)]
    blocks = [block.index for block, _ in live] + [len(structure.blocks)]
    found = []
    for number, (block, parts) in enumerate(live):
        line, behind = starts[number : number + 2]
        gap = behind > line + 1 or len(parts) < len(lines[line].parts)
        scale = structure.scale(block.index, blocks[number + 1])
        found.append(
            LiveStep(block, parts, scale, line, behind, gap, lines[line].scale)
        )
    return found


class DenseStream:
    """A model's stream before each line, (batch, tokens, hidden) a batch, on a text of
    token ids, (batch, tokens) each.

    It is where the model's inputs are, or with a folder `offload` in files there,
    whatever devices its layers are on. A few lines are kept at once, or all of them
    with `keep_all`; some rows are `held` out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        *,
        one_in: int = HELD,
        keep_all: bool = False,
        offload: Path | None = None,
    ) -> None:
        self.model, self.structure, self.keep_all = model, locate(model), keep_all
        self.layers = layer_modules(model, self.structure)
        self.keep = partial(offloaded, folder=offload)
        self.tokens = batches[0]
        self.held = held_out(batches, one_in)
        recordings = (record(model, input_ids=batch) for batch in batches)
        self.recordings = [
            replace(one, embedded=self.keep(one.embedded.to(one.device)))
            for one in recordings
        ]
        self.lines = lines_of(self.structure)
        self.at = {0: [recording.embedded for recording in self.recordings]}

    @cached_property
    def projections(self) -> Projections:
        """The output projections of its sublayers."""
        return Projections(self.model, self.tokens)

    def before(self, *lines: int) -> list[list[Tensor]]:
        """Before each of these lines; unless all are kept, later calls may only ask for
        these and what is behind.
        """
        for place in range(max(self.at), max(lines)):
            self.at[place + 1] = self.run([self.lines[place]], self.at[place])
            if place not in lines and not self.keep_all:
                del self.at[place]
        if not self.keep_all:
            self.at = {
                line: states for line, states in self.at.items() if line in lines
            }
        return [self.at[line] for line in lines]

    def run(self, lines: Iterable[Line], states: list[Tensor]) -> list[Tensor]:
        """The stream behind `lines`, which follow each other, given the one before
        them.
        """
        for line in lines:
            states = [
                self.keep(line.run(self.layers, *one))
                for one in zip(states, self.recordings)
            ]
        return states

    def at_layer(self, line: Line, states: list[Tensor]) -> list[Tensor]:
        """The same, on the device of a line's layer."""
        return [
            hidden.to(one.devices[line.block.index])
            for hidden, one in zip(states, self.recordings)
        ]

    def placed(self, line: Line, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a line's layer, by their paths below it, by those in the model."""
        return {
            f"{self.structure.layers}.{line.block.index}.{name}": weight
            for name, weight in weights.items()
        }


def held_out(batches: Sequence[Tensor], one_in: int) -> list[Tensor]:
    """Of each batch, which sequences are held out, (batch,): one in so many, and the
    last where there are fewer.
    """
    sequences = sum(len(batch) for batch in batches)
    held = torch.arange(1, sequences + 1) % min(one_in, sequences) == 0
    return list(held.split([len(batch) for batch in batches]))
