"""The documents are written in the field's words: those that the table of
CONTRIBUTING.md lists are not used.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_transformers  # it reads pages
ROOT = Path(__file__).parent.parent
GENERATED = {"architectures.md", "engines.md"}  # they quote what the product refuses
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED
]
LIST = re.compile(
    r"^## Words\n.*?(?=^## |\Z)", re.M | re.S
)  # the table itself names them
START = r"(?:^|[.:!?] )"  # of a sentence, in a paragraph of one line
UNITS = "token|byte|window|round|layer|second|sequence|file|function|field|command|target|gap|plan|evaluation"
UNWANTED = {
    "a token (of a rate)": (
        rf"\b(?:nats|bits|bytes|ms|seconds?|times|one|once|computed) an? (?:{UNITS})\b"
    ),
    "beside": r"\bbeside\b",
    "bits a byte": r"\bbits a byte\b",
    "come to": r"\b(?:comes?|came) to\b",
    "dense model": r"\bdense (?:models?|ones?|checkpoints?)\b",
    "first choices": r"\bfirst choices?\b",
    "give back": r"\bg(?:ives?|iven|ave|iving) back\b",
    "go by": r"\b(?:goes|go|going|went|gone) by\b",
    "leave out": r"\b(?:leav(?:es?|ing)|left)(?: [\w-]+){0,2} out\b",
    "make up for": r"\bma(?:kes?|de|king) up for\b",
    "prove": r"\bprov(?:e|es|ed|en|ing)\b",
    "told": r"\b(?:told|tells?)\b",
    "twin": r"\btwins?\b",
    "what is kept": (
        r"\bwhat (?:is|was) (?:kept|skipped|left|lost|measured|asked|removed|written)\b"
    ),
    "What ... (no question)": rf"{START}What [^.?!]*[.!]",
    "Of the ...": rf"{START}Of (?:an?|the|those|these|each|all)\b",
    "within error": r"\bwithin (?:the |its |their )?errors?\b",
}


def prose(markdown: str) -> list[str]:
    """Its paragraphs and cells, a line each: no code, no comments, no addresses."""
    shown = re.sub(r"^```.*?^```$|<!--.*?-->", "", markdown, flags=re.M | re.S)
    shown = re.sub(r"`[^`\n]+`", "CODE", shown)
    shown = re.sub(r"\]\([^)]*\)", "]", shown)
    parts = re.split(r"\n\s*\n|\n(?=[-#|])|\|", shown)
    return [re.sub(r"^[-#*\s\d.]+", "", " ".join(part.split())) for part in parts]


def unwanted(markdown: str) -> list[str]:
    return [
        f"{word}: {line}"
        for line in prose(markdown)
        for word, pattern in UNWANTED.items()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_the_words_of_the_field(page):
    assert unwanted(LIST.sub("", page.read_text(encoding="utf-8"))) == []


REFERENCE = {"CONTRIBUTING.md", "architectures.md", "commands.md", "engines.md"}
MOST_WORDS = 1500


def words_of(markdown: str) -> int:
    """How many words a reader sees: no code, no comments."""
    shown = re.sub(r"^```.*?^```|<!--.*?-->", "", markdown, flags=re.M | re.S)
    return sum(re.search(r"\w", word) is not None for word in shown.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_read_in_one_sitting(page):
    if page.name not in REFERENCE:
        assert words_of(page.read_text(encoding="utf-8")) <= MOST_WORDS


def test_words_are_those_of_the_text():
    assert words_of("One two | three |\n```sh\nnotall\n```\n<!-- a b -->four\n") == 4


def test_contributing_lists_the_unwanted_words():
    (table,) = LIST.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", table, re.M)[2:] == [*UNWANTED]


@pytest.mark.parametrize(
    ("planted", "word"),
    [
        ("It loses 0.2 nats a token.", "a token (of a rate)"),
        ("The engine runs beside it.", "beside"),
        ("It loses two\nbits a byte.", "bits a byte"),
        ("The sum comes to two.", "come to"),
        ("The dense model is read.", "dense model"),
        ("Half of its first choices stay.", "first choices"),
        ("A repair gives back half.", "give back"),
        ("The search goes by KL.", "go by"),
        ("It leaves sublayers out.", "leave out"),
        ("- It makes up for the gap.", "make up for"),
        ("| a layer | it is proved |", "prove"),
        ("The table tells all.", "told"),
        ("It has a slow twin.", "twin"),
        ("It repairs what is kept.", "what is kept"),
        ("It runs. What it writes is small.", "What ... (no question)"),
        ("Of the plans, one is fast.", "Of the ..."),
        ("Both are within the errors.", "within error"),
    ],
)
def test_a_planted_sentence_is_seen(planted, word):
    assert word in [
        found.split(": ")[0] for found in unwanted(f"A page.\n\n{planted}\n")
    ]


@pytest.mark.parametrize(
    "fine",
    [
        "## What breaks",
        "What breaks? It does.",
        "`what is kept`",
        "<!-- by the dense one -->",
        "[a](told.md)",
    ],
)
def test_code_comments_and_questions_are_let_be(fine):
    assert unwanted(fine) == []


COUNTED = (
    "windows|rounds|documents|prompts|sequences|plans|choices|records|steps|items|layers|blocks|examples|questions|requests|texts|tasks|workers|cores|sublayers|sets|tensors|benchmarks|evaluations|scores|prompt"
    " tokens|new tokens|new ones"
)
BY_HAND = re.compile(
    rf"\{{[^{{}}]*\}}+ (?:{COUNTED})\b"
)  # a number, and a plural whatever the number
ALWAYS_MORE = {  # or none, or a word
    "{num_fewshot} examples",
    "{shortened(new)} new tokens",
    "{limit} training questions",
    "{plans} plans",
    "{decoding} texts",
    "{telling} layers",
    "{period} blocks",
    "{} layers",
    "{LEAST_DOCUMENTS} documents",
    "{LEAST_LAYERS} layers",
    "{LEAST_WINDOWS} windows",
    "{self.kind} sublayers",
    "{folder} holds records",
}


def test_a_plural_is_written_by_the_number():
    """`1 rounds` comes of a plural that is written by hand: `several` knows the
    number.
    """
    package = ROOT / "src" / "notall"
    found = [
        one
        for path in sorted(package.rglob("*.py"))
        for one in BY_HAND.findall(path.read_text(encoding="utf-8"))
    ]
    assert sorted(set(found) - ALWAYS_MORE) == []
    assert BY_HAND.findall('f"on {windows} windows"') == ["{windows} windows"]


NOT_NAMES = {"told", "said", "beside", "lacks", "lacking", "sign"}
IN_FIELDS_WORDS = ("choosing", "repairing", "exporters", "engines", "results")


def names_in(source: str) -> set[str]:
    """What code calls its variables, parameters, attributes, functions and classes."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    defined = (ast.FunctionDef, ast.ClassDef)
    return names | {node.name for node in nodes if isinstance(node, defined)}


@pytest.mark.parametrize("package", IN_FIELDS_WORDS)
def test_code_has_the_words_of_the_field_too(package):
    for file in (ROOT / "src" / "notall" / package).rglob("*.py"):
        assert not names_in(file.read_text(encoding="utf-8")) & NOT_NAMES, file
