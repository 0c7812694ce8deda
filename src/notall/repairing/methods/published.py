"""Published repairs to measure ours against: each closes the gaps of a plan, which are
runs of lines that it skips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from notall import ModelStructure, Plan, RepairedPlan, Sublayer, UsageError, locate
from notall.plugins import (
    DenseStream,
    Line,
    LinearMap,
    LiveStep,
    Moments,
    Progress,
    all_checked,
    base_model,
    features_of,
    lines_of,
    silent,
    steps_of,
    tracked,
)

RIDGE = 1e-6  # what the repository of Ghosted Layers adds to X'X
TINY = torch.finfo(torch.float32).tiny
Batches = Sequence[Tensor]


@dataclass(frozen=True)
class Gap:
    """Lines that are skipped: from `start` to before `end`; `name` is the first skipped
    sublayer's.
    """

    name: str
    start: int
    end: int


def gaps_of(structure: ModelStructure, plan: Plan, by_block: bool = False) -> list[Gap]:
    """The runs of lines that `plan` skips, by block if asked. Raises for one of a
    parallel block's two alone.
    """
    lines = lines_of(structure)
    skipped = []
    for line in lines:
        are_skipped = [name in plan.names for name in line.names]
        if any(are_skipped) != all(are_skipped):
            raise UsageError(
                f"block {line.block.index} runs its attention and its MLP side by side,"
                " and the plan skips one of them; this repair makes up for whole blocks"
                " there: choose another"
            )
        skipped.append(all(are_skipped))

    def run_of(place: int) -> tuple[bool, int]:
        return skipped[place], lines[place].block.index if by_block else 0

    gaps = []
    for (is_skipped, _), run in groupby(range(len(lines)), run_of):
        places = list(run)
        if is_skipped:
            gaps.append(Gap(lines[places[0]].names[0], places[0], places[-1] + 1))
    return gaps


def _stream(model: PreTrainedModel, plan: Plan, batches: Batches) -> DenseStream:
    """The original model on the calibration text. Raises `UsageError` for a plan, text
    or model that does not fit.
    """
    inner = base_model(model)
    structure = locate(inner)
    plan.check(structure)
    structure.refuse_stubs("a repair")
    if structure.scaled:
        raise UsageError(
            f"layers of {structure.model_type} multiply their stream; only"
            " notall.repair knows that"
        )
    return DenseStream(inner, all_checked(batches, inner))


def _least_squares(
    inputs: Batches, outputs: Batches, *, ridge: float = 0.0, biased: bool = False
) -> Tensor:
    """argmin over C of sum |y - C x|^2 + ridge * |C|^2 in float64, (outputs, inputs),
    with a last column for a bias.
    """
    like = inputs[0].new_empty(0).double()
    moments = Moments.none(inputs[0].shape[-1], outputs[0].shape[-1], biased, like)
    for given, wanted in zip(inputs, outputs):
        given = given.flatten(0, -2).double()  # (tokens, inputs)
        wanted = wanted.flatten(0, -2).double()  # (tokens, outputs)
        moments.add(given, wanted, given.new_ones(len(given)))
    found = moments.solve(ridge, alike=True)
    if found is None:
        raise UsageError(
            f"the text is too short for a matrix of {inputs[0].shape[-1]} channels;"
            " give more --sequences"
        )
    return found


def _over(
    stream: DenseStream, gap: Gap, *, ridge: float = 0.0, biased: bool = False
) -> Tensor:
    """The linear map from the dense stream before a gap to what the gap adds to it."""
    before, behind = stream.before(gap.start, gap.end)
    added = [to.double() - at for at, to in zip(before, behind)]
    return _least_squares(before, added, ridge=ridge, biased=biased).to(
        stream.model.dtype
    )


@torch.no_grad()
def nbl(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """Neural Block Linearization, arXiv 2505.21077: W = C_yx C_xx^-1, b = E[y] - W
    E[x], of the original model.

    x is the stream before an attention and y what it adds, as its repository's layers
    run: no norm stands before W. A skipped MLP gets a map as well, and a block that is
    skipped whole one for both, as in the paper's Block NBL. A least-squares fit with a
    bias is the same estimator.
    """
    stream, maps = _stream(model, plan, batches), {}
    for gap in tracked(
        gaps_of(stream.structure, plan, by_block=True),
        "fitting maps to what is skipped",
        progress,
    ):
        found = _over(stream, gap, biased=True)
        maps[gap.name] = LinearMap(
            found[:, :-1].contiguous(), found[:, -1].contiguous()
        )
    return RepairedPlan.of(plan, maps=maps)


@torch.no_grad()
def ghosted(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """Ghosted Layers, arXiv 2605.15491: x becomes x (I + X^+ D), where D is what a gap
    adds to the dense stream X.

    X^+ = (X'X + 1e-6 I)^-1 X', in float64, as in its `recovery.py`; one matrix a gap,
    and no bias.
    """
    stream, maps = _stream(model, plan, batches), {}
    for gap in tracked(
        gaps_of(stream.structure, plan), "fitting maps over the gaps", progress
    ):
        maps[gap.name] = LinearMap(_over(stream, gap, ridge=RIDGE))
    return RepairedPlan.of(plan, maps=maps)


@torch.no_grad()
def replaceme(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """ReplaceMe, arXiv 2505.02819: what a gap did, as a linear map, folded into the
    output projection before it.

    Its `lstsq` with an `alpha` of 0: T = (M'M)^-1 M'(h_n + M - h_i), and T'W in place
    of W, all of the original. M is what the projection W, of whatever is kept before
    the gap, adds to the stream, h_i the stream behind it, h_n that behind the gap. A
    gap stays that has nothing before it, or a sublayer that a norm or no single matrix
    ends.
    """
    stream = _stream(model, plan, batches)
    steps = [step for step in steps_of(stream.structure, plan) if step.gap]
    weights: dict[str, Tensor] = {}
    for step in tracked(steps, "folding maps into what is before the gaps", progress):
        weights |= _folded(stream, step)
    return RepairedPlan.of(plan, weights=weights)


def _folded(stream: DenseStream, step: LiveStep) -> dict[str, Tensor]:
    layer = stream.layers[step.block.index]
    both = stream.before(step.line, step.behind)
    before, wanted = (stream.at_layer(step, states) for states in both)
    # of a parallel block the MLP, as in its Falcon
    part = max(step.parts, key=lambda part: part.kind == "mlp")
    projection = stream.projections.of(part)
    if projection is None or projection.norm:
        return {}
    with features_of(layer, [projection]) as features:
        behind = stream.run([step], before)
    matrix, bias = projection.matrix(layer), projection.bias(layer)
    added = [inner.double() @ matrix.double().T for inner in features()]
    if bias is not None:
        added = [m + projection.scale * bias.double() for m in added]
    target = [
        to.flatten(0, 1).double() + m - at.flatten(0, 1)
        for to, m, at in zip(wanted, added, behind)
    ]  # (tokens, hidden) each
    through = _least_squares(added, target)  # (hidden, hidden)
    new_matrix = (through @ matrix.double()).to(matrix.dtype)
    new_bias = None if bias is None else (through @ bias.double()).to(bias.dtype)
    return stream.placed(step, projection.parameters(layer, new_matrix, new_bias))


@torch.no_grad()
def prune_and_comp(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """Prune&Comp, arXiv 2507.18212: the stream's magnitude behind a gap is made what it
    was, by weights.

    The stream before each gap is multiplied by a = mean over windows and channels of
    E|x_after| / E|x_before|, gap by gap, as in its `magcomp.py`, which multiplies the
    embedding and every projection before the gap by a. Here every output projection
    *behind* it is divided by a: norms read the stream, so its whole scale tells
    nothing, and an embedding that is the head too can stay.
    """

    def size(states: Tensor) -> Tensor:
        """The mean magnitude over the tokens of each window, (batch, hidden)."""
        return states.double().abs().mean(1)

    stream = _stream(model, plan, batches)
    (states,) = stream.before(0)
    here, scale = 0, 1.0
    weights: dict[str, Tensor] = {}
    gaps = gaps_of(stream.structure, plan)
    for number, gap in enumerate(
        tracked(gaps, "measuring magnitudes over the gaps", progress)
    ):
        states = stream.run(stream.lines[here : gap.start], states)
        behind = stream.run(stream.lines[gap.start : gap.end], states)
        ratios = [
            size(to) / size(at).clamp_min(TINY) for at, to in zip(states, behind)
        ]  # (batch, hidden) each
        ratio = float(torch.cat(ratios).mean())
        states = [ratio * state for state in states]
        here = gap.end
        scale *= ratio
        until = gaps[number + 1].start if number + 1 < len(gaps) else len(stream.lines)
        for line in stream.lines[here:until]:
            for part in line.parts:
                weights |= _divided(stream, line, part, scale)
    return RepairedPlan.of(plan, weights=weights)


def _divided(
    stream: DenseStream, line: Line, part: Sublayer, scale: float
) -> dict[str, Tensor]:
    layer, projection = stream.layers[part.index], stream.projections.of(part)
    if projection is None or projection.norm:
        raise UsageError(
            f"what {part.name} adds to the stream goes through a norm or comes from"
            " more than one matrix, so that no weights rescale it; choose another"
            " repair than prune-and-comp"
        )
    bias = projection.bias(layer)
    matrix = projection.matrix(layer) / scale
    bias = None if bias is None else bias / scale
    return stream.placed(line, projection.parameters(layer, matrix, bias))
