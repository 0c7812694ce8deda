"""What people ask a model: varied prompts without a data set, to have it write its own answers to.

Of each list the words at even places make prompts to fit to, those at odd places prompts to judge by.
"""

import random
from collections.abc import Callable, Sequence

TOPICS = (
    "photosynthesis", "inflation", "how vaccines work", "the French Revolution", "plate tectonics", "binary search",
    "why the sky is blue", "supply and demand", "the water cycle", "public-key encryption", "how bread rises",
    "the rules of chess", "black holes", "compound interest", "how a bill becomes law", "natural selection",
    "the printing press", "what an operating system does", "jet lag", "the moon landing", "how batteries store energy",
    "the greenhouse effect", "the Silk Road", "why leaves change colour", "unit testing", "how glaciers move",
    "probability", "what a database index is", "sleep", "the difference between weather and climate",
)  # fmt: skip
FUNCTIONS = (
    "reverses the words of a sentence", "returns the n-th Fibonacci number", "counts how often each word occurs",
    "checks whether a string is a palindrome", "merges two sorted lists", "removes duplicates and keeps the order",
    "parses a date such as 2024-03-09", "finds the two numbers that add up to a target", "flattens a nested list",
    "converts a Roman numeral to a number", "reads a CSV file into dictionaries", "tells whether a number is prime",
    "rotates a matrix by 90 degrees", "groups words that are anagrams", "retries a call three times",
    "computes a moving average",
)  # fmt: skip
SENTENCES = (
    "The train leaves at seven in the morning.", "My sister has bought a small house near the sea.",
    "Could you tell me where the library is?", "We have not seen each other for three years.",
    "The soup is too hot to eat.", "It rained all day, so we stayed at home.",
    "He forgot his keys and had to climb through the window.", "The museum is closed on Mondays.",
    "She would rather read than watch a film.", "Please send me the report before Friday.",
)  # fmt: skip
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch")
PEOPLE = ("Anna", "Bruno", "Chloe", "David", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Lena")
GOODS = ("pencils", "apples", "tickets", "books", "eggs", "stamps", "bottles", "chairs", "melons", "shirts")
CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Prague", "Quito", "Hanoi", "Tunis", "Perth", "Bergen", "Turin")
THINGS = ("a running shoe", "a coffee machine", "a city bike", "a reading lamp", "a backpack", "a language course",
          "a raincoat", "a garden hose")  # fmt: skip
REQUESTS = (
    "moving a meeting to next week", "asking for a refund of a broken kettle", "thanking a colleague for her help",
    "inviting neighbours to a summer party", "declining a job offer politely", "reporting a broken street light",
    "asking a landlord to mend the heating", "ordering twenty chairs for an office",
)  # fmt: skip

OPENINGS = (
    "The history of", "In 1998,", "She opened", "Researchers have", "The company", "How to", "A town", "When I",
    "The film", "According to", "A new study", "The battle", "For this", "He was born", "The river", "Scientists",
    "Many people", "The species", "There are", "To install", "It was", "The president", "Question:", "I think",
    "Our products", "Dear", "The church", "During the", "If you", "The song", "As the", "def main",
)  # fmt: skip

Pick = Callable[[Sequence[str]], str]


def prompts(count: int, *, seed: int = 0, held_out: bool = False) -> list[str]:
    """`count` prompts, for explanations, code, sums, JSON, translations and letters in turn, the same for a seed.

    Those `held_out` are made of other words.
    """
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
