"""The quantisation settings of a checkpoint that loses layers: each pattern of modules
is renumbered.

A pattern means, of what is kept, just what it meant in the original model: as it is,
renumbered, or as a list of names.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from typing import Any

from ..errors import UsageError, shortened
from ..models.quantisation import quantisation_name
from ..strict_json import Settings

Moved = dict[
    str, str | None
]  # names of modules in the original model, to those in the export, if they are kept
TENSOR_NAMES = "tensor_names"  # under which torchao notes the list of them


@dataclass(frozen=True)
class ModulePatterns:
    """How settings name modules: whether a pattern means a name."""

    means: Callable[[str, str], bool]
    exactly: Callable[[str, str], str] = lambda pattern, name: (
        name
    )  # what stands for one name in a pattern's place
    tree: bool = False  # it means all below a module as well
    weights: bool = False  # a module's weight may be named instead


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def _is_or_matches(pattern: str, name: str, end: str = "") -> bool:
    if not pattern.startswith("re:"):
        return pattern == name
    return _matches(f"(?:{pattern[3:]}){end}" if end else pattern[3:], name)


# As transformers' `should_convert_module`.
BEGINNINGS = ModulePatterns(
    lambda pattern, name: (
        _matches(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(pattern)
    ),
    tree=True,
)
PATTERNS = ModulePatterns(_is_or_matches)
WHOLE_NAMES = ModulePatterns(partial(_is_or_matches, end="$"), weights=True)
# GPTQ's dynamic rules begin with `-:` where they leave modules out, and may begin with
# `+:`.
SIGNED = ModulePatterns(
    lambda pattern, name: _matches(re.sub("^[-+]:", "", pattern), name),
    lambda pattern, name: "".join(
        [*re.findall("^[-+]:", pattern), re.escape(name), "$"]
    ),
)

# where settings name modules, `*` being any key, and how
Rules = Mapping[tuple[str, ...], ModulePatterns]

_LISTS: Rules = {
    (name,): BEGINNINGS
    for name in ("modules_to_not_convert", "modules_to_convert", "ignored_layers")
}
_TRANSFORMS = ("transform_config", "config_groups", "*", "apply", "*")

RULES: Mapping[str, Rules] = {
    **dict.fromkeys(("awq", "fbgemm_fp8", "fp8", "mxfp4", "mxfp8", "quanto"), _LISTS),
    "bitsandbytes": {("llm_int8_skip_modules",): BEGINNINGS},
    "compressed-tensors": {
        ("ignore",): PATTERNS,
        ("config_groups", "*", "targets"): PATTERNS,
        **{("sparsity_config", name): PATTERNS for name in ("ignore", "targets")},
        **{(*_TRANSFORMS, name): PATTERNS for name in ("targets", "ignore")},
    },
    "gptq": {("dynamic",): SIGNED},
    "torchao": {
        **_LISTS,
        **{
            ("quant_type", "default", "_data", name): WHOLE_NAMES
            for name in ("fqn_to_config", "module_fqn_to_config")
        },
    },
}


def cut_quantisation(settings: Settings, moved: Moved, layers: str) -> Settings:
    """Those of an export; the names of layers begin with `layers`. Raises `UsageError`
    where not all of them are known.
    """
    method = quantisation_name(settings)
    rules = RULES.get(method.split()[0], {})
    last = layers.rstrip(".").rpartition(".")[2]
    # a number behind the list of layers, perhaps in a pattern
    numbered = re.compile(rf"\b{re.escape(last)}\W*\d")
    weights = dict(moved)
    for name, new in moved.items():
        weights[f"{name}.weight"] = new and f"{new}.weight"

    def rule_of(path: tuple[str, ...]) -> ModulePatterns | None:
        for rule, words in rules.items():
            if len(rule) == len(path) and all(map(fnmatchcase, path, rule)):
                return words
        return None

    def cut(value: Any, *path: str) -> Any:
        """What stands at `path`; where a rule names that, its patterns are renumbered:
        entries of a list, or keys.
        """
        if words := rule_of(path):
            names = weights if words.weights else moved
            return _each(value, partial(_renumbered, words, names, layers))
        for word in (*path[-1:], value):
            if isinstance(word, str) and numbered.search(word):
                raise UsageError(
                    f"the quantisation settings of this model ({method}) tell layers"
                    f" apart in {'.'.join(path)}, which notall cannot cut, so this plan"
                    " runs in memory only"
                )
        if isinstance(value, list | tuple):
            return [cut(entry, *path, "*") for entry in value]
        if not isinstance(value, Mapping):
            return value
        table = {key: cut(held, *path, str(key)) for key, held in value.items()}
        if (*path, "*", "targets") not in rules:
            return table
        # a group that is left without any goes, too
        return {
            key: entry
            for key, entry in table.items()
            if entry == value[key] or entry["targets"]
        }

    return dict(cut(settings))


def _each(value: Any, renumbered: Callable[[str], list[str]]) -> Any:
    """The entries of a list, or the keys of a table, renumbered, each once."""
    if isinstance(value, list):
        patterns = [new for pattern in value for new in renumbered(str(pattern))]
        return list(dict.fromkeys(patterns))
    if not isinstance(value, Mapping):
        return value
    cut: Settings = {}
    for pattern, setting in value.items():
        for new in renumbered(pattern):
            cut.setdefault(new, setting)
    return cut


def renamed_notes(notes: Mapping[str, str], moved: Moved) -> dict[str, str]:
    """What torchao notes of tensors in the headers of files, under new names. Raises
    `UsageError` if damaged.
    """

    def renamed(parameter: str) -> str | None:
        module, _, name = parameter.rpartition(".")
        return f"{new}.{name}" if (new := moved.get(module)) else None

    found: dict[str, str] = {}
    for name, note in notes.items():
        if name != TENSOR_NAMES and (new := renamed(name)):
            found[new] = note
    if TENSOR_NAMES in notes:
        try:
            names = [str(name) for name in json.loads(notes[TENSOR_NAMES])]
        except (ValueError, TypeError):
            raise UsageError(
                "what torchao noted of this model's tensors is damaged; fetch the model"
                " again"
            ) from None
        kept = [new for name in names if (new := renamed(name))]
        found[TENSOR_NAMES] = json.dumps(kept)
    return found


def _renumbered(
    words: ModulePatterns, moved: Moved, layers: str, pattern: str
) -> list[str]:
    """The patterns that mean, of what is kept, what `pattern` meant in the original
    model; none where that is gone.
    """
    unknown = UsageError(
        f"the quantisation settings of this model name modules by {shortened(pattern)},"
        " which notall cannot renumber, so this plan runs in memory only"
    )
    meant = {new for name, new in moved.items() if words.means(pattern, name)}
    wanted = {new for new in meant if new is not None}
    if not meant and (beginning := re.match(rf"{re.escape(layers)}\d+\.", pattern)):
        # all of it goes to one place, and with it a name that only an engine has, say
        layer = beginning[0]
        starts = set[str | None]()
        for name, new in moved.items():
            if name.startswith(layer):
                below = name.removeprefix(layer)
                starts.add(new.removesuffix(below) if new else None)
        if len(starts) > 1:
            raise unknown
        return [start + pattern.removeprefix(layer) for start in starts if start]
    if meant and not wanted:
        return []

    def numbers(name: str) -> list[tuple[int, str]]:
        return [
            (int(part), "") if part.isdigit() else (-1, part)
            for part in name.split(".")
        ]

    tops = wanted
    if words.tree:  # of a.b.c, a and a.b are above
        tops = {
            name
            for name in wanted
            if wanted.isdisjoint(accumulate(name.split(".")[:-1], "{}.{}".format))
        }
    named = [words.exactly(pattern, name) for name in sorted(tops, key=numbers)]
    for tried in ([pattern], [moved.get(pattern) or pattern], named):
        found = {
            new
            for new in moved.values()
            if new and any(words.means(one, new) for one in tried)
        }
        if found == wanted:
            return tried
    if words.tree:
        raise unknown
    return named
