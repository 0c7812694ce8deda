"""One meaning a name: what stands at the top of two files of `notall` means one thing."""

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "notall"
VERBS = {
    "bench", "evaluate", "export", "heal", "repair", "reproduce", "similarity", "sweep",
}  # fmt: skip
# What a name means in each file that has it.
SHARED = {
    "ARCHITECTURES": "names in llama.cpp of the architectures that a form of file knows",
    "CANNOT": "the beginning of a message: what prefill-only skipping cannot do",
    "COLUMNS": "the columns of this file's table",
    "DELTA_NLL": "the column of the rise of NLL",
    "DTYPES": "names of dtypes",
    "FIX": "the end of this file's messages: what to do",
    "Floats": "an array of float64",
    "GROUP": "the group of this file's entry points",
    "HOW_TO_READ": "the note of this file's figure",
    "HOW_TO_RUN": "how a checkpoint of this form runs, for its card",
    "HOW_TO_RUN_PREFILL": "how a prefill-only checkpoint of this form runs",
    "MODEL_TYPES": "model types of transformers that a form of checkpoint knows",
    "MOST_BYTES": "how large what this file reads may be",
    "MULTIPLE": "what widths of nemotron-nas are rounded up to",
    "NOTE": "the note of this file's table",
    "PROJECTION": "the paths of projections",
    "REDONE": "the end of a message: export it anew",
    "RIDGES": "the ridges that are tried",
    "ROUNDING": "what a dtype rounds by",
    "TINY": "a number above 0 to divide by",
    "TOKENS": "tokens of the sequences that an export is compared on",
    "TOKENS_AT_ONCE": "tokens of a batch",
    "Values": "an array of a tensor's values",
    "answers": "the original model's own answers, as a task and as an objective",
    "conclusion": "what this file's records come to, in a sentence",
    "logger": "this file's logger",
    "main": "where a program begins",
    "page_parts": "what records of this kind add to a page",
    "retrieval": "what is found far back in a text, as a task and as an objective",
    "register": "have an engine know the regrouped forms",
}
TYPE_VARIABLES = {"F", "G", "Item", "P", "R", "T"}


def named_by(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        targets: list[ast.expr] = [node.target]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def files_by_name() -> dict[str, set[str]]:
    found = defaultdict(set)
    for file in SOURCE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            for name in named_by(node):
                found[name].add(str(file.relative_to(SOURCE)))
    return found


def test_a_name_in_two_files_means_one_thing():
    """Private names are a file's own; a verb is a command, and a function of the same
    name that it calls.
    """
    shared = {
        name: files
        for name, files in files_by_name().items()
        if len(files) > 1 and not name.startswith("_")
    }
    known = SHARED.keys() | VERBS | TYPE_VARIABLES
    assert {name: files for name, files in shared.items() if name not in known} == {}
    assert known - shared.keys() == set(), "no longer in two files"
