"""Refit a prompt: keys and values of its own, and linear maps that stand in for skipped
MLPs.

Where sublayers before an attention are skipped in the prompt, it reads another stream
than the original's, and its keys and values are off, whether it runs or is skipped
itself. Each of its projections W that keys and values depend on gets a change C, and a
bias, for the prompt's tokens alone: with x what the projection is given when the plan
is skipped, and y what it answers in the original, C is argmin sum |y - (W + C) x - b|^2
+ ridge * |C|^2. The ridge is relative to the mean of sum x_i^2, and chosen on sequences
that it was not fitted to. The first token of a sequence counts several times, as most
attentions look at it whatever they read. The answer's tokens keep the original's
weights.

An MLP that is skipped behind an attention that runs gets a map of the same kind in its
place: from the normalised stream before it to what the stream behind it lacks of the
original's.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel, UsageError
from ..plan import Plan
from ..progress import Progress, silent
from ..results.repairs import RefitRecord
from ..running.prefill_check import checked_rows
from ..running.repaired import RepairedPlan
from ..running.stand_in import StandIn, normalised
from ..running.weight_swaps import STAND_IN, with_modules
from ..structure.branches import Branch
from ..structure.calls import LayerCall, child
from ..structure.key_values import (
    EarlyOutputs,
    bias_of,
    caught,
    early_outputs,
    matrix_of,
)
from ..structure.model_structure import ModelStructure, Sublayer
from .held_fit import HeldFit
from .kept import Kept
from .streams import DenseStream, Line

TINY = 1e-30


@dataclass(frozen=True)
class Projected:
    """What one projection was given and made on one batch."""

    inputs: Tensor  # (tokens of the batch, inputs)
    outputs: Tensor  # (tokens of the batch, outputs)


@contextmanager
def projecting(
    holder: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, Projected]]:
    """What the projections `names` below `holder` are given and make, in the `with`."""
    found: dict[str, Projected] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = Projected(args[0].flatten(0, -2), output.flatten(0, -2))

        return note

    hooks = [child(holder, name).register_forward_hook(noting(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _stand_in_at(stream: Tensor, weights: Mapping[str, Tensor]) -> StandIn:
    """On the device and in the dtype of a stream."""
    return StandIn.of({path: weight.to(stream) for path, weight in weights.items()})


# the ridge, the share of the error that it leaves on sequences held out, and weights
Solved = tuple[float | None, float, dict[str, Tensor]]


@dataclass(frozen=True)
class SkippedMlp:
    """A line of which the prompt skips an MLP: the prompt's stream before and behind
    what runs of it, and the original's behind it, (batch, tokens, hidden) a batch.
    """

    line: Line
    before: list[Tensor]
    behind: list[Tensor]
    dense: list[Tensor]


def refitted_in_prompt(structure: ModelStructure, plan: Plan) -> list[Sublayer]:
    """What a refit gives weights of the prompt's own: each attention that is skipped in
    it or behind something that is, and the skipped MLPs before the last of them whose
    block's attention runs.
    """
    skips, found, waiting = plan.prefill, list[Sublayer](), list[Sublayer]()
    is_changed = False
    for part in structure.sublayers:
        is_skipped = part.index in getattr(skips, part.kind)
        is_changed |= is_skipped
        if part.kind == "attention" and is_changed:
            found += [*waiting, part]
            waiting = []
        elif is_skipped and part.index not in skips.attention:
            waiting.append(part)
    return found


def refuse_nothing_to_refit(structure: ModelStructure, plan: Plan) -> None:
    """Raise `UsageError` for a plan that skips in the prompt what no attention is
    behind, and nothing else.
    """
    if plan.prefill and not len(plan) and not refitted_in_prompt(structure, plan):
        raise UsageError(
            f"no attention is behind what this plan skips ({plan.prefill}), so it costs"
            " nothing, and there is nothing to refit: use it as it is"
        )


@dataclass(eq=False)
class PromptRefit:
    """The refit of one plan's prompt: the original's stream and the prompt's, side by
    side through the layers.
    """

    text: DenseStream
    plan: Plan
    ridges: Sequence[float]
    kept: Kept | None = None
    refits: list[RefitRecord] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # by paths in the model

    def __post_init__(self) -> None:
        skips = self.plan.prefill
        parts = self.text.structure.sublayers
        self.skipped = {
            part.name for part in parts if part.index in getattr(skips, part.kind)
        }
        skipped = [part for part in parts if part.name in self.skipped]
        self.rows = checked_rows(self.text.model, self.text.structure, skipped)
        wanted = refitted_in_prompt(self.text.structure, self.plan)
        self.refitted = {part.name for part in wanted if self._can_refit(part)}

    def _can_refit(self, part: Sublayer) -> bool:
        """Whether what runs of a sublayer can have weights of the prompt's own: mixers
        without keys and values have none.
        """
        if part.name in self.skipped:
            return True
        try:
            checked_rows(self.text.model, self.text.structure, [part])
        except UnsupportedModel:
            return False
        return True

    def run(self, progress: Progress = silent) -> RepairedPlan:
        """The plan with weights of the prompt's own."""
        ends = [
            number
            for number, line in enumerate(self.text.lines, 1)
            if not self.refitted.isdisjoint(line.names)
        ]
        end = max(ends, default=0)
        (original,) = self.text.before(0)
        prompt = original  # both streams are one before the first gap
        for number, line in enumerate(self.text.lines[:end]):
            progress(number, end, f"refitting {' '.join(line.names)} in the prompt")
            prompt, original = self._behind(number, line, original, prompt)
        if self.kept:
            return self.kept.sealed(self.plan)
        return RepairedPlan.of(
            self.plan, prompt_weights=self.weights, refits=tuple(self.refits)
        )

    def _behind(
        self, number: int, line: Line, original: list[Tensor], prompt: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The prompt's stream and the original's behind a line, (batch, tokens, hidden)
        a batch.
        """
        own: dict[str, nn.Module] = {}
        for part in line.parts:
            if part.kind == "attention" and part.name in self.refitted:
                weights = self._keys_and_values(part, original, prompt)
                if part.name not in self.skipped:
                    own |= self._early(part, weights)
        (dense,) = self.text.before(number + 1)
        if prompt is original and self.skipped.isdisjoint(line.names):
            return dense, dense
        left = tuple(part for part in line.parts if part.name not in self.skipped)
        with with_modules(self.text.layers[line.block.index], own):
            behind = self.text.run([Line(line.block, left, line.scale)], prompt)
        for part in line.parts:
            if part.kind == "mlp" and part.name in self.refitted:
                skipped = SkippedMlp(line, prompt, behind, dense)
                solve = partial(self._stand_in, part, skipped)
                behind = self._standing_in(skipped, self._refit(part, solve))
        return behind, dense

    def _early(
        self, part: Sublayer, weights: dict[str, Tensor]
    ) -> dict[str, EarlyOutputs]:
        """The projections of an attention that runs with keys and values of the
        prompt's own, of which all tokens are.
        """
        layer = self.text.layers[part.index]
        plan = RepairedPlan.of(self.plan, prompt_weights=weights)
        below = plan.placed(self.text.model).prompt_weights_of(
            self.text.structure, part
        )
        return early_outputs(layer, self.rows[part.name], below, lambda: 0)

    def _standing_in(
        self, skipped: "SkippedMlp", weights: dict[str, Tensor]
    ) -> list[Tensor]:
        """The prompt's stream behind a line, with what stands in for its MLP."""
        if not weights:
            return skipped.behind
        return [
            self.text.keep(
                after + skipped.line.scale * _stand_in_at(before, weights)(before)
            )
            for before, after in zip(skipped.before, skipped.behind)
        ]

    def _stand_in(self, part: Sublayer, skipped: "SkippedMlp") -> Solved:
        """What stands in for a skipped MLP."""
        fit = HeldFit(self.text.held, self.ridges)
        for number, before in enumerate(skipped.before):
            missing = (
                skipped.dense[number] - skipped.behind[number]
            ) / skipped.line.scale
            inputs = normalised(before).flatten(0, 1)  # (tokens, hidden)
            fit.add(number, inputs, missing.flatten(0, 1), before)
        ridge, left, change = fit.best(torch.ones_like(fit.squares))
        if change is None:
            return ridge, left, {}
        layer = self.text.layers[part.index]
        module = next(
            name
            for name in reversed(part.modules)
            if list(child(layer, name).parameters())
        )
        path = f"{self.text.structure.layers}.{part.index}.{module}.{STAND_IN}"
        weights = {f"{path}.weight": change[:, :-1], f"{path}.bias": change[:, -1]}
        return ridge, left, weights

    def _keys_and_values(
        self, part: Sublayer, original: list[Tensor], prompt: list[Tensor]
    ) -> dict[str, Tensor]:
        """The weights of an attention, unless both streams are one before it."""
        if prompt is original:
            unneeded = None, 1.0, dict[str, Tensor]()
            return self._refit(part, lambda: unneeded, "nothing is skipped before it")
        return self._refit(part, partial(self._solve, part, original, prompt))

    def _refit(
        self, part: Sublayer, solve: Callable[[], Solved], why: str = ""
    ) -> dict[str, Tensor]:
        """What `solve` finds for one sublayer, or what the folder holds of it; `why` it
        is left alone, if it is.
        """
        key = ((part.name,),)
        if self.kept and key in self.kept.refits:
            return self.kept.prompt_weights(self.kept.refits[key])
        start = time.process_time()
        ridge, left, weights = solve()
        record = RefitRecord(
            sublayers=(part.name,),
            ridge=ridge,
            left=left,
            seconds=time.process_time() - start,
            why=why,
        )
        self.refits.append(record)
        if self.kept is None:
            self.weights |= weights
        else:
            refit = RepairedPlan(prefill=self.plan.prefill, prompt_weights=weights)
            self.kept.add(record, refit, self.text.model)
        return weights

    def _solve(
        self, part: Sublayer, original: list[Tensor], prompt: list[Tensor]
    ) -> Solved:
        """The keys and values of an attention."""
        layer = self.text.layers[part.index]
        branch = next(branch for branch in part.branches if branch.is_attention)
        fit = HeldFit(self.text.held, self.ridges)
        read: list[str] = []  # names of projections
        for number, (dense, stale) in enumerate(zip(original, prompt)):
            recording = self.text.recordings[number]
            call = LayerCall(recording.arguments[part.index])
            here = recording.devices[part.index]
            wanted = self._projected(layer, branch, part, dense.to(here), call)
            found = self._projected(layer, branch, part, stale.to(here), call)
            read = read or list(found)
            inputs = found[read[0]].inputs  # (tokens, inputs)
            residuals = torch.cat(
                [self._residuals(part, name, wanted, found) for name in read], 1
            )  # (tokens, rows)
            fit.add(number, inputs, residuals, stale)
        ridge, left, change = fit.best(self._counts(part, read, fit.squares))
        if change is None:
            return ridge, left, {}
        return ridge, left, self._changed(part, layer, read, change)

    def _projected(
        self,
        layer: nn.Module,
        branch: Branch,
        part: Sublayer,
        states: Tensor,
        call: LayerCall,
    ) -> dict[str, Projected]:
        """What projections that read the attention's own input, and feed keys or
        values, are given and make.
        """
        needed = [name for name, rows in self.rows[part.name].items() if rows.any()]
        with projecting(layer, needed) as found:
            caught(branch, layer, states, call)
        first = found[needed[0]].inputs
        return {
            name: one
            for name, one in found.items()
            if one.inputs.shape == first.shape and one.inputs.equal(first)
        }

    def _residuals(
        self,
        part: Sublayer,
        name: str,
        wanted: Mapping[str, Projected],
        found: Mapping[str, Projected],
    ) -> Tensor:
        """The original's keys and values less the prompt's, of one projection, (tokens,
        rows).
        """
        rows = self.rows[part.name][name]
        return (wanted[name].outputs - found[name].outputs)[:, rows]

    def _counts(self, part: Sublayer, read: Sequence[str], squares: Tensor) -> Tensor:
        """How much each row counts, (rows,), given its squared residuals: those of each
        projection as much as those of another.
        """
        sizes = [int(self.rows[part.name][name].sum()) for name in read]
        weights = []
        for some in squares.split(sizes):  # (rows of one,)
            total = float(some.sum().clamp_min(TINY))
            weights.append(torch.full_like(some, 1 / total))
        return torch.cat(weights)

    def _changed(
        self, part: Sublayer, layer: nn.Module, read: Sequence[str], change: Tensor
    ) -> dict[str, Tensor]:
        """The rows for keys and values of the projections `read`, (rows, inputs), and
        of their biases, (rows,).
        """
        weights: dict[str, Tensor] = {}
        chosen = [self.rows[part.name][name] for name in read]
        changes = change.split([int(rows.sum()) for rows in chosen])
        for name, rows, own in zip(read, chosen, changes):
            source = child(layer, name)
            matrix = matrix_of(source)[rows].to(change)
            bias = bias_of(source)
            path = f"{self.text.structure.layers}.{part.index}.{name}"
            weights[f"{path}.weight"] = matrix + own[:, :-1]
            if bias is None:
                weights[f"{path}.bias"] = own[:, -1]
            else:
                weights[f"{path}.bias"] = bias[rows].to(change) + own[:, -1]
        return weights
