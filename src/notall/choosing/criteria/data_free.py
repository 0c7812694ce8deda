"""Without a text: by place alone, for which a config is enough (the paper skips the
deepest), or by the weights.
"""

import random
from itertools import product
from numbers import Real
from typing import get_args

from torch import nn

from ...errors import UsageError, expect
from ...options import PAPER_GRID, GridOptions
from ...plan import Phase, Plan, Skippable, several_of
from ...results.facts import Configured
from ...strict_json import Settings
from ...structure.model_structure import ModelStructure, base_model
from .setting import Setting, UnitScores

SKIPPABLE: tuple[Skippable, ...] = get_args(Skippable)
PHASES: tuple[Phase, ...] = get_args(Phase)


def deepest(
    structure: ModelStructure,
    skip: Skippable,
    fraction: float | None = None,
    *,
    count: int | None = None,
    keep_last: bool = False,
    phase: Phase = "all",
    last_tokens: int = 1,
) -> Plan:
    """The paper's rule: skip the last k = round(fraction x layers) of them; with
    `keep_last`, the k before the last.

    With the `phase` prefill they are skipped for a prompt's tokens alone, but for its
    `last_tokens`; of blocks the last one is then exact, as nothing reads it. Give
    `fraction`, or k itself as `count`. Where layers lack one of the two, as in hybrids,
    k is that part of those that have what is skipped. Source: arXiv 2407.15516,
    sections 2 and 3. Raises `UsageError` for an unknown kind or phase, a fraction
    outside 0..1, a count of more than there are, and where no attention would be left.
    """
    expect(structure, ModelStructure, "the structure of a model: notall.locate(model)")
    if skip not in SKIPPABLE:
        raise UsageError(f"cannot skip {skip!r}: choose one of {', '.join(SKIPPABLE)}")
    if phase not in PHASES:
        raise UsageError(f"phase is {phase!r}: give one of {', '.join(PHASES)}")
    layers = [
        block for block in structure.blocks if skip == "block" or skip in block.kinds
    ]
    last = len(layers) - keep_last
    if count is None:
        expect(fraction, Real, "the fraction to skip, a number from 0 to 1")
        if not 0 <= (share := fraction or 0.0) <= 1:
            raise UsageError(
                f"fraction {fraction} is outside 0..1: 0.33 skips a third of the layers"
            )
        count = min(round(share * len(layers)), last)
    elif fraction is not None or not 0 <= count <= last:
        had = several_of(skip, last)
        raise UsageError(
            f"cannot skip {count} of {had}: give a fraction, or a count from 0 to"
            f" {last}"
        )
    chosen = layers[last - count : last]
    skipped: Settings = {
        "attention": [
            block.index
            for block in chosen
            if skip != "mlp" and "attention" in block.kinds
        ],
        "mlp": [
            block.index
            for block in chosen
            if skip != "attention" and "mlp" in block.kinds
        ],
    }
    if phase == "prefill":
        skipped = {"prefill": skipped | {"last_tokens": last_tokens}}
    in_words = ", last kept" * keep_last + ", in the prompt alone" * (
        phase == "prefill"
    )
    note = f"deepest {count} of {several_of(skip, len(layers))}{in_words}"
    plan = Plan(**skipped, fingerprint=structure.fingerprint, note=note)
    plan.check(structure)
    return plan


def paper_grid(
    structure: ModelStructure, grid: GridOptions = PAPER_GRID
) -> list[Configured]:
    """Dense and {attention, mlp, block} x fractions x {keep last no, yes}. Source:
    arXiv 2407.15516, section 3. Raises `UsageError` as `deepest`, and for a fraction
    outside 0..1.
    """
    grid.check()
    fractions = sorted({*grid.fractions})
    rows = [Configured(variant="dense", fraction=0.0, keep_last=False, plan=Plan())]
    for variant, fraction, keep_last in product(SKIPPABLE, fractions, (False, True)):
        plan = deepest(structure, variant, fraction, keep_last=keep_last)
        rows.append(
            Configured(
                variant=variant, fraction=fraction, keep_last=keep_last, plan=plan
            )
        )
    return rows


def score_deepest(setting: Setting) -> UnitScores:
    """Place: the deepest first (the paper's rule, 2407.15516)."""
    return {unit: -float(place) for place, unit in enumerate(setting.space.units)}


def score_shallowest(setting: Setting) -> UnitScores:
    """Place: the shallowest first."""
    return {unit: float(place) for place, unit in enumerate(setting.space.units)}


def score_random(setting: Setting) -> UnitScores:
    """Chance: an order drawn with the seed, which any criterion must beat."""
    draw = random.Random(setting.seed)
    return {unit: draw.random() for unit in setting.space.units}


def score_gate_norm(setting: Setting) -> UnitScores:
    """|W_Q W_K^T|, the Frobenius norm, without a text; a group of heads shares keys
    (Gate-Norm 2512.20636).
    """
    model, structure = base_model(setting.model), setting.space.structure
    layers = list(model.get_submodule(structure.layers).children())
    return {
        (name,): _coupling(layers[int(name.partition(".")[2])])
        for name in setting.space.names
    }


def _linear(layer: nn.Module) -> dict[str, nn.Linear]:
    """A layer's projections, each by the last name of its path; the first where several
    have one name.
    """
    modules = reversed(list(layer.named_modules()))
    return {
        path.rpartition(".")[2]: module
        for path, module in modules
        if isinstance(module, nn.Linear)
    }


def has_projections(layer: nn.Module) -> bool:
    """Whether a layer has the queries' and the keys' projections apart."""
    return {"q_proj", "k_proj"} <= _linear(layer).keys()


def _coupling(layer: nn.Module) -> float:
    """|W_Q W_K^T| of an attention, each head of queries with the keys that it reads."""
    found = _linear(layer)
    for name in ("q_proj", "k_proj"):
        if name not in found:
            raise UsageError(
                "Gate-Norm needs separate query and key projections, and"
                f" {type(layer).__name__} has no {name}; take another criterion"
            )
    queries = found["q_proj"].weight.detach().float()  # (heads * width, hidden)
    keys = found["k_proj"].weight.detach().float()  # (key heads * width, hidden)
    shared_by = len(queries) // len(keys)
    if shared_by > 1:
        widths = [getattr(module, "head_dim", None) for module in layer.modules()]
        width = next(one for one in widths if isinstance(one, int))
        heads = keys.view(-1, width, keys.shape[-1])  # (key heads, width, hidden)
        keys = heads.repeat_interleave(shared_by, dim=0).flatten(0, 1)
    return float((queries.T @ keys).norm())  # of (hidden, hidden)
