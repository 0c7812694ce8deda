"""The type of a model that `load` returns, for type checkers: transformers' classes for it share no name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import GenerationMixin, PreTrainedModel

if TYPE_CHECKING:

    class CausalModel(PreTrainedModel, GenerationMixin):
        """A pretrained model that generates."""
else:
    CausalModel = PreTrainedModel
