"""Read a traced layer as lines h = h + ops(h), or h = h + ops(h) + ... in a parallel
block. In the end it may multiply h by one number of its own (`LayerTrace.unscaled`).
"""

from collections.abc import Iterator

import torch

from ..errors import UnsupportedModel
from .branches import Argument, Branch, Op, Slot, Stream
from .calls import child, parameter_names, parameters_of
from .traces import MULTIPLICATIONS, LayerTrace, Node

CASTS = {"to", "float", "type_as"}
# f(a + b) = f(a) + f(b), so a sum of branches may be scaled as a whole.
LINEAR_FUNCTIONS = {*MULTIPLICATIONS, "div", "__truediv__", "dropout"}
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


def residual_lines(trace: LayerTrace) -> list[tuple[Branch, ...]]:
    """The lines of the residual stream that a layer is, in order. Raises
    `UnsupportedModel` where it is none.
    """
    if trace.result is None:
        raise _unsupported(
            trace,
            "its answer does not come from its hidden states",
            "a stream of hidden states",
        )
    return _stream(trace, trace.unscaled(trace.result)[0])


def _stream(trace: LayerTrace, node: Node) -> list[tuple[Branch, ...]]:
    if node.made_by is None:
        return []
    if node.is_sum:
        leaves = list(_leaves(node))  # of parallel branches added one after the other
        splits = [(one, node.inputs) for one in node.inputs]
        splits += [(one, leaves) for one in leaves]
        for base, terms in splits:
            stream = base
            # some layers cast the stream before they add to it
            while stream.name in CASTS and len(stream.inputs) == 1:
                stream = stream.inputs[0]
            groups = [
                _branches(trace, term, stream) for term in terms if term is not base
            ]
            if all(groups):
                line = tuple(branch for group in groups for branch in group)
                return [*_stream(trace, stream), line]
        raise _unsupported(
            trace,
            "it adds what does not come from its residual stream",
            "h + sublayer(h)",
        )
    if len(node.inputs) != 2 or not isinstance(node.made_by, str):
        found = f"it applies {node} after its last residual addition (post-norm)"
        raise _unsupported(trace, found, "h + sublayer(h) as its last step")
    # a module that adds itself
    for residual, value in (node.inputs, node.inputs[::-1]):
        ops, source = _chain(trace, value, residual)
        if source is residual and ops:
            last = _op(trace, node, value, residual)
            branch = Branch((*ops, last), adds_itself=True)
            return [*_stream(trace, residual), (branch,)]
    raise _unsupported(trace, f"{node} mixes two hidden states", "h + sublayer(h)")


def _leaves(node: Node) -> Iterator[Node]:
    if node.is_sum:
        for term in node.inputs:
            yield from _leaves(term)
    else:
        yield node


def _branches(trace: LayerTrace, term: Node, base: Node) -> list[Branch]:
    """The branches from `base` whose sum is `term`; empty when `term` is not such a
    sum.
    """
    if term is base:
        return []
    ops, source = _chain(trace, term, base)
    if source is base:
        return [Branch(ops)] if ops else []
    if source.is_sum and all(op.name in LINEAR_FUNCTIONS for op in ops):
        groups = [_branches(trace, inner, base) for inner in source.inputs]
        if all(groups):
            return [Branch((*branch.ops, *ops)) for group in groups for branch in group]
    return []


def _chain(trace: LayerTrace, node: Node, base: Node) -> tuple[tuple[Op, ...], Node]:
    """The operations that lead to `node`, back to the first sum, two-input module or
    the layer's input.
    """
    ops: list[Op] = []
    while node is not base and node.made_by is not None and len(node.inputs) == 1:
        source = node.inputs[0]
        ops.insert(0, _op(trace, node, source, None))
        node = source
    return tuple(ops), node


def _op(trace: LayerTrace, node: Node, value: Node, residual: Node | None) -> Op:
    module = child(trace.layer, node.made_by) if isinstance(node.made_by, str) else None
    names = parameter_names(module) if module else ()

    def slot(name: str, given: object) -> Slot:
        if given is value:
            return Stream.VALUE
        if given is residual and given is not None:
            return Stream.RESIDUAL
        return _from_outside(trace, node, name, given)

    positional = tuple(
        slot(names[i] if i < len(names) else "", v)
        for i, v in enumerate(node.positional)
    )
    keywords = tuple((name, slot(name, v)) for name, v in node.keywords.items())
    assert node.made_by is not None
    if module is None:
        return Op(node.made_by, positional, keywords)
    is_attention = any(write.module == node.made_by for write in trace.cache_writes)
    forwards = type(module).forward, type(trace.layer).forward
    extras = is_attention and all(
        any(one.kind is one.VAR_KEYWORD for one in parameters_of(forward).values())
        for forward in forwards
    )
    return Op(node.made_by, positional, keywords, node.output, is_attention, extras)


def _from_outside(trace: LayerTrace, node: Node, name: str, given: object) -> Slot:
    """Where an argument `name` of a child's call comes from that is no hidden state."""
    declared = parameters_of(type(trace.layer).forward).items()
    defaults = {
        name: None if one.default is one.empty else one.default
        for name, one in declared
    }
    held = defaults | trace.arguments
    if name in held:
        own = held[name]
        is_equal = type(given) is type(own) and isinstance(given, CONSTANTS)
        if given is own or (is_equal and given == own):
            return Argument(name, defaults.get(name))
    if isinstance(given, CONSTANTS):
        return given
    for other, value in trace.arguments.items():
        if value is given:
            return Argument(other, defaults.get(other))
    found = f"{node} is given {name or 'a tensor'} that the layer itself computes"
    raise _unsupported(trace, found, "the layer's own arguments")


def _unsupported(trace: LayerTrace, found: str, expected: str) -> UnsupportedModel:
    fix = "choose another model, or describe the layer in an issue"
    return UnsupportedModel(
        f"{trace}: {found}; expected {expected}. notall leaves this model alone: {fix}."
    )
