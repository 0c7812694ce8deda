"""Refit the keys and values of a prompt: maps of its own for attentions that are
skipped in it.

Where sublayers before an attention are skipped in the prompt, it reads another stream
than the original's, and its keys and values are off. Each of its projections W that
keys and values depend on gets a change C, and a bias, for the prompt's tokens alone:
with x what the projection is given when the plan is skipped, and y what it answers in
the original, C is argmin sum |y - (W + C) x - b|^2 + ridge * |C|^2. The ridge is
relative to the mean of sum x_i^2, and chosen on sequences that it was not fitted to.
The first token of a sequence counts `SINK` times, as most attentions look at it
whatever they read. The answer's tokens keep the original's weights.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..plan import Plan
from ..progress import Progress, silent
from ..results.repairs import RefitRecord
from ..running.prefill_check import checked_rows
from ..running.repaired import RepairedPlan
from ..structure.branches import Branch
from ..structure.calls import LayerCall, child
from ..structure.key_values import bias_of, caught, matrix_of
from ..structure.model_structure import Sublayer
from .kept import Kept
from .least_squares import Moments
from .streams import DenseStream, Line

TINY = 1e-30
# 100 has the same result, 1 a KL that is a quarter higher on the default model
SINK = 10.0


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


@dataclass(eq=False)
class KeyValueRepair:
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
        parts = [
            part
            for part in self.text.structure.sublayers
            if part.index in getattr(self.plan.prefill, part.kind)
        ]
        self.skipped = {part.name for part in parts}
        self.rows = checked_rows(self.text.model, self.text.structure, parts)

    def run(self, progress: Progress = silent) -> RepairedPlan:
        """The plan with weights of the prompt's own."""
        attentions: dict[int, Sublayer] = {}  # that are skipped, by the line's number
        for number, line in enumerate(self.text.lines):
            for part in line.parts:
                if part.name in self.skipped and part.kind == "attention":
                    attentions[number] = part
        end = max(attentions, default=-1) + 1
        (original,) = self.text.before(0)
        prompt = original  # both streams are one before the first gap
        for number, line in enumerate(self.text.lines[:end]):
            doing = f"refitting keys and values, {' '.join(line.names)}"
            progress(number, end, doing)
            if number in attentions:
                self._refit(attentions[number], original, prompt)
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
        (dense,) = self.text.before(number + 1)
        if not self.skipped.isdisjoint(line.names):
            left = tuple(part for part in line.parts if part.name not in self.skipped)
            return self.text.run([Line(line.block, left, line.scale)], prompt), dense
        if prompt is original:
            return dense, dense
        return self.text.run([line], prompt), dense

    def _refit(
        self, part: Sublayer, original: list[Tensor], prompt: list[Tensor]
    ) -> None:
        """Fit the keys and values of one attention, or take them from the folder."""
        if self.kept and ((part.name,),) in self.kept.refits:
            return
        start = time.process_time()
        ridge, left, weights, why = None, 1.0, dict[str, Tensor](), ""
        if prompt is original:
            why = "nothing is skipped before it"
        else:
            ridge, left, weights = self._solve(part, original, prompt)
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
            return
        refit = RepairedPlan(prefill=self.plan.prefill, prompt_weights=weights)
        self.kept.add(record, refit, self.text.model)

    def _solve(
        self, part: Sublayer, original: list[Tensor], prompt: list[Tensor]
    ) -> tuple[float | None, float, dict[str, Tensor]]:
        """The ridge, the share of the error that it leaves on sequences held out, and
        the weights.
        """
        layer = self.text.layers[part.index]
        branch = next(branch for branch in part.branches if branch.is_attention)
        sums: list[Moments] = []  # of sequences that are fitted, and of those held out
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
            exact = torch.promote_types(inputs.dtype, torch.float32)
            sums = sums or [_none(inputs, residuals, exact) for _ in range(2)]
            held = self.text.held[number].to(here)  # (batch,)
            held = held[:, None].expand(stale.shape[:2]).flatten()  # (tokens,)
            counts = torch.ones(stale.shape[:2], dtype=exact, device=here)
            counts[:, 0] = SINK
            counts = counts.flatten()  # (tokens,)
            for one, rows in zip(sums, (~held, held)):
                one.add(inputs[rows].to(exact), residuals[rows].to(exact), counts[rows])
        fitted, held_out = sums
        counts = self._counts(part, read, fitted)
        ridge, left, change = self._best(fitted, held_out, counts)
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

    def _counts(self, part: Sublayer, read: Sequence[str], fitted: Moments) -> Tensor:
        """How much each row counts, (rows,): those of each projection as much as those
        of another.
        """
        sizes = [int(self.rows[part.name][name].sum()) for name in read]
        weights = []
        for squares in fitted.square.split(sizes):  # (rows of one,)
            total = float(squares.sum().clamp_min(TINY))
            weights.append(torch.full_like(squares, 1 / total))
        return torch.cat(weights)

    def _best(
        self, fitted: Moments, held: Moments, counts: Tensor
    ) -> tuple[float | None, float, Tensor | None]:
        """The ridge that leaves least on what is held out, that share, and the change,
        (rows, inputs + 1).
        """
        best, least = None, 1.0
        for ridge in self.ridges:
            change = _solved(fitted, ridge)
            if change is not None and (left := held.left(change, counts)) < least:
                best, least = ridge, left
        return best, least, None if best is None else _solved(fitted + held, best)

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


def _solved(sums: Moments, ridge: float) -> Tensor | None:
    """The change that a ridge leaves, relative to the mean square of features, (rows,
    inputs + 1), if there is one.
    """
    return sums.solve(ridge * float(sums.gram.diagonal()[:-1].mean()), alike=True)


def _none(inputs: Tensor, residuals: Tensor, exact: torch.dtype) -> Moments:
    """Sums of no tokens yet, for inputs, (tokens, inputs), and residuals, (tokens,
    rows).
    """
    like = inputs.new_empty(0, dtype=exact)
    return Moments.none(inputs.shape[1], residuals.shape[1], True, like)
