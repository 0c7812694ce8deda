"""The slow twin of a repair: whole forwards with plain hooks, and one stacked
least-squares problem a step.

Nothing of `notall` runs in it. What the parts of a layer are called is read off
transformers' sources by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from api import DEAD
from families import family, silenced, stack_of
from notall import Plan

HELD, READERS = 8, 4
STEPS = (0.003, 0.03, 0.3, 3.0)
NAMES = ("attn", "mlp")
LLAMA = {"last": ("self_attn.o_proj", "mlp.down_proj"), "final": "model.norm"}
PRE = ("input_layernorm", "post_attention_layernorm")
SCALED = "gemma4_text (nothing shared)"  # each layer multiplies its stream in the end
POST = {"behind": ("post_attention_layernorm", "post_feedforward_layernorm")}


@dataclass(frozen=True)
class Hand:
    """Of a family, below a layer: what is given the stream, line by line, the last
    matrices, the norms behind them.
    """

    name: str
    reads: tuple[str, ...]
    last: tuple[str, str]
    final: str  # the norm before the head
    scale: float = 1.0
    turned: bool = False  # Conv1D: (features, outputs)
    behind: tuple[str, str] | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        return family(self.name).exists

    def build(self) -> PreTrainedModel:
        return family(self.name).build("sdpa", **self.changes).double()

    def __str__(self) -> str:
        return self.name + "".join(f", {name}" for name in self.changes)


DIRECT = [
    Hand("llama", PRE, **LLAMA),
    Hand("granite", PRE, **LLAMA, scale=0.7),
    Hand(
        "gpt2",
        ("ln_1", "ln_2"),
        ("attn.c_proj", "mlp.c_proj"),
        "transformer.ln_f",
        turned=True,
    ),
    Hand(
        "phi",
        ("input_layernorm",),
        ("self_attn.dense", "mlp.fc2"),
        "model.final_layernorm",
    ),
]
NORMED = [
    Hand("gemma3", ("input_layernorm", "pre_feedforward_layernorm"), **LLAMA, **POST),
    Hand(
        "gemma3",
        ("input_layernorm", "pre_feedforward_layernorm"),
        **LLAMA,
        **POST,
        changes={"attention_bias": True},
    ),
    Hand("olmo2", ("self_attn", "mlp"), **LLAMA, **POST),
    Hand(SCALED, ("input_layernorm", "pre_feedforward_layernorm"), **LLAMA, **POST),
]


@dataclass(frozen=True)
class Step:
    """What a plan keeps of one line: the sublayers' kinds, 0 for attention and 1 for
    MLP.
    """

    layer: int
    kinds: tuple[int, ...]
    line: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{NAMES[kind]}.{self.layer}" for kind in self.kinds)


@dataclass(frozen=True)
class Found:
    names: tuple[str, ...]
    ridge: float | None
    left: float


class Twin:
    """A repair of `model`, in float64; `weights` are what it came to, by their paths in
    the model.
    """

    def __init__(
        self,
        hand: Hand,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Tensor],
        ridges: Sequence[float],
    ) -> None:
        self.hand, self.dense, self.plan, self.batches, self.ridges = (
            hand,
            model,
            plan,
            batches,
            sorted(ridges),
        )
        self.copy = copy.deepcopy(model)
        self.root = next(
            name for name, module in model.named_modules() if module is stack_of(model)
        )
        self.layers = stack_of(self.copy)
        sequence = [len(ids[0]) for batch in batches for ids in batch.split(1)]
        every = min(HELD, len(sequence))
        self.held = torch.cat(
            [
                torch.full((n,), place % every == every - 1)
                for place, n in enumerate(sequence)
            ]
        )
        self.steps = self._steps()
        self.ends = [step.line for step in self.steps[1:]] + [
            len(self.layers) * len(hand.reads)
        ]
        self.weights: dict[str, Tensor] = {}
        self.found: list[Found] = []

    def run(self, ahead: float) -> Twin:
        dense, _ = self.forward(self.dense, Plan())
        apart = self.steps[0].line > 0
        for place, (step, end) in enumerate(zip(self.steps, self.ends)):
            target, following = dense[end], place + 1 < len(self.steps)
            if following and ahead and self.ends[place + 1] > end + 1:
                gone, left = dense[self.ends[place + 1]], dense[end + 1]
                on = self.scale(end, self.ends[place + 1]), self.scale(end, end + 1)
                target = target + ahead * (gone / on[0] - left / on[1])
            gap = end > step.line + 1 or self._beside(step)
            if apart or gap or (ahead and following and self._has_gap(place + 1)):
                self._refit(place, target)
                apart = True
        return self

    def scale(self, line: int, other: int) -> float:
        """By what layers multiply the stream from one line to another."""
        lines = len(self.hand.reads)
        ends = (
            self.layers[at // lines]
            for at in range(line, other)
            if at % lines == lines - 1
        )
        return math.prod(float(getattr(layer, "layer_scalar", 1.0)) for layer in ends)

    def _steps(self) -> list[Step]:
        steps = []
        for layer in range(len(self.layers)):
            kept = tuple(
                k
                for k, gone in enumerate((self.plan.attention, self.plan.mlp))
                if layer not in gone
            )
            if len(self.hand.reads) == 1:
                steps += [Step(layer, kept, layer)] if kept else []
            else:
                steps += [Step(layer, (kind,), 2 * layer + kind) for kind in kept]
        return steps

    def _beside(self, step: Step) -> bool:
        return len(self.hand.reads) == 1 and len(step.kinds) == 1

    def _has_gap(self, place: int) -> bool:
        return self.ends[place] > self.steps[place].line + 1 or self._beside(
            self.steps[place]
        )

    def forward(
        self, model: PreTrainedModel, plan: Plan
    ) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        """The stream at each line, and what each last matrix is given, by layer and
        kind: (tokens, ...).
        """
        lines: list[list[Tensor]] = []
        given: dict[tuple[int, int], list[Tensor]] = {}
        handles = []

        def note(into: list[Tensor]) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                into.append(
                    (args[0] if args else kwargs["hidden_states"])
                    .flatten(0, -2)
                    .clone()
                )

            return hook

        def watch(module: nn.Module, into: list[Tensor]) -> None:
            handles.append(
                module.register_forward_pre_hook(note(into), with_kwargs=True)
            )

        for index, layer in enumerate(stack_of(model)):
            for path in self.hand.reads:
                lines.append([])
                watch(layer.get_submodule(path), lines[-1])
            for kind, path in enumerate(self.hand.last):
                watch(layer.get_submodule(path), given.setdefault((index, kind), []))
        lines.append([])
        watch(model.get_submodule(self.hand.final), lines[-1])
        with (
            silenced(model, family(self.hand.name), plan.attention, plan.mlp),
            torch.no_grad(),
        ):
            for batch in self.batches:
                model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return [torch.cat(line) for line in lines], {
            where: torch.cat(parts) for where, parts in given.items()
        }

    def metric(self, place: int) -> Tensor:
        """How much each channel counts for what reads it behind a step: (hidden,)."""
        gains = [self._gain(self.dense.get_submodule(self.hand.final))]
        for step in self.steps[place + 1 : place + 1 + READERS]:
            reads = self.hand.reads[min(step.kinds) if len(self.hand.reads) == 2 else 0]
            gains.append(
                self._gain(stack_of(self.dense)[step.layer].get_submodule(reads))
            )
        mean = torch.stack(
            [gain.square() / gain.square().mean() for gain in gains]
        ).mean(0)
        return mean / mean.mean()

    def _gain(self, norm: nn.Module) -> Tensor:
        if not hasattr(norm, "weight"):  # no norm: an attention or an MLP
            return torch.ones(32, dtype=torch.float64)
        weight = norm.weight.detach()
        return weight + 1 if type(norm).__name__ == "Gemma3RMSNorm" else weight

    def _refit(self, place: int, target: Tensor) -> None:
        step, metric = self.steps[place], self.metric(place)
        lines, given = self.forward(self.copy, self.plan)
        layer = self.layers[step.layer]
        last = [layer.get_submodule(self.hand.last[kind]) for kind in step.kinds]
        features = [given[step.layer, kind] for kind in step.kinds]
        counts = 1 / (target.square() * metric).sum(1)
        whole, behind_own = self._around(place)
        before, behind = lines[step.line] * whole, lines[step.line + 1] * behind_own
        solve = self._solve_behind_norm if self.hand.behind else self._solve
        ridge, left, values = solve(
            place, last, features, counts, metric, before, behind, target
        )
        self.found.append(Found(step.names, ridge, left))
        for kind, module, value in zip(step.kinds, last, values):
            for name, tensor in value.items():
                module.get_parameter(name).data.copy_(tensor)
                self.weights[
                    f"{self.root}.{step.layer}.{self.hand.last[kind]}.{name}"
                ] = tensor

    def _around(self, place: int) -> tuple[float, float]:
        """By what layers multiply the stream between a step and the next, and of that
        what is behind its own line.
        """
        line, end = self.steps[place].line, self.ends[place]
        return self.scale(line, end), self.scale(line + 1, end)

    def _solve(
        self,
        place: int,
        last: list[Any],
        features: list[Tensor],
        counts: Tensor,
        metric: Tensor,
        before: Tensor,
        behind: Tensor,
        target: Tensor,
    ) -> tuple[float | None, float, list[dict[str, Tensor]]]:
        whole, behind_own = self._around(place)
        z, lacking = self.hand.scale * whole * torch.cat(features, 1), target - behind
        if (
            lacking.abs().max() < 1e-9 * target.abs().max()
        ):  # streams that do not differ yet, but for rounding
            return None, 1.0, []
        biased = sum(module.bias is not None for module in last)
        old = [
            tuple(
                None if one is None else one.detach().clone()
                for one in (m.weight, m.bias)
            )
            for m in last
        ]

        def stacked(rows: Tensor, ridge: float) -> Tensor:
            return stacked_least_squares(
                z[rows], lacking[rows], counts[rows], ridge, biased > 0
            )

        def values(change: Tensor) -> list[dict[str, Tensor]]:
            found, start = [], 0
            for (weight, bias), own in zip(old, features):
                part = change[:, start : start + own.shape[1]]
                start += own.shape[1]
                found.append(
                    {"weight": weight + (part.T if self.hand.turned else part)}
                )
                if bias is not None:
                    found[-1]["bias"] = bias + change[:, -1] / biased
            return found

        def left(change: Tensor) -> float:
            """Of a whole forward with the new weights."""
            for module, value in zip(last, values(change)):
                for name, tensor in value.items():
                    module.get_parameter(name).data.copy_(tensor)
            now = (
                target
                - behind_own
                * self.forward(self.copy, self.plan)[0][self.steps[place].line + 1]
            )
            for module, (weight, bias) in zip(last, old):
                module.weight.data.copy_(weight)
                if bias is not None:
                    module.bias.data.copy_(bias)
            error, none = (
                (counts[:, None] * part.square() * metric)[self.held].sum()
                for part in (now, lacking)
            )
            return float(error / none)

        tried = {ridge: left(stacked(~self.held, ridge)) for ridge in self.ridges}
        ridge = min(tried, key=tried.__getitem__)
        if tried[ridge] >= 1:
            return None, 1.0, []
        return ridge, tried[ridge], values(stacked(torch.ones_like(self.held), ridge))

    def _solve_behind_norm(
        self,
        place: int,
        last: list[Any],
        features: list[Tensor],
        counts: Tensor,
        metric: Tensor,
        before: Tensor,
        behind: Tensor,
        target: Tensor,
    ) -> tuple[float | None, float, list[dict[str, Tensor]]]:
        step = self.steps[place]
        (module,), (z,), (kind,) = last, features, step.kinds
        old = module.weight.detach().clone()
        gain = self._gain(self.layers[step.layer].get_submodule(self.hand.behind[kind]))
        answers = z @ old.T + (0 if module.bias is None else module.bias.detach())
        size = answers.square().mean(1, keepdim=True).sqrt()
        whole, behind_own = self._around(place)
        lacking = size * (target - before) / (whole * gain) - answers
        weights = 1 / (target.square() * metric).sum(1) / size[:, 0].square()

        def error() -> float:
            """Of whole forwards with the weights as they are now."""
            missed = (
                behind_own * self.forward(self.copy, self.plan)[0][step.line + 1]
                - target
            )
            return float((counts[:, None] * missed.square() * metric)[self.held].sum())

        def moved(rows: Tensor, ridge: float, held_back: float) -> Tensor:
            change = stacked_least_squares(
                z[rows], lacking[rows], weights[rows], ridge, False
            )
            counting = metric * gain.square()
            return (
                old
                + (counting / (counting + held_back * counting.mean()))[:, None]
                * change
            )

        none, tried = error(), {}
        for ridge in self.ridges:
            for held_back in STEPS:
                module.weight.data.copy_(moved(~self.held, ridge, held_back))
                tried[ridge, held_back] = error() / none
        module.weight.data.copy_(old)
        best = min(tried, key=tried.__getitem__)
        if tried[best] >= 1:
            return None, 1.0, []
        return (
            best[0],
            tried[best],
            [{"weight": moved(torch.ones_like(self.held), *best)}],
        )


def stacked_least_squares(
    z: Tensor, lacking: Tensor, counts: Tensor, ridge: float, biased: bool
) -> Tensor:
    """The change, (outputs, features), and a last column for a bias, which no ridge
    holds back.
    """
    roots = counts.sqrt()[:, None]
    sizes = (roots * z).square().sum(0)
    wide = torch.cat([z, torch.ones(len(z), 1).to(z)], 1) if biased else z
    held_back = torch.eye(wide.shape[1]).to(z)[: z.shape[1]]
    held_back *= (ridge * (sizes + DEAD * sizes.mean())).sqrt()[:, None]
    rows = torch.cat([roots * wide, held_back])
    answers = torch.cat(
        [roots * lacking, lacking.new_zeros(len(held_back), lacking.shape[1])]
    )
    return torch.linalg.lstsq(rows, answers).solution.T
