"""JSON as its grammar has it, where Python's reader takes more."""

import json
import math
from collections import Counter
from typing import Any

from pydantic_core import from_json

Settings = dict[str, Any]  # a table of JSON, such as a config.json


class DoubledKey(ValueError):
    """An object has a key twice; the message is that key, in quotes."""


def read_json(text: str | bytes) -> Any:
    """The value of a UTF-8 text, without NaN, which Python's reader takes, and the last
    value of a doubled key.

    Raises `DoubledKey`, and `ValueError` for what is no JSON, has numbers too large, or
    is nested too deep.
    """
    from_json(
        text, allow_inf_nan=False
    )  # it knows how deep it is, where Python's reader overflows its stack
    return json.loads(text, object_pairs_hook=_each_key_once, parse_float=_finite)


def _each_key_once(pairs: list[tuple[str, Any]]) -> Settings:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise DoubledKey(f'"{key}"')
    return fields


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond any number")
    return number
