"""The dense model's residual stream, line by line, for all batches: what a repair aims at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..records.plan import Plan
from ..running.replay import Recording, live_steps
from ..structure.anatomy import Anatomy, Block, Sublayer
from ..structure.observation import Branch, LayerCall, run_branches, scaled
from ..structure.proving import block_lines
from .spool import Spool


@dataclass(frozen=True)
class LiveStep:
    """What a plan keeps of one line of the stream: a sublayer, or both of a parallel block.

    `line` is where it stands among the dense model's lines, `behind` where the next step does. `gap` says whether
    something is skipped between the two, or beside it. `scale` is what layers multiply the stream by on the way there,
    and `own_scale` that on the way to the line behind its own.
    """

    block: Block
    parts: tuple[Sublayer, ...]
    line: int
    behind: int
    gap: bool
    scale: float
    own_scale: float

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for part in self.parts for branch in part.branches)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


def steps_of(anatomy: Anatomy, plan: Plan) -> list[LiveStep]:
    """What the plan keeps, in order."""
    starts, total = {}, 0
    for block in anatomy.blocks:
        for place, part in enumerate(block.sublayers):
            starts[part.name] = total + (0 if block.parallel else place)
        total += len(block_lines(block))
    live = list(live_steps(anatomy, plan))
    lines = [starts[parts[0].name] for _, parts in live] + [total]
    found = []
    for place, (block, parts) in enumerate(live):
        line, behind = lines[place : place + 2]
        following = live[place + 1][0].index if place + 1 < len(live) else len(anatomy.blocks)
        own_scale = block.scale if block.parallel or parts[-1] is block.sublayers[-1] else 1.0
        gap = behind > line + 1 or (block.parallel and len(parts) == 1)
        found.append(LiveStep(block, parts, line, behind, gap, anatomy.scale(block.index, following), own_scale))
    return found


class DenseStream:
    """The stream before each line of the dense model, (batch, tokens, hidden) a batch.

    A few lines are kept at once, or all of them, for repairs of many plans on one text.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        layers: nn.ModuleList,
        recordings: Sequence[Recording],
        *,
        keep_all: bool = False,
        spool: Spool | None = None,
    ) -> None:
        self.layers, self.recordings, self.keep_all, self.spool = layers, recordings, keep_all, spool or Spool()
        self.lines = [
            (block.index, branches, block.scale if branches is lines[-1] else 1.0)
            for block in anatomy.blocks
            for lines in [block_lines(block)]
            for branches in lines
        ]
        self.at = {0: [recording.embedded for recording in recordings]}

    def before(self, *lines: int) -> list[list[Tensor]]:
        """Before each of these lines; unless all are kept, later calls may only ask for these and what is behind."""
        for place in range(max(self.at), max(lines)):
            index, branches, scale = self.lines[place]
            behind = run_all(self.layers[index], index, branches, self.at[place], self.recordings, scale)
            self.at[place + 1] = [self.spool.keep(hidden) for hidden in behind]
            if place not in lines and not self.keep_all:
                del self.at[place]
        if not self.keep_all:
            self.at = {line: states for line, states in self.at.items() if line in lines}
        return [self.at[line] for line in lines]


def run_all(
    layer: nn.Module,
    index: int,
    branches: tuple[Branch, ...],
    states: Sequence[Tensor],
    recordings: Sequence[Recording],
    scale: float = 1.0,
) -> Iterator[Tensor]:
    """The stream behind these branches of a layer times `scale`, batch by batch."""
    for hidden, recording in zip(states, recordings):
        here = hidden.to(recording.device) if hidden.is_cpu else hidden  # from a file, maybe
        yield scaled(run_branches(branches, layer, here, LayerCall(recording.arguments[index])), scale)
