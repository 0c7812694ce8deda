"""What people ask a model: varied prompts without a data set, to have it write its own answers to.

Of each list, of prompts.json too, words at even places make prompts to fit to, those at odd places prompts to judge by.
"""

import json
import random
from collections.abc import Callable, Sequence
from importlib.resources import files

_LISTS: dict[str, list[str]] = json.loads(files("notall.models").joinpath("prompts.json").read_text(encoding="utf-8"))
NAMES = ("topics", "functions", "sentences", "requests", "openings")
TOPICS, FUNCTIONS, SENTENCES, REQUESTS, OPENINGS = (_LISTS[name] for name in NAMES)
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch")
PEOPLE = ("Anna", "Bruno", "Chloe", "David", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Lena")
GOODS = ("pencils", "apples", "tickets", "books", "eggs", "stamps", "bottles", "chairs", "melons", "shirts")
CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Prague", "Quito", "Hanoi", "Tunis", "Perth", "Bergen", "Turin")
THINGS = ("a running shoe", "a coffee machine", "a city bike", "a reading lamp", "a backpack", "a language course",
          "a raincoat", "a garden hose")  # fmt: skip

Pick = Callable[[Sequence[str]], str]


def prompts(count: int, *, seed: int = 0, held_out: bool = False) -> list[str]:
    """`count` prompts for explanations, code, sums, JSON, translations and letters, by seed; others if `held_out`."""
    draw = random.Random(f"{seed} {held_out}")

    def pick(words: Sequence[str]) -> str:
        return draw.choice(words[held_out::2])

    kinds: list[Callable[[Pick, random.Random], str]] = [_explain, _program, _sum, _as_json, _translate, _price, _write]
    return [kinds[number % len(kinds)](pick, draw) for number in range(count)]


def openings(count: int) -> list[str]:
    """First words of `count` texts of many kinds."""
    return [OPENINGS[number % len(OPENINGS)] for number in range(count)]


def _explain(pick: Pick, draw: random.Random) -> str:
    way = draw.choice(("Explain {} to a twelve-year-old.", "What is the main idea of {}? Answer in three sentences.",
                       "Give a short summary of {} with an example.", "List five facts about {}."))  # fmt: skip
    return str(way.format(pick(TOPICS)))


def _program(pick: Pick, draw: random.Random) -> str:
    language = draw.choice(("Python", "Python", "JavaScript"))
    return f"Write a {language} function that {pick(FUNCTIONS)}."


def _sum(pick: Pick, draw: random.Random) -> str:
    person, goods = pick(PEOPLE), pick(GOODS)
    first, second, third = draw.randint(3, 40), draw.randint(2, 12), draw.randint(2, 9)
    return draw.choice((
        f"{person} has {first} {goods} and buys {second} boxes with {third} {goods} each. How many {goods} does "
        f"{person} have now? Think step by step.",
        f"{person} shares {first * third} {goods} among {third} friends and keeps {second} more that were left in a "
        f"drawer. How many {goods} does each friend get, and how many does {person} keep? Think step by step.",
        f"A box of {goods} costs {third} dollars. {person} buys {second} boxes and pays with a note of "
        f"{third * second + first} dollars. How much change is due? Think step by step.",
    ))  # fmt: skip


def _as_json(pick: Pick, draw: random.Random) -> str:
    return (
        f"Answer with JSON only, with the fields name, city, age and item: {pick(PEOPLE)}, who is "
        f"{draw.randint(19, 80)} and lives in {pick(CITIES)}, has ordered {pick(THINGS)}."
    )


def _translate(pick: Pick, draw: random.Random) -> str:
    return f"Translate into {draw.choice(LANGUAGES)}: {pick(SENTENCES)}"


def _price(pick: Pick, draw: random.Random) -> str:
    return f"Calculate {draw.randint(11, 99)} * {draw.randint(3, 9)} + {draw.randint(11, 99)} and explain each step."


def _write(pick: Pick, draw: random.Random) -> str:
    if draw.random() < 0.5:
        return f"Write a polite email {pick(REQUESTS)}."
    return f"Write three sentences that advertise {pick(THINGS)} to people in {pick(CITIES)}."
