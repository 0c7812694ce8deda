"""What a model is made of: blocks, and the sublayers that add to its residual stream."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..records.fingerprint import Fingerprint
from ..records.plan import Plan
from .observation import Branch


@dataclass(frozen=True)
class Sublayer:
    """A mixer, which looks at other tokens, or an MLP, which doesn't, with the norms and multipliers of its own.

    A mixer is called attention, whatever it is: `mixer` tells, as transformers names it (full_attention,
    linear_attention, conv), and is None for an MLP. `parameters` counts elements, `weight_bytes` bytes as loaded,
    `kv_bytes_per_token` what one token leaves in the cache, `state_bytes` what it keeps there of fixed size for one
    sequence. A norm that both sublayers of a parallel block share is counted with the attention.
    """

    kind: Literal["attention", "mlp"]
    index: int
    branches: tuple[Branch, ...]
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes: int = 0
    mixer: str | None = None

    @property
    def name(self) -> str:
        return f"{'attn' if self.kind == 'attention' else 'mlp'}.{self.index}"

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of its modules, below the layer."""
        return tuple(dict.fromkeys(name for branch in self.branches for name in branch.modules))


@dataclass(frozen=True)
class Block:
    """One decoder layer: its sublayers, one or two, in the order they run; both read the same input when `parallel`."""

    index: int
    sublayers: tuple[Sublayer, ...]
    parallel: bool
    # None: the layer answers a tensor. Otherwise (hidden, ...), and for each further element, which element of the
    # attention's answer it is (None where it is not the attention's).
    answer: tuple[int | None, ...] | None

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sublayer.kind for sublayer in self.sublayers)

    @property
    def attention(self) -> Sublayer:
        """Its mixer. Raises `StopIteration` where it has none."""
        return next(sublayer for sublayer in self.sublayers if sublayer.kind == "attention")

    @property
    def mlp(self) -> Sublayer:
        """Raises `StopIteration` where it has none."""
        return next(sublayer for sublayer in self.sublayers if sublayer.kind == "mlp")


@dataclass(frozen=True)
class Anatomy:
    """Where the sublayers of one model are. `layers` is the path of its decoder layers, such as `model.layers`."""

    model_type: str
    layers: str
    blocks: tuple[Block, ...]
    fingerprint: str  # see `Fingerprint`
    lacking: Plan = field(default_factory=Plan)  # what layers have room for and a checkpoint lacks

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(sublayer for block in self.blocks for sublayer in block.sublayers)

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """For each block, the kinds of its sublayers."""
        return tuple(block.kinds for block in self.blocks)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The kinds of its mixers, each once, in the order of the layers."""
        return tuple(dict.fromkeys(part.mixer for part in self.sublayers if part.mixer))

    @property
    def by_halves(self) -> bool:
        """Whether there are layers of two sublayers. Else a layer stays or goes, and every plan leaves whole layers."""
        return any(len(block.sublayers) == 2 for block in self.blocks)

    @cached_property
    def counting(self) -> frozenset[int]:
        """The layers of which one must keep its mixer: those with keys and values, by which a cache counts tokens.

        Where none does, all that have a mixer.
        """
        mixers = [part for part in self.sublayers if part.kind == "attention"]
        return frozenset(part.index for part in mixers if part.kv_bytes_per_token) or frozenset(m.index for m in mixers)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the text decoder: the model's own, or the text part of a vision-language model's."""
    return model.config.get_text_config(decoder=True)


def fingerprint(config: PretrainedConfig) -> Fingerprint:
    """The shape of the model that a config describes."""
    facts = config.to_dict()
    names = ("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, *(facts.get(name) for name in names)]
    digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:8]
    return Fingerprint(config.model_type, config.num_hidden_layers, config.hidden_size, digest)


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache among the arguments of the model's forward: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
