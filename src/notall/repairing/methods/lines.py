"""What a plan leaves out, line by line of the residual stream, and the dense model on the calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UsageError
from ...records.plan import Plan
from ...running.replay import record
from ...structure.anatomy import Anatomy, Block, Sublayer, base_model
from ...structure.locating import locate
from ..least_squares import Moments
from ..streams import DenseStream, run_all


@dataclass(frozen=True)
class Line:
    """What adds to the stream at once: a sublayer, or both of a parallel block."""

    block: Block
    parts: tuple[Sublayer, ...]


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
        self.anatomy = locate(inner)
        plan.check(self.anatomy)
        self.anatomy.refuse_stubs("a repair")
        if self.anatomy.scaled:
            raise UsageError(
                f"layers of {self.anatomy.model_type} multiply their stream; only notall.repair knows that"
            )
        self.layers: nn.ModuleList = inner.get_submodule(self.anatomy.layers)
        self.lines = lines_of(self.anatomy)
        self.recordings = [record(inner, input_ids=batch) for batch in batches]
        self.stream = DenseStream(self.anatomy, self.layers, self.recordings)
        self.dtype = inner.dtype

    def run(self, states: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
        """The stream behind the lines from `start` to before `end`, given the stream before them, batch by batch."""
        for line in self.lines[start:end]:
            index = line.block.index
            branches = tuple(branch for part in line.parts for branch in part.branches)
            states = list(run_all(self.layers[index], index, branches, states, self.recordings))
        return list(states)


def lines_of(anatomy: Anatomy) -> list[Line]:
    """Every line of the dense model, in order."""
    return [
        Line(block, parts)
        for block in anatomy.blocks
        for parts in ([block.sublayers] if block.parallel else [(part,) for part in block.sublayers])
    ]


def gaps_of(anatomy: Anatomy, plan: Plan, by_block: bool = False) -> list[Gap]:
    """The runs of lines that `plan` skips; with `by_block`, a run ends with its block.

    Raises `UsageError` where one of a parallel block's two is skipped alone: there is no gap in its line.
    """
    lines = lines_of(anatomy)
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


def least_squares(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, ridge: float = 0.0, biased: bool = False
) -> Tensor:
    """argmin over C of sum |y - C x|^2 + ridge * |C|^2 in float64, (outputs, inputs), with a last column for a bias.

    Raises `UsageError` where tokens, (batch, tokens, channels) or (tokens, channels) each, are too few to tell.
    """
    like = inputs[0].new_empty(0).double()
    moments = Moments.none(inputs[0].shape[-1], outputs[0].shape[-1], biased, like)
    for given, wanted in zip(inputs, outputs):
        given, wanted = given.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        moments.add(given, wanted, given.new_ones(len(given)))
    found = moments.solve(ridge, alike=True)
    if found is None:
        raise UsageError(
            f"the calibration text is too short to tell a matrix of {inputs[0].shape[-1]} channels from others; "
            "give more of it, with --sequences"
        )
    return found
