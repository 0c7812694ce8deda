"""What a model is made of: blocks, and the sublayers that add to its residual
stream.
"""

import inspect
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..digests import digest_of_json
from ..errors import UsageError
from ..plan import Fingerprint, Kind, Plan, in_ranges, several
from .branches import Branch
from .in_place import Stub


@dataclass(frozen=True)
class Sublayer:
    """A mixer, which looks at other tokens, or an MLP, which doesn't, with the norms
    and multipliers of its own.

    A mixer is called attention, whatever it is: `mixer` tells, as transformers names it
    (full_attention, linear_attention, conv), or `layer` where a layer is one sublayer
    as a whole; it is None for an MLP. `parameters` counts elements, `weight_bytes`
    bytes as loaded, `kv_bytes_per_token` what one token leaves in the cache,
    `state_bytes` what it keeps there of fixed size for one sequence. A norm that both
    sublayers of a parallel block share is counted with the attention.

    In a layer that stays in place a sublayer has a `stub` instead of branches.
    `read_by` names the sublayers that read the keys and values, or whatever else, that
    it makes: while one of these runs, it runs as well, and when it is skipped it adds
    nothing. `branches` are the pieces of the layer that it is run by.
    """

    kind: Kind
    index: int
    branches: tuple[Branch, ...] = field(repr=False)
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes: int = 0
    mixer: str | None = None
    stub: Stub | None = None
    read_by: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Such as attn.3 or mlp.3."""
        return name_of(self.kind, self.index)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of its modules, below the layer; "" is the layer itself."""
        if self.stub:
            return self.stub.modules
        return tuple(
            dict.fromkeys(name for branch in self.branches for name in branch.modules)
        )


def name_of(kind: Kind, layer: int) -> str:
    """Such as attn.3 or mlp.3."""
    return f"{'attn' if kind == 'attention' else 'mlp'}.{layer}"


@dataclass(frozen=True)
class Block:
    """One decoder layer: its sublayers, one or two, in the order they run; both read
    the same input when `parallel`.

    In the end it multiplies its stream by `scale`, the value of its tensor `scaled_by`,
    as Gemma 4 does: that stays where a sublayer is left out. It is `bare` if it has no
    other modules, and no other layer reads from it. `answer` is None where its module
    returns a tensor; else it returns (hidden, ...), and `answer` says for each further
    element which one of the attention's answer it is, None where it is not the
    attention's.
    """

    index: int
    sublayers: tuple[Sublayer, ...]
    parallel: bool
    answer: tuple[int | None, ...] | None = field(repr=False)
    scaled_by: str | None = None
    scale: float = field(default=1.0, compare=False)
    bare: bool = True

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of its sublayers: attention, mlp."""
        return tuple(sublayer.kind for sublayer in self.sublayers)

    @property
    def attention(self) -> Sublayer:
        """Its mixer. Raises `StopIteration` where it has none."""
        return next(
            sublayer for sublayer in self.sublayers if sublayer.kind == "attention"
        )

    @property
    def mlp(self) -> Sublayer:
        """Raises `StopIteration` where it has none."""
        return next(sublayer for sublayer in self.sublayers if sublayer.kind == "mlp")


@dataclass(frozen=True, repr=False)
class ModelStructure:
    """Where the sublayers of one model are. `layers` is the path of its decoder layers,
    such as `model.layers`.

    `in_place`: layers stay where they are, and stubs stand in for what is skipped (see
    `structure/in_place.py`). `apart`: they can be run one at a time, each on the hidden
    states of the one before it, (batch, tokens, hidden). `missing` are sublayers that
    layers have room for and the checkpoint has none of.
    """

    model_type: str
    layers: str
    blocks: tuple[Block, ...]
    fingerprint: str  # see `Fingerprint`
    in_place: bool = False
    apart: bool = True
    missing: Plan = field(default_factory=Plan)

    def __repr__(self) -> str:
        """Some lines for people: layers of one form together, however many there
        are.
        """
        forms: dict[tuple[object, ...], list[Block]] = {}
        for block in self.blocks:
            form = (
                block.parallel,
                *(part.mixer or part.kind for part in block.sublayers),
            )
            forms.setdefault(form, []).append(block)
        lines = [
            f"{self.fingerprint}: {several(len(self.blocks), 'layer')} in"
            f" {self.layers}, {several(len(self.sublayers), 'sublayer')}"
        ]
        for blocks in forms.values():
            where = (
                f"layers {in_ranges(block.index for block in blocks)}"
                + ", in parallel" * blocks[0].parallel
            )
            lines += textwrap.wrap(
                where, 78, initial_indent="  ", subsequent_indent="    "
            )
            lines += map(_sizes, zip(*(block.sublayers for block in blocks)))
        return "\n".join(lines)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Of all blocks, in the order they run."""
        return tuple(sublayer for block in self.blocks for sublayer in block.sublayers)

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """For each block, the kinds of its sublayers."""
        return tuple(block.kinds for block in self.blocks)

    def scale(self, start: int, end: int) -> float:
        """The factor by which layers multiply the stream, from block `start` to before
        block `end`.
        """
        return math.prod(block.scale for block in self.blocks[start:end])

    @property
    def scaled(self) -> bool:
        """Whether there are layers that multiply their stream."""
        return any(block.scaled_by for block in self.blocks)

    @property
    def cuttable(self) -> bool:
        """Whether layers can be cut out of it, or made of the sublayers of others."""
        return not self.in_place or all(block.bare for block in self.blocks)

    def running(self, plan: Plan) -> frozenset[str]:
        """The names of what runs under `plan`: what it keeps, and what it skips and
        others that run read.
        """
        running = {
            p.name for p in self.sublayers if p.index not in getattr(plan, p.kind)
        }
        layers = {f"layer.{block.index}" for block in self.blocks}
        for part in reversed(self.sublayers):  # those that read it are in later layers
            if (running | layers).intersection(part.read_by):
                running.add(part.name)
        return frozenset(running)

    def is_unread(self, plan: Plan) -> bool:
        """Whether nothing reads what `plan` leaves out of the prompt alone: its answers
        are then exact.

        That is so behind the last mixer that it keeps: of what follows, only the last
        token's output goes on.
        """
        kept = (
            p.index
            for p in self.sublayers
            if p.kind == "attention" and p.index not in plan.attention
        )
        skipped = (*plan.prefill.attention, *plan.prefill.mlp)
        return bool(skipped) and min(skipped) >= max(kept)

    @property
    def stubbed(self) -> bool:
        """Whether there are sublayers that run only inside of their layers, or are
        whole ones.
        """
        return any(part.stub for part in self.sublayers)

    def refuse_stubs(self, what: str) -> None:
        """Raise `UsageError` where there are such: `what` looks inside of layers."""
        if self.stubbed:
            problem = (
                f"{what} runs sublayers one at a time; {self.model_type}'s run only in"
                " layers"
            )
            raise UsageError(f"{problem}: use the plan as it is")

    @property
    def mixers(self) -> tuple[str, ...]:
        """The kinds of its mixers, each once, in the order of the layers."""
        return tuple(dict.fromkeys(part.mixer for part in self.sublayers if part.mixer))

    @cached_property
    def _mixers_by_layer(self) -> list[tuple[str | None, ...]]:
        return [tuple(part.mixer for part in block.sublayers) for block in self.blocks]

    @cached_property
    def period(self) -> int:
        """The period of the pattern of mixers, in layers: 4 in Qwen3-Next; 0 where
        there is none.
        """
        kinds = self._mixers_by_layer
        return next(
            (
                length
                for length in range(1, len(kinds) // 2 + 1)
                if kinds[length:] == kinds[:-length]
            ),
            0,
        )

    def keeps_period(self, layers: Sequence[int]) -> bool:
        """Whether `layers` alone have mixers of the kinds that as many layers have in
        the original's beginning.
        """
        kinds = self._mixers_by_layer
        return [kinds[index] for index in layers] == kinds[: len(layers)]

    @property
    def by_halves(self) -> bool:
        """Whether some layer has two sublayers. If not, plans skip only whole
        layers.
        """
        return any(len(block.sublayers) == 2 for block in self.blocks)

    @cached_property
    def counting(self) -> frozenset[int]:
        """The layers of which one must keep its mixer: those with keys and values,
        which count tokens; else all.
        """
        mixers = [part for part in self.sublayers if part.kind == "attention"]
        return frozenset(
            part.index for part in mixers if part.kv_bytes_per_token
        ) or frozenset(m.index for m in mixers)


def _sizes(parts: Sequence[Sublayer]) -> str:
    """What sublayers of one form weigh, each."""
    units = ("parameters", "bytes of KV a token", "bytes of state")
    counts = zip(
        *(
            (part.parameters, part.kv_bytes_per_token, part.state_bytes)
            for part in parts
        )
    )
    problem = [
        f"{' to '.join(f'{n:,}' for n in sorted({min(c), max(c)}))} {unit}"
        for unit, c in zip(units, counts)
        if any(c)
    ]
    mixer = f" ({parts[0].mixer})" if parts[0].mixer else ""
    return f"    {parts[0].kind}{mixer}: {', '.join(problem)}"


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    found = inner() if inner else model
    return cast(PreTrainedModel, found)


def layer_modules(model: nn.Module, structure: ModelStructure) -> nn.ModuleList:
    """The layers of `model`, in the order in which they run."""
    return cast(nn.ModuleList, model.get_submodule(structure.layers))


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the text decoder: the model's own, or the text part of a
    vision-language model's.
    """
    return model.config.get_text_config(decoder=True)


def inputs_device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: from the CPU accelerate takes them to where it keeps an
    offloaded embedding.
    """
    embedding = model.get_input_embeddings()
    device = embedding.get_parameter("weight").device
    return torch.device("cpu") if device.type == "meta" else device


def positions_of(model: PreTrainedModel) -> float:
    """How many tokens the model reads at once; infinite where its config sets no
    limit.
    """
    return getattr(text_config(model), "max_position_embeddings", None) or math.inf


def fingerprint(config: PretrainedConfig) -> Fingerprint:
    """The shape of the model that a config describes."""
    facts = config.to_dict()
    names = (
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    shape = [
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        *(facts.get(name) for name in names),
    ]
    return Fingerprint(
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        digest_of_json(shape)[:8],
    )


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache among the arguments of the model's forward: transformers
    renamed it in 5.24.
    """
    return (
        "cache"
        if "cache" in inspect.signature(type(model).forward).parameters
        else "past_key_values"
    )
