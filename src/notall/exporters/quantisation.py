"""The quantisation settings of a checkpoint that loses layers: the modules that they name are renumbered.

Settings name modules by themselves (`model.layers.1.mlp`) or by patterns (`re:.*layers\\.[01]\\..*`). Each pattern is
written so that it means, of what is kept, exactly what it meant in the dense model: as it is, else renumbered, else as
the list of what it named. What is written is compared, module by module, before it is trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..models.quantisation import quantisation_name

Moved = dict[str, str | None]  # names of modules in the dense model, to those in the export, if they are kept
TENSOR_NAMES = "tensor_names"  # under which torchao notes the list of them


@dataclass(frozen=True)
class Words:
    """How settings name modules: whether a pattern means a name, and the pattern that means just that name.

    `exactly` is given the pattern that it replaces, too. With `weights`, a module's weight may be named instead.
    """

    means: Callable[[str, str], bool]
    exactly: Callable[[str, str], str]
    weights: bool = False


# --- how each kind of settings names modules --------------------------------------------------------------------------


def _begins_or_ends(pattern: str, name: str) -> bool:
    """As transformers' `should_convert_module`: from the start to a full stop, or at the end."""
    return _matches(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(pattern)


def _is_or_matches(pattern: str, name: str) -> bool:
    return _matches(pattern.removeprefix("re:"), name) if pattern.startswith("re:") else pattern == name


def _is_or_matches_whole(pattern: str, name: str) -> bool:
    return _matches(f"(?:{pattern[3:]})$", name) if pattern.startswith("re:") else pattern == name


def _matches_signed(pattern: str, name: str) -> bool:
    return _matches(_unsigned(pattern), name)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def _unsigned(pattern: str) -> str:
    """GPTQ's dynamic rules begin with `-:` where they leave modules out, and may begin with `+:`."""
    return pattern[2:] if pattern[:2] in ("-:", "+:") else pattern


def _itself(pattern: str, name: str) -> str:
    return name


def _escaped(pattern: str, name: str) -> str:
    return f"{pattern.removesuffix(_unsigned(pattern))}{re.escape(name)}$"


BEGINNINGS = Words(_begins_or_ends, _itself)
NAMES = Words(_is_or_matches, _itself)
WHOLE_NAMES = Words(_is_or_matches_whole, _itself, weights=True)
SIGNED = Words(_matches_signed, _escaped)

Rules = Mapping[tuple[str, ...], Words]  # where settings name modules, `*` being any key, and how

_LISTS: Rules = {(name,): BEGINNINGS for name in ("modules_to_not_convert", "modules_to_convert", "ignored_layers")}
_TRANSFORMS = ("transform_config", "config_groups", "*", "apply", "*")

RULES: Mapping[str, Rules] = {
    "awq": _LISTS,
    "bitsandbytes": {("llm_int8_skip_modules",): BEGINNINGS},
    "compressed-tensors": {
        ("ignore",): NAMES,
        ("config_groups", "*", "targets"): NAMES,
        ("sparsity_config", "ignore"): NAMES,
        ("sparsity_config", "targets"): NAMES,
        (*_TRANSFORMS, "targets"): NAMES,
        (*_TRANSFORMS, "ignore"): NAMES,
    },
    "fbgemm_fp8": _LISTS,
    "fp8": _LISTS,
    "gptq": {("dynamic",): SIGNED},
    "mxfp4": _LISTS,
    "mxfp8": _LISTS,
    "quanto": _LISTS,
    "torchao": {
        **_LISTS,
        ("quant_type", "default", "_data", "fqn_to_config"): WHOLE_NAMES,
        ("quant_type", "default", "_data", "module_fqn_to_config"): WHOLE_NAMES,
    },
}


# --- cutting ----------------------------------------------------------------------------------------------------------


def cut_quantisation(told: Mapping[str, Any], moved: Moved, layers: str) -> dict[str, Any]:
    """The settings of an export whose modules have `moved`; `layers` is what the names of layers begin with.

    Raises `UsageError` where they tell layers apart in a place that is not known.
    """
    rules = RULES.get(quantisation_name(told).split()[0], {})
    for path, value in _leaves(told):
        if not any(_is_below(path, rule) for rule in rules) and _tells_a_layer(value, layers):
            raise UsageError(
                f"the quantisation settings of this model ({quantisation_name(told)}) tell layers apart in "
                f"{'.'.join(path)}, which notall cannot cut, so this plan runs in memory only"
            )
    cut: Any = told
    for rule, words in rules.items():
        cut = _cut_at(cut, rule, words, moved | _weights(moved) if words.weights else moved)
    return dict(cut)


def renamed_notes(notes: Mapping[str, str], moved: Moved) -> dict[str, str]:
    """What torchao notes of tensors in the headers of their files, under their new names."""
    parameters = {name: _renamed(name, moved) for name in notes if name != TENSOR_NAMES}
    renamed = {new: notes[name] for name, new in parameters.items() if new}
    if TENSOR_NAMES in notes:
        listed = [new for name in json.loads(notes[TENSOR_NAMES]) if (new := _renamed(name, moved))]
        renamed[TENSOR_NAMES] = json.dumps(listed)
    return renamed


def _renamed(parameter: str, moved: Moved) -> str | None:
    module, _, name = parameter.rpartition(".")
    new = moved.get(module)
    return new and f"{new}.{name}"


def _weights(moved: Moved) -> dict[str, str | None]:
    return {f"{name}.weight": new and f"{new}.weight" for name, new in moved.items()}


def _cut_at(value: Any, path: tuple[str, ...], words: Words, moved: Moved) -> Any:
    """`value` with the patterns at `path` below it cut; a group all of whose targets are gone goes, too."""
    if not path:
        return _cut_patterns(value, words, moved)
    head, *rest = path
    if head == "*" and isinstance(value, list):
        return [_cut_at(entry, tuple(rest), words, moved) for entry in value]
    if not isinstance(value, Mapping):
        return value
    cut = {
        key: _cut_at(entry, tuple(rest), words, moved) if head in (key, "*") else entry for key, entry in value.items()
    }
    if head == "*" and rest == ["targets"]:
        return {key: entry for key, entry in cut.items() if entry["targets"] or not value[key]["targets"]}
    return cut


def _cut_patterns(value: Any, words: Words, moved: Moved) -> Any:
    """A list of patterns, or a table of what holds for each."""
    if isinstance(value, list):
        return list(dict.fromkeys(new for pattern in value for new in _cut(pattern, words, moved)))
    if isinstance(value, Mapping):
        cut: dict[str, Any] = {}
        for pattern, setting in value.items():
            for new in _cut(pattern, words, moved):
                cut.setdefault(new, setting)
        return cut
    return value


def _cut(pattern: str, words: Words, moved: Moved) -> list[str]:
    """The patterns that mean, of what is kept, what `pattern` meant in the dense model; none where that is gone."""
    meant = {new for name, new in moved.items() if words.means(pattern, name)}
    wanted = {new for new in meant if new is not None}
    if meant and not wanted:
        return []
    renumbered = moved.get(pattern)
    named = _named(pattern, wanted, words)
    for candidate in ([pattern], [renumbered] if renumbered else [], named):
        if candidate and _mean(candidate, words, moved) == wanted:
            return candidate
    raise UsageError(
        f"the quantisation settings of this model name modules by {pattern!r}, which notall cannot renumber, so this "
        "plan runs in memory only"
    )


def _named(pattern: str, wanted: Iterable[str], words: Words) -> list[str]:
    """Each of `wanted` by its own name, but for those that another one's name means as well."""
    named: list[str] = []
    for name in sorted(wanted, key=_in_order):
        if not any(words.means(other, name) for other in named):
            named.append(words.exactly(pattern, name))
    return named


def _mean(patterns: Iterable[str], words: Words, moved: Moved) -> set[str]:
    return {new for new in moved.values() if new and any(words.means(pattern, new) for pattern in patterns)}


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of nested settings, keys too, and where they stand."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield (*path, str(key)), str(key)
            yield from _leaves(entry, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry, (*path, "*"))
    elif isinstance(value, str):
        yield path, value


def _is_below(path: tuple[str, ...], rule: tuple[str, ...]) -> bool:
    return len(path) >= len(rule) and all(wanted in ("*", step) for wanted, step in zip(rule, path))


def _tells_a_layer(text: str, layers: str) -> bool:
    """Whether a number follows the name of the list of layers, perhaps inside a pattern."""
    last = layers.rstrip(".").rpartition(".")[2]
    return re.search(rf"\b{re.escape(last)}\W*\d", text) is not None
