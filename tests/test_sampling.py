"""What a temperature does to the text of the skipped model."""

from api import generate_text
from notall import Plan
from tiny_tasks import byte_tokenizer, tiny_llama

PLAN = Plan([1], [2])


def test_near_zero_it_says_what_greedy_says_and_far_from_it_something_else():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    said = [
        generate_text(
            model,
            tokenizer,
            PLAN,
            "the river",
            max_new_tokens=20,
            temperature=temperature,
        )
        for temperature in (0.0, 0.001, 1.0)
    ]
    assert said[0] == said[1] != said[2]
