"""What a plan reads of a model's structure, to see whether it fits: `ModelStructure`
of `notall.structure`, which is made of these properties and more, has all of it.
"""

from collections.abc import Sequence, Sized
from typing import Protocol

from .words import Kind


class SublayerShape(Protocol):
    """What a plan reads of a `Sublayer`; see there."""

    @property
    def kind(self) -> Kind:
        """Attention, which any mixer counts as, or MLP."""

    @property
    def index(self) -> int:
        """Of its layer, from 0."""

    @property
    def name(self) -> str:
        """Such as attn.3 or mlp.3."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of its modules, below its layer."""

    @property
    def mixer(self) -> str | None:
        """The kind of a mixer, as transformers names it; None for an MLP."""

    @property
    def read_by(self) -> tuple[str, ...]:
        """The names of sublayers that read what it makes."""

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token leaves in the cache."""

    @property
    def state_bytes(self) -> int:
        """What one sequence leaves there that is of fixed size."""


class ModelShape(Protocol):
    """What a plan reads of a `ModelStructure`; see there."""

    @property
    def model_type(self) -> str:
        """As transformers names it, such as llama."""

    @property
    def layers(self) -> str:
        """The path of its layers, such as model.layers."""

    @property
    def fingerprint(self) -> str:
        """As text; see `Fingerprint`."""

    @property
    def blocks(self) -> Sized:
        """Its layers."""

    @property
    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """For each layer, the kinds of its sublayers."""

    @property
    def sublayers(self) -> Sequence[SublayerShape]:
        """Of all layers, in the order they run."""

    @property
    def counting(self) -> frozenset[int]:
        """The layers of which one must keep its attention, which counts tokens."""

    @property
    def in_place(self) -> bool:
        """Whether layers stay where they are, with stubs for what is skipped."""

    @property
    def stubbed(self) -> bool:
        """Whether there are sublayers that run only inside of their layers."""
