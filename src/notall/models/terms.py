"""The licence and the language of a model, as its card or its GGUF file states them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..strict_json import Settings

logger = logging.getLogger(__name__)

# Of a model's card, and as a GGUF file names them.
TERMS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}


def terms_in(card: Path | None) -> Settings:
    """What a model's card states: words, or lists of words. A damaged card states
    nothing, with a warning.
    """
    from huggingface_hub import metadata_load

    if card is None:
        return {}
    try:
        return _terms(metadata_load(card) or {})
    except Exception:  # whatever YAML makes of it
        logger.warning(
            "%s of the original model is damaged: look its licence up, and add it",
            card.name,
        )
        return {}


def terms_in_gguf(values: Mapping[str, Any]) -> Settings:
    """As `terms_in`, of the values of a GGUF file's header by their names."""
    return _terms({name: values.get(field) for name, field in TERMS.items()})


def write_terms(card: Path, terms: Settings) -> None:
    """Write a model's card that states `terms` alone, and none where there are none."""
    from huggingface_hub import metadata_save

    if terms:
        metadata_save(card, terms)


def _terms(stated: Mapping[str, Any]) -> Settings:
    found = {name: stated.get(name) for name in TERMS}
    lists = {
        name: value if isinstance(value, list) else [value]
        for name, value in found.items()
    }
    return {
        name: found[name]
        for name, words in lists.items()
        if words and all(isinstance(word, str) for word in words)
    }
