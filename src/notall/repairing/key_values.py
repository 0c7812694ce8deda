"""Refit the keys and values of a prompt: maps of its own for attentions that are skipped in it.

Where sublayers before an attention are skipped in the prompt, it reads another stream than the original's, and its
keys and values are off. Each of its projections W that keys and values depend on gets a change C, and a bias, for the
prompt's tokens alone: with x what the projection is given when the plan is skipped, and y what it answers in the
original, C is argmin sum |y - (W + C) x - b|^2 + ridge * sum_i C_i^2 sum x_i^2. The ridge is chosen on sequences that
it was not fitted to. The answer's tokens keep the original's weights.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..plan import Plan
from ..progress import Progress, silent
from ..results.repairs import RefitRecord
from ..running.prefill import checked_rows
from ..structure.key_values import bias_of, caught, matrix_of
from ..structure.model_structure import Sublayer
from ..structure.observation import Branch, LayerCall, child
from .solving import Moments
from .streams import DenseStream, Line

TINY = 1e-30


@dataclass(frozen=True)
class Projected:
    """What one projection was given and made on one batch."""

    inputs: Tensor  # (tokens of the batch, inputs)
    outputs: Tensor  # (tokens of the batch, outputs)


@contextmanager
def projecting(holder: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Projected]]:
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


class KeyValueRepair:
    """The refit of one plan's prompt: the original's stream and the prompt's, side by side through the layers."""

    def __init__(self, text: DenseStream, plan: Plan, ridges: Sequence[float]) -> None:
        self.text, self.plan, self.ridges = text, plan, ridges
        self.skipped = {
            part.name for part in text.structure.sublayers if part.index in getattr(plan.prefill, part.kind)
        }
        parts = [part for part in text.structure.sublayers if part.name in self.skipped]
        self.rows = checked_rows(text.model, text.structure, parts)
        self.refits: list[RefitRecord] = []
        self.weights: dict[str, Tensor] = {}

    def run(self, progress: Progress = silent) -> None:
        """Fill `refits` and `weights`, by their paths in the model."""
        (original,) = self.text.before(0)
        prompt = original
        for number, line in enumerate(self.text.lines):
            progress(number, len(self.text.lines), f"refitting {' '.join(line.names)} of the prompt")
            if prompt is not original:
                for part in line.parts:
                    if part.name in self.skipped and part.kind == "attention":
                        self._refit(line, part, original, prompt)
            behind = self.text.before(number + 1)[0]
            if self.skipped.isdisjoint(line.names):
                prompt = behind if prompt is original else self.text.run([line], prompt)
            elif len(line.parts) > 1:
                kept = tuple(part for part in line.parts if part.name not in self.skipped)
                prompt = self.text.run([Line(line.block, kept, line.scale)], prompt)
            elif line.scale != 1:
                prompt = [line.scale * hidden for hidden in prompt]
            else:
                prompt = list(prompt)
            original = behind

    def _refit(self, line: Line, part: Sublayer, original: list[Tensor], prompt: list[Tensor]) -> None:
        start = time.process_time()
        layer = self.text.layers[part.index]
        branch = next(branch for branch in part.branches if branch.is_attention)
        sums: list[Moments] = []  # of sequences that are fitted, and of those held out
        read: list[str] = []
        for number, (dense, stale) in enumerate(zip(original, prompt)):
            call = LayerCall(self.text.recordings[number].arguments[part.index])
            wanted = self._projected(layer, branch, part, dense, call)
            found = self._projected(layer, branch, part, stale, call)
            read = read or list(found)
            inputs = found[read[0]].inputs
            exact = torch.promote_types(inputs.dtype, torch.float32)
            lacking = torch.cat([self._lacking(part, name, wanted, found) for name in read], 1)  # (tokens, rows)
            sums = sums or [_none(inputs, lacking, exact) for _ in range(2)]
            held = self.text.held[number][:, None].expand(stale.shape[:2]).flatten()  # (tokens,)
            for one, rows in zip(sums, (~held, held)):
                features = inputs[rows].to(exact)
                one.add(features, lacking[rows].to(exact), torch.ones_like(features[:, 0]))
        fitted, held_out = sums
        ridge, left, change = self._best(fitted, held_out, self._counts(part, read, fitted))
        if change is not None:
            self._keep(part, layer, read, change)
        seconds = time.process_time() - start
        self.refits.append(RefitRecord(sublayers=(part.name,), ridge=ridge, left=left, seconds=seconds))

    def _projected(
        self, layer: nn.Module, branch: Branch, part: Sublayer, states: Tensor, call: LayerCall
    ) -> dict[str, Projected]:
        """What projections that read the attention's own input, and feed keys or values, are given and make."""
        needed = [name for name, rows in self.rows[part.name].items() if rows.any()]
        with projecting(layer, needed) as found:
            caught(branch, layer, states, call)
        first = found[needed[0]].inputs
        return {name: one for name, one in found.items() if one.inputs.shape == first.shape and one.inputs.equal(first)}

    def _lacking(
        self, part: Sublayer, name: str, wanted: Mapping[str, Projected], found: Mapping[str, Projected]
    ) -> Tensor:
        """What a projection's rows for keys and values make too little of, (tokens, rows)."""
        rows = self.rows[part.name][name]
        return (wanted[name].outputs - found[name].outputs)[:, rows]

    def _counts(self, part: Sublayer, read: Sequence[str], fitted: Moments) -> Tensor:
        """How much each row counts, (rows,): those of each projection as much as those of another."""
        sizes = [int(self.rows[part.name][name].sum()) for name in read]
        parts = fitted.square.split(sizes)
        return torch.cat([torch.full_like(one, 1 / float(one.sum().clamp_min(TINY))) for one in parts])

    def _best(self, fitted: Moments, held: Moments, counts: Tensor) -> tuple[float | None, float, Tensor | None]:
        """The ridge that leaves least on what is held out, that share, and the change, (rows, inputs + 1)."""
        best, least = None, 1.0
        for ridge in self.ridges:
            change = fitted.solve(ridge)
            if change is not None and (left := held.left(change, counts)) < least:
                best, least = ridge, left
        return best, least, None if best is None else (fitted + held).solve(best)

    def _keep(self, part: Sublayer, layer: nn.Module, read: Sequence[str], change: Tensor) -> None:
        """The weights and biases of the projections `read`, changed in their rows for keys and values."""
        rows = [self.rows[part.name][name].nonzero()[:, 0].to(change.device) for name in read]
        for name, at, more in zip(read, rows, change.split([len(one) for one in rows])):
            source = child(layer, name)
            matrix = matrix_of(source).to(change)
            own = bias_of(source)
            bias = matrix.new_zeros(len(matrix)) if own is None else own.to(change)
            path = f"{self.text.structure.layers}.{part.index}.{name}"
            changed = matrix.index_add(0, at, more[:, :-1])
            self.weights[f"{path}.weight"] = changed.T.contiguous() if isinstance(source, Conv1D) else changed
            self.weights[f"{path}.bias"] = bias.index_add(0, at, more[:, -1])


def _none(inputs: Tensor, lacking: Tensor, exact: torch.dtype) -> Moments:
    """Sums of no tokens yet, of inputs (tokens, inputs) and what is lacking, (tokens, rows)."""
    like = inputs.new_empty(0, dtype=exact)
    return Moments.none(inputs.shape[1], lacking.shape[1], True, like)
