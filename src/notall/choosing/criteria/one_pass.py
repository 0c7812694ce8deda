"""By one pass of the original model over the text: what a part does to the stream, or
the gradient of its gate.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from ...errors import UsageError
from ...measuring.quality import Look, Passage, walk
from ...running.recording import answering, standing_in
from ...structure.branches import run_branches, scaled
from ...structure.calls import Arguments, LayerCall
from ...structure.in_place import Scale, stubbed_layer
from ...structure.model_structure import Block, ModelStructure, base_model
from ..budget import Budget, contiguous_runs
from ..space import Choice, Unit, names_in
from .setting import Setting, UnitScores

# from the stream before and after, (batch, tokens, hidden) each, to (batch, tokens)
Measure = Callable[[Tensor, Tensor], Tensor]


def score_cosine(setting: Setting) -> UnitScores:
    """1 - cos(x, x + f(x)), the mean over tokens (LLM-Drop 2406.15786, section 3; of
    blocks ShortGPT 2403.03853).
    """
    return _measured(
        setting, lambda before, after: 1 - cosine_similarity(before, after, dim=-1)
    )


def score_relative_magnitude(setting: Setting) -> UnitScores:
    """|f(x)| / |x + f(x)|, the mean over tokens (2312.09299, as in ShortGPT
    2403.03853).
    """
    return _measured(
        setting,
        lambda before, after: (after - before).norm(dim=-1) / after.norm(dim=-1),
    )


def choose_angular(setting: Setting, budget: Budget) -> Choice:
    """Angle between what goes into a contiguous run of blocks and what comes out
    (2403.17887).

    arccos(cos(x[l], x[l + n])) / pi at the last token of each sequence, the mean over
    sequences; section 3. Raises `UsageError` when the budget is no fixed number of
    blocks.
    """
    space = setting.space
    if budget.target == math.inf:
        raise UsageError(
            "the angular distance chooses a run of blocks: say how many, as --skip"
            " block:4 does"
        )
    blocks = len(space.structure.blocks)
    # (batch, hidden) at the last tokens, before each block and in the end
    states: list[list[Tensor]] = [[] for _ in range(blocks + 1)]

    def look(passage: Passage) -> None:
        index = passage.block.index
        states[index].append(passage.before[:, -1].double().cpu())
        if index == blocks - 1:
            states[blocks].append(passage.after[:, -1].double().cpu())

    def angle(first: int) -> float:
        start = first + space.keep_first
        before = torch.cat(states[start])
        behind = torch.cat(states[start + len(found[first])])
        cosines = cosine_similarity(before, behind, dim=-1)  # (sequences,)
        return float((cosines.clamp(-1, 1).arccos() / math.pi).mean())

    _walk(setting, look)
    found = contiguous_runs(space, budget)
    order = found[min(found, key=angle)]
    return Choice(names_in(order), order)


@torch.no_grad()
def _walk(setting: Setting, look: Look) -> None:
    start = time.process_time(), time.monotonic()
    for tokens in setting.batches:
        walk(setting.model, look, input_ids=tokens)
    setting.passed(1, *start)


def _measured(setting: Setting, measure: Measure) -> UnitScores:
    """The mean over tokens of what is measured of each unit; of a period the sum over
    its layers.
    """
    blocks = [_names_of(block) for block in setting.space.structure.blocks]
    summands: dict[Unit, list[Unit]] = {}
    for unit in setting.space.units:
        is_measured = len(unit) == 1 or unit in blocks
        inside = [block for block in blocks if set(block) <= {*unit}]
        summands[unit] = [unit] if is_measured else inside
    sums = {part: 0.0 for parts in summands.values() for part in parts}

    def look(passage: Passage) -> None:
        block = passage.block
        pairs: dict[Unit, tuple[Tensor, Tensor]] = {
            (part.name,): passage.around[part.kind] for part in block.sublayers
        }
        pairs[_names_of(block)] = (passage.before, passage.after)
        for unit, (before, after) in pairs.items():
            if unit in sums:
                sums[unit] += float(measure(before.float(), after.float()).sum())

    _walk(setting, look)
    count = sum(tokens.numel() for tokens in setting.batches)
    return {
        unit: math.fsum(sums[part] for part in parts) / count
        for unit, parts in summands.items()
    }


def _names_of(block: Block) -> Unit:
    return tuple(part.name for part in block.sublayers)


def score_first_order(setting: Setting) -> UnitScores:
    """Gradient of the NLL to a gate, -dL/dgate at h + gate * f(h), gate = 1
    (1611.06440, equation 7).
    """
    return {
        unit: -float(gradients.mean())
        for unit, gradients in _gradients(setting).items()
    }


def score_fisher(setting: Setting) -> UnitScores:
    """The same gradient, squared per sequence: half of the empirical Fisher information
    (1801.05787, equation 7).
    """
    return {
        unit: float(gradients.square().mean()) / 2
        for unit, gradients in _gradients(setting).items()
    }


def _gradients(setting: Setting) -> dict[Unit, Tensor]:
    """dL/dgate of each unit, by sequence: a block's gate is the gate of both its
    sublayers. (sequences,) each.
    """
    start = time.process_time(), time.monotonic()
    space, model = setting.space, base_model(setting.model)
    found: dict[Unit, list[Tensor]] = {unit: [] for unit in space.units}
    for ids in setting.batches:
        rows = len(ids)
        gates = {
            name: torch.ones(rows, device=ids.device, requires_grad=True)
            for name in space.order
        }
        with torch.enable_grad():
            with gated(model, space.structure, gates, ids.shape):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:].flatten().to(logits.device)
            # of the sum over sequences of each one's mean
            loss = rows * cross_entropy(logits.flatten(0, 1), targets)
        gradients = torch.autograd.grad(loss, list(gates.values()))
        by_gate = {name: one.double().cpu() for name, one in zip(gates, gradients)}
        for unit, parts in found.items():
            parts.append(torch.stack([by_gate[name] for name in unit]).sum(0))
    setting.passed(3, *start)  # a backward pass costs about two forward ones
    return {unit: torch.cat(parts) for unit, parts in found.items()}


def gated(
    model: PreTrainedModel,
    structure: ModelStructure,
    gates: Mapping[str, Tensor],
    shape: Sequence[int],
) -> AbstractContextManager[None]:
    """Have each sublayer add what it does times its gate, (batch,), inside the `with`;
    `shape`: (batch, tokens).
    """

    def forward(layer: nn.Module, block: Block) -> Callable[..., object]:
        scales = {
            part.stub: times(gates[part.name], shape)
            for part in block.sublayers
            if part.stub
        }

        def answer(arguments: Arguments, given: Tensor) -> Tensor:
            total = given
            for part in block.sublayers:
                start = given if block.parallel else total
                end = run_branches(part.branches, layer, start, LayerCall(arguments))
                total = total + times(gates[part.name], shape)(end - start)
            return scaled(total, block.scale)

        if scales:
            return stubbed_layer(layer, block.index, scales)
        return answering(layer, block, answer)

    return standing_in(model, structure, forward)


def times(gate: Tensor, shape: Sequence[int]) -> Scale:
    """Times each sequence's gate: of (batch, tokens, ...), (streams, batch, tokens,
    ...), (batch x tokens, ...).
    """
    batch, tokens = shape

    def scale(added: Tensor) -> Tensor:
        factors = gate.to(added.device, added.dtype)
        if added.dim() > 3 and added.shape[:2] != (batch, tokens):
            return added * factors.view(1, batch, *[1] * (added.dim() - 2))
        return (added.reshape(batch, -1) * factors.view(batch, 1)).view(added.shape)

    return scale
