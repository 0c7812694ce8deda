"""Texts in which a needle stands far back and is asked for at the end, in several forms,
for any tokenizer.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .prompts import CITIES, GOODS, PEOPLE, WORDS

RetrievalForm = Literal[
    "passkey", "keys", "quotes", "several", "facts", "stock", "copying"
]
FITTED: tuple[RetrievalForm, ...] = (
    "passkey",
    "keys",
    "quotes",
    "several",
)  # that episodes to fit to have
UNSEEN: tuple[RetrievalForm, ...] = ("facts", "stock", "copying")  # that only judge
CONTEXTS = (256, 512, 1024)  # tokens, about, of a passkey's texts
WORDS_A_TOKEN = 0.75  # of English, about
WORKS, NOUNS, ADJECTIVES, VERBS = (
    WORDS[name] for name in ("works", "nouns", "adjectives", "verbs")
)


@dataclass(frozen=True)
class Episode:
    """A text that ends in a question, and what should come next.

    A number follows a quote or a comma: behind a space, often a token of its own, first
    choices would tell of layout.
    """

    text: str
    answer: str


def episode(
    form: RetrievalForm,
    tokens: int,
    draw: random.Random,
    hay: Iterator[str] | None = None,
) -> Episode:
    """An episode of about so many tokens, its answer at a random depth in `hay`
    (passkey: arXiv 2305.16300, 4.2).
    """
    needles, question, answer = FORM_MAKERS[form](draw)
    room = int(tokens * WORDS_A_TOKEN) - len(" ".join((*needles, question)).split())
    sentences = list[str]()
    while sum(map(len, map(str.split, sentences))) < room:
        sentences.append(next(hay) if hay else _sentence(draw))
    places = sorted(draw.randint(0, len(sentences)) for _ in needles)
    for shift, (place, needle) in enumerate(zip(places, needles)):
        sentences.insert(place + shift, f"\n\n{needle}\n\n")
    text = " ".join(sentences).replace(" \n\n", "\n\n").replace("\n\n ", "\n\n").strip()
    return Episode(f"{text}\n\n{question}", answer)


def _sentence(draw: random.Random) -> str:
    one, other = draw.sample(NOUNS, 2)
    return (
        f"The {draw.choice(ADJECTIVES)} {one} {draw.choice(VERBS)} the"
        f" {draw.choice(ADJECTIVES)} {other}."
    )


def _digits(draw: random.Random, count: int = 5) -> str:
    return "".join(str(draw.randrange(10)) for _ in range(count))


Made = tuple[list[str], str, str]  # the needles, the question, the answer


def _passkey(draw: random.Random) -> Made:
    key = _digits(draw)
    needle = f'The pass key is "{key}". Remember it: "{key}" is the pass key.'
    return [needle], 'What is the pass key? The pass key is "', key


def _keys(draw: random.Random) -> Made:
    names, values = draw.sample(NOUNS, 4), [_digits(draw) for _ in range(4)]
    pairs = ", ".join(f'"{name}": "{value}"' for name, value in zip(names, values))
    asked = draw.randrange(4)
    return (
        ["{" + pairs + "}"],
        f'In the JSON object above the value of "{names[asked]}" is "',
        f'{values[asked]}"',
    )


def _quotes(draw: random.Random) -> Made:
    person = draw.choice(PEOPLE)
    sentence = _sentence(draw).removesuffix(".").lower()
    return (
        [f'{person} wrote: "{sentence}"'],
        f'What did {person} write? {person} wrote: "',
        f'{sentence}"',
    )


def _several(draw: random.Random) -> Made:
    people, numbers = draw.sample(PEOPLE, 3), [_digits(draw, 4) for _ in range(3)]
    needles = [
        f'The locker of {person} has the number "{number}".'
        for person, number in zip(people, numbers)
    ]
    asked = draw.randrange(3)
    return needles, f'The locker of {people[asked]} has the number "', numbers[asked]


def _facts(draw: random.Random) -> Made:
    person, city, work = draw.choice(PEOPLE), draw.choice(CITIES), draw.choice(WORKS)
    needle = (
        f"{person} moved to {city} some years ago and has worked there as a {work}"
        " since."
    )
    return (
        [needle],
        f"Question: In which city does {person} work?\nAnswer: {person} works in",
        f" {city}",
    )


def _stock(draw: random.Random) -> Made:
    goods, numbers = draw.sample(GOODS, 4), [_digits(draw, 3) for _ in range(4)]
    head, asked = "goods,in stock\n", draw.randrange(4)
    lines = "\n".join(f"{name},{number}" for name, number in zip(goods, numbers))
    return (
        [head + lines],
        f"The line of {goods[asked]} again:\n{head}{goods[asked]},",
        numbers[asked],
    )


def _copying(draw: random.Random) -> Made:
    words = [draw.choice((*NOUNS, *ADJECTIVES, *GOODS)) for _ in range(16)]
    return [" ".join(words)], " ".join(words[:12]), f" {' '.join(words[12:])}"


ALL_MAKERS = _passkey, _keys, _quotes, _several, _facts, _stock, _copying
FORM_MAKERS: dict[RetrievalForm, Callable[[random.Random], Made]] = dict(
    zip((*FITTED, *UNSEEN), ALL_MAKERS, strict=True)
)
