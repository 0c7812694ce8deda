"""The dense model's residual stream, line by line, for all batches: what a repair aims at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError, shortened
from ..plan import Plan
from ..running.replay import Recording, live_steps, record
from ..structure.locating import locate
from ..structure.model_structure import Block, ModelStructure, Sublayer, base_model
from ..structure.observation import Branch, LayerCall, run_branches, scaled


class DiskOffload:
    """Keeps tensors as they are or, with a folder, in files there that have no name and go when the tensors do.

    Raises `UsageError` where the folder has no room.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or its like on the CPU whose bytes are in a file."""
        if self.folder is None or not tensor.numel():
            return tensor
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(flat.data)  # a full disk is an error here, and not a crash in reading
                file.flush()
                held = np.memmap(file, dtype=np.uint8, mode="r+", shape=flat.shape)
        except OSError as error:
            raise UsageError(
                f"cannot write to {shortened(self.folder)}: {error.strerror}; make room, or name another folder"
            ) from None
        return torch.from_numpy(held).view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class Line:
    """What adds to the stream at once: a sublayer, or both of a parallel block; `scale` is what the stream is then
    multiplied by.
    """

    block: Block
    parts: tuple[Sublayer, ...]
    scale: float

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for part in self.parts for branch in part.branches)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


def lines_of(structure: ModelStructure) -> list[Line]:
    """Every line of the dense model, in order."""
    return [
        Line(block, parts, block.scale if parts[-1] is block.sublayers[-1] else 1.0)
        for block in structure.blocks
        for parts in ([block.sublayers] if block.parallel else [(part,) for part in block.sublayers])
    ]


@dataclass(frozen=True)
class LiveStep(Line):
    """What a plan keeps of a line: all of it, or one of a parallel block's two. `scale` is up to the next step.

    `line` is where it stands among the dense model's lines, `behind` where the next step does. `gap` says whether
    something is skipped between the two, or beside it. `own_scale` is up to the line behind its own.
    """

    line: int
    behind: int
    gap: bool
    own_scale: float


def steps_of(structure: ModelStructure, plan: Plan) -> list[LiveStep]:
    """What the plan keeps, in order."""
    lines, live = lines_of(structure), list(live_steps(structure, plan))
    places = {part.name: place for place, line in enumerate(lines) for part in line.parts}
    starts = [places[parts[0].name] for _, parts in live] + [len(lines)]
    blocks = [block.index for block, _ in live] + [len(structure.blocks)]
    found = []
    for number, (block, parts) in enumerate(live):
        line, behind = starts[number : number + 2]
        gap = behind > line + 1 or len(parts) < len(lines[line].parts)
        scale = structure.scale(block.index, blocks[number + 1])
        found.append(LiveStep(block, parts, scale, line, behind, gap, lines[line].scale))
    return found


class DenseStream:
    """The stream before each line of the dense model, (batch, tokens, hidden) a batch.

    A few lines are kept at once, or all of them, for repairs of many plans on one text.
    """

    def __init__(
        self,
        structure: ModelStructure,
        layers: nn.ModuleList,
        recordings: Sequence[Recording],
        *,
        keep_all: bool = False,
        offload: DiskOffload | None = None,
    ) -> None:
        self.layers, self.recordings, self.keep_all = layers, recordings, keep_all
        self.offload = offload or DiskOffload()
        self.lines = lines_of(structure)
        self.at = {0: [recording.embedded for recording in recordings]}

    def before(self, *lines: int) -> list[list[Tensor]]:
        """Before each of these lines; unless all are kept, later calls may only ask for these and what is behind."""
        for place in range(max(self.at), max(lines)):
            behind = run_all(self.layers, self.lines[place], self.at[place], self.recordings)
            self.at[place + 1] = [self.offload.keep(hidden) for hidden in behind]
            if place not in lines and not self.keep_all:
                del self.at[place]
        if not self.keep_all:
            self.at = {line: states for line, states in self.at.items() if line in lines}
        return [self.at[line] for line in lines]


def run_all(
    layers: nn.ModuleList, line: Line, states: Sequence[Tensor], recordings: Sequence[Recording]
) -> Iterator[Tensor]:
    """The stream behind a line, given the one before it, batch by batch."""
    index = line.block.index
    for hidden, recording in zip(states, recordings):
        here = hidden.to(recording.device) if hidden.is_cpu else hidden  # from a file, maybe
        yield scaled(
            run_branches(line.branches, layers[index], here, LayerCall(recording.arguments[index])), line.scale
        )


# --- what a plan leaves out, line by line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """Lines that are skipped: from `start` to before `end`; `name` is the first skipped sublayer's."""

    name: str
    start: int
    end: int


class DenseRun:
    """The dense model on the calibration text, (batch, tokens) token ids each: its `stream`, and what runs its lines.

    Raises `UsageError` for a plan that does not fit, and `UnsupportedModel` as `locate` does.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor]) -> None:
        inner = base_model(model)
        self.structure = locate(inner)
        plan.check(self.structure)
        self.structure.refuse_stubs("a repair")
        if self.structure.scaled:
            raise UsageError(
                f"layers of {self.structure.model_type} multiply their stream; only notall.repair knows that"
            )
        self.layers: nn.ModuleList = inner.get_submodule(self.structure.layers)
        self.recordings = [record(inner, input_ids=batch) for batch in batches]
        self.stream = DenseStream(self.structure, self.layers, self.recordings)
        self.dtype = inner.dtype

    def run(self, states: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
        """The stream behind the lines from `start` to before `end`, given the stream before them, batch by batch."""
        for line in self.stream.lines[start:end]:
            states = list(run_all(self.layers, line, states, self.recordings))
        return list(states)


def gaps_of(structure: ModelStructure, plan: Plan, by_block: bool = False) -> list[Gap]:
    """The runs of lines that `plan` skips; with `by_block`, a run ends with its block.

    Raises `UsageError` where one of a parallel block's two is skipped alone: there is no gap in its line.
    """
    lines = lines_of(structure)
    skipped = []
    for line in lines:
        left_out = [line.block.index in getattr(plan, part.kind) for part in line.parts]
        if any(left_out) != all(left_out):
            raise UsageError(
                f"block {line.block.index} runs its attention and its MLP side by side, and the plan skips one of "
                "them; this repair makes up for whole blocks there: choose another"
            )
        skipped.append(all(left_out))
    gaps = []
    for (out, _), run in groupby(
        enumerate(lines), key=lambda pair: (skipped[pair[0]], by_block and pair[1].block.index)
    ):
        places = [place for place, _ in run]
        if out:
            gaps.append(Gap(lines[places[0]].parts[0].name, places[0], places[-1] + 1))
    return gaps
