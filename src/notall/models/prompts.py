"""What people ask a model: varied prompts without a data set, to have it write its own
answers to.

Of each list, of prompts.json too, words at even places make prompts to fit to, those at
odd places prompts to judge by.
"""

import json
import random
from collections.abc import Callable, Sequence
from importlib.resources import files

WORDS: dict[str, list[str]] = json.loads(
    files("notall.models").joinpath("prompts.json").read_text(encoding="utf-8")
)
WORD_LISTS = (
    "topics",
    "functions",
    "sentences",
    "requests",
    "openings",
    "explanations",
    "sums",
)
TOPICS, FUNCTIONS, SENTENCES, REQUESTS, OPENINGS, EXPLANATIONS, SUMS = (
    WORDS[name] for name in WORD_LISTS
)
LANGUAGES, PEOPLE, GOODS, CITIES, THINGS = (
    WORDS[n] for n in ("languages", "people", "goods", "cities", "things")
)


def prompts(count: int, *, seed: int = 0, held_out: bool = False) -> list[str]:
    """`count` prompts for explanations, code, sums, JSON, translations and letters, by
    seed; others if `held_out`.
    """
    draw = random.Random(f"{seed} {held_out}")

    def pick(words: Sequence[str]) -> str:
        return draw.choice(words[held_out::2])

    def add_up() -> str:
        person, goods = pick(PEOPLE), pick(GOODS)
        one, two, more = draw.randint(3, 40), draw.randint(2, 12), draw.randint(2, 9)
        numbers = {
            "first": one,
            "second": two,
            "third": more,
            "shared": one * more,
            "note": more * two + one,
        }
        return draw.choice(SUMS).format(person=person, goods=goods, **numbers)

    kinds: Sequence[Callable[[], str]] = (
        lambda: draw.choice(EXPLANATIONS).format(pick(TOPICS)),
        lambda: (
            f"Write a {draw.choice(('Python', 'Python', 'JavaScript'))} function that"
            f" {pick(FUNCTIONS)}."
        ),
        add_up,
        lambda: (
            "Answer with JSON only, with the fields name, city, age and item:"
            f" {pick(PEOPLE)}, who is {draw.randint(19, 80)} and lives in"
            f" {pick(CITIES)}, has ordered {pick(THINGS)}."
        ),
        lambda: f"Translate into {draw.choice(LANGUAGES)}: {pick(SENTENCES)}",
        lambda: (
            f"Calculate {draw.randint(11, 99)} * {draw.randint(3, 9)} +"
            f" {draw.randint(11, 99)} and explain each step."
        ),
        lambda: (
            f"Write a polite email {pick(REQUESTS)}."
            if draw.random() < 0.5
            else (
                f"Write three sentences that advertise {pick(THINGS)} to people in"
                f" {pick(CITIES)}."
            )
        ),
    )
    return [kinds[number % len(kinds)]() for number in range(count)]


def openings(count: int) -> list[str]:
    """First words of `count` texts of many kinds."""
    return [OPENINGS[number % len(OPENINGS)] for number in range(count)]
