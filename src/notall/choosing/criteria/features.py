"""By what a sublayer or a block does to the residual stream of the dense model: one pass over the text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...errors import UsageError
from ...running.passages import Passage, walk
from ..budget import Budget, contiguous_runs
from ..space import Choice, Unit, names_in
from .setting import Setting, UnitScores

Measure = Callable[[Tensor, Tensor], Tensor]  # the stream before and after, (batch, tokens, hidden), to (batch, tokens)


def score_cosine(setting: Setting) -> UnitScores:
    """1 - cos(x, x + f(x)), the mean over tokens: what changes the direction of its input least goes first.

    Sources: LLM-Drop, arXiv 2406.15786, section 3 (sublayers); ShortGPT, arXiv 2403.03853 (blocks, before the final
    norm).
    """
    return _measured(setting, lambda before, after: 1 - cosine_similarity(before, after, dim=-1))


def score_relative_magnitude(setting: Setting) -> UnitScores:
    """|f(x)| / |x + f(x)|, the mean over tokens. Source: arXiv 2312.09299, as in ShortGPT 2403.03853."""
    return _measured(setting, lambda before, after: (after - before).norm(dim=-1) / after.norm(dim=-1))


def choose_angular(setting: Setting, budget: Budget) -> Choice:
    """The contiguous run of blocks with the least angle between what goes in and what comes out, before the final norm.

    arccos(cos(x[l], x[l + n])) / pi at the last token of each sequence, the mean over sequences; arXiv 2403.17887,
    section 3. Raises `UsageError` when the budget is no fixed number of blocks.
    """
    space = setting.space
    if space.kind != "block" or budget.target == math.inf:
        raise UsageError("the angular distance chooses a run of blocks: say how many, as --skip block:4 does")
    blocks = len(space.structure.blocks)
    states: list[list[Tensor]] = [[] for _ in range(blocks + 1)]  # at the last tokens, before each block and in the end

    def look(passage: Passage) -> None:
        index = passage.block.index
        states[index].append(passage.before[:, -1].double().cpu())
        if index == blocks - 1:
            states[blocks].append(passage.after[:, -1].double().cpu())

    def angle(first: int) -> float:
        start = first + space.keep_first
        before, behind = torch.cat(states[start]), torch.cat(states[start + len(found[first])])
        cosine = cosine_similarity(before, behind, dim=-1).clamp(-1, 1)
        return float((cosine.arccos() / math.pi).mean())

    _walk(setting, look)
    found = contiguous_runs(space, budget)
    order = found[min(found, key=angle)]
    return Choice(names_in(order), order)


@torch.no_grad()
def _walk(setting: Setting, look: Callable[[Passage], None]) -> None:
    start = time.process_time()
    for tokens in setting.batches:
        walk(setting.model, look, input_ids=tokens)
    setting.passed(1, start)


def _measured(setting: Setting, measure: Measure) -> UnitScores:
    """The mean over tokens of what is measured of each unit; of a period the sum over its layers."""
    blocks = [tuple(part.name for part in block.sublayers) for block in setting.space.structure.blocks]
    sums = {
        unit: [unit] if len(unit) == 1 or unit in blocks else [block for block in blocks if set(block) <= {*unit}]
        for unit in setting.space.units
    }
    alone = {part: 0.0 for parts in sums.values() for part in parts}

    def look(passage: Passage) -> None:
        block = passage.block
        pairs: dict[Unit, tuple[Tensor, Tensor]] = {(part.name,): passage.around[part.kind] for part in block.sublayers}
        pairs[tuple(part.name for part in block.sublayers)] = passage.before, passage.after
        for unit, (before, after) in pairs.items():
            if unit in alone:
                alone[unit] += float(measure(before.float(), after.float()).sum())

    _walk(setting, look)
    count = sum(tokens.numel() for tokens in setting.batches)
    return {unit: math.fsum(alone[part] for part in parts) / count for unit, parts in sums.items()}
