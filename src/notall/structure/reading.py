"""The block of a layer, and its sublayers, from the trace of a run."""

from collections.abc import Iterable

from transformers import PretrainedConfig

from ..errors import UnsupportedModel
from ..plan import Kind
from .branches import Branch
from .calls import child
from .lines import residual_lines
from .model_structure import Block, Sublayer
from .traces import LayerTrace
from .weights import weights_of


def read_block(config: PretrainedConfig, trace: LayerTrace) -> Block:
    """The block of a layer: a mixer and an MLP, in either order or side by side, or one
    of the two alone.
    """
    lines = residual_lines(trace)
    mixing = [line for line in lines if any(branch.is_attention for branch in line)]
    others = [line for line in lines if any(not branch.is_attention for branch in line)]
    mixers = tuple(branch for line in mixing for branch in line if branch.is_attention)
    mlps = tuple(
        branch for line in others for branch in line if not branch.is_attention
    )
    names = {name for branch in mixers for name in branch.modules}
    elsewhere = [write for write in trace.cache_writes if write.module not in names]
    if len(mixing) > 1 or elsewhere:
        writers = ", ".join(
            dict.fromkeys(
                write.module or "the layer itself" for write in trace.cache_writes
            )
        )
        problem = (
            "expected one sublayer that writes to the cache, found"
            f" {len(mixing) + len(elsewhere)} ({writers})"
        )
        raise UnsupportedModel(
            f"{trace}: {problem}. It cannot be skipped by halves; choose another model"
        )
    if len(others) > 1:
        problem = (
            "expected a mixer that writes to the cache and one MLP, found"
            f" {len(mixing)} and {len(others)}"
        )
        fix = (
            "if sublayers were removed from this model for good, start from the"
            " original model"
        )
        raise UnsupportedModel(
            f"{trace}: {problem}. It cannot be skipped by halves; {fix}"
        )
    parts = (
        [sublayer_of(trace, "attention", mixer_of(config, trace), names, mixers)]
        if mixing
        else []
    )
    if mlps:  # a norm that both have weighs with the mixer
        own = {name for branch in mlps for name in branch.modules} - names
        parts.insert(
            0 if mixing != lines[:1] else 1, sublayer_of(trace, "mlp", None, own, mlps)
        )
    return block_of(trace, parts, parallel=len(lines) < len(parts))


def block_of(
    trace: LayerTrace, parts: list[Sublayer], *, parallel: bool, bare: bool = True
) -> Block:
    """A block of these sublayers, with what its layer answers and is scaled by."""
    scaled_by = trace.unscaled(trace.result)[1] if trace.result else None
    number = getattr(trace.layer, scaled_by) if scaled_by else None
    scale = 1.0 if number is None or number.is_meta else float(number)
    answer = None
    if isinstance(trace.answer, tuple):
        given = (
            trace.attention_answer if isinstance(trace.attention_answer, tuple) else ()
        )
        places = [
            [at for at, one in enumerate(given) if one is value]
            for value in trace.answer[1:]
        ]
        # at the same place if it is there too
        answer = tuple(
            at if at in found else next(iter(found), None)
            for at, found in enumerate(places, start=1)
        )
    return Block(trace.index, tuple(parts), parallel, answer, scaled_by, scale, bare)


def mixer_of(config: PretrainedConfig, trace: LayerTrace) -> str:
    """What transformers calls the mixer of a layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds and len(kinds) > trace.index:
        return str(kinds[trace.index])
    return (
        "full_attention"
        if any(write.bytes_per_token for write in trace.cache_writes)
        else "linear_attention"
    )


def sublayer_of(
    trace: LayerTrace,
    kind: Kind,
    mixer: str | None,
    names: Iterable[str],
    branches: tuple[Branch, ...] = (),
) -> Sublayer:
    """Of the branches of a layer, or of none; it weighs what its modules of these
    `names` do.
    """
    modules = (child(trace.layer, name) for name in names)
    weights = {
        key: one for module in modules for key, one in weights_of(module).items()
    }.values()
    return Sublayer(
        kind,
        trace.index,
        branches,
        parameters=sum(weight.elements for weight in weights),
        weight_bytes=sum(weight.bytes for weight in weights),
        kv_bytes_per_token=(
            sum(write.bytes_per_token for write in trace.cache_writes) if mixer else 0
        ),
        state_bytes=trace.state_bytes if mixer else 0,
        mixer=mixer,
    )
