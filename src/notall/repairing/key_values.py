"""Refit the keys and values of a prompt: maps of its own for attentions that are skipped in it.

Where sublayers before an attention are skipped in the prompt, it reads another stream than the original's, and its
keys and values are off. Each of its projections W that keys and values depend on gets a change C, and a bias, for the
prompt's tokens alone: with x what the projection is given when the plan is skipped, and y what it answers in the
original, C is argmin sum |y - (W + C) x - b|^2 + ridge * sum_i C_i^2 sum x_i^2. The ridge is chosen on sequences that
it was not fitted to. The answer's tokens keep the original's weights.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..plan import Plan
from ..progress import Progress, silent
from ..results.repairs import RefitRecord
from ..running.prefill import checked_rows
from ..structure.key_values import caught, matrix_of
from ..structure.model_structure import Sublayer
from ..structure.observation import Branch, LayerCall, child, run_branches
from .solving import Moments
from .streams import DenseStream, Line


@dataclass(frozen=True)
class Projected:
    """What one projection was given and made on one batch."""

    inputs: Tensor  # (tokens of the batch, inputs)
    outputs: Tensor  # (tokens of the batch, outputs)


@contextmanager
def projecting(holder: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Projected]]:
    """What the projections `names` below `holder` are given and make, in the `with`."""
    found: dict[str, Projected] = {}

    def noting(name: str):
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
        self.skipped = {part.name for part in text.structure.sublayers if part.index in getattr(plan.prefill, part.kind)}
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
        (branch,) = [branch for branch in part.branches if branch.is_attention]
        needed = {name: rows for name, rows in self.rows[part.name].items() if rows.any()}
        sums: dict[str, list[Moments]] = {}
        for number, (dense, stale) in enumerate(zip(original, prompt)):
            call = LayerCall(self.text.recordings[number].arguments[part.index])
            wanted, found = (self._projected(layer, branch, states, call, needed) for states in (dense, stale))
            held = self.text.held[number]
            for name, rows in needed.items():
                lacking = (wanted[name].outputs - found[name].outputs)[:, rows]
                inputs = found[name].inputs
                for which, chosen in enumerate((~held, held)):
                    taken = chosen[:, None].expand(stale.shape[:2]).flatten()
                    if name not in sums:
                        like = inputs.new_empty(0, dtype=torch.promote_types(inputs.dtype, torch.float32))
                        sums[name] = [
                            Moments.none(inputs.shape[1], int(rows.sum()), True, like) for _ in range(2)
                        ]
                    z, r = inputs[taken].to(sums[name][0].gram), lacking[taken].to(sums[name][0].gram)
                    sums[name][which].add(z, r, torch.ones_like(z[:, 0]))
        for name, (fitted, held_sums) in sums.items():
            self._solve(part, layer, name, fitted, held_sums, start)

    def _projected(
        self, layer: nn.Module, branch: Branch, states: Tensor, call: LayerCall, names: Mapping[str, Tensor]
    ) -> dict[str, Projected]:
        with projecting(layer, list(names)) as found:
            caught(branch, layer, states, call)
        return found

    def _solve(self, part, layer, name, fitted: Moments, held: Moments, start: float) -> None:
        metric = torch.ones_like(fitted.square)
        best, least = None, 1.0
        for ridge in self.ridges:
            change = fitted.solve(ridge)
            if change is not None and (left := held.left(change, metric)) < least:
                best, least = ridge, left
        if best is not None:
            change = (fitted + held).solve(best)
            rows = self.rows[part.name][name]
            source = child(layer, name)
            own = matrix_of(source)[rows]
            bias = source.bias[rows] if source.bias is not None else own.new_zeros(len(own))
            path = f"{self.text.structure.layers}.{part.index}.{name}"
            self.weights[f"{path}.weight"] = (own.to(change) + change[:, :-1]).to(own.dtype)
            self.weights[f"{path}.bias"] = (bias.to(change) + change[:, -1]).to(own.dtype)
        self.refits.append(
            RefitRecord(sublayers=(f"{part.name}.{name}",), ridge=best, left=least, seconds=time.process_time() - start, why="")
        )
