"""What a repair is fitted to and what it is measured on are drawn together, from texts
that are tokenised once.
"""

from __future__ import annotations

import pytest
import torch

from api import FitTexts, RepairTexts
from families import family
from notall import UsageError
from tiny_tokenizer import byte_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def model():
    return family("llama").build(vocab_size=2048)


@pytest.fixture
def sources(tmp_path):
    """Two texts, of which no window is like another."""
    paths = [tmp_path / name for name in ("one.txt", "two.txt")]
    for place, path in enumerate(paths):
        path.write_text(
            " ".join(
                f"{name} {number}" for number in range(3000) for name in "ab"[place]
            )
        )
    return [str(path) for path in paths]


def rows_in(batches):
    return {tuple(row) for batch in batches for row in batch.tolist()}


@pytest.mark.parametrize("sequences", [None, 10, 200])
def test_what_it_is_measured_on_is_never_what_it_is_fitted_to(
    model, sources, sequences
):
    wanted = FitTexts(sources, sequences=sequences, length=LENGTH)
    texts = RepairTexts.draw(model, byte_tokenizer(), wanted)
    own = rows_in(one.rows for one in texts.fitted)
    other = rows_in(row for rows in texts.other.values() for row in rows)
    assert len(own) == (sequences or 128) == texts.described["sequences"]
    assert len(other) == 2 * 16
    assert not own & other
    assert set(texts.other) == {"one.txt, other windows", "two.txt, other windows"}
    together = texts.together(8)
    assert [len(batch) for batch in together[:-1]] == [8] * (len(together) - 1)
    first = [one.rows[0] for one in texts.fitted]
    assert torch.equal(torch.cat(together)[:2], torch.stack(first))  # in turn


def test_what_it_is_measured_on_was_not_used_before(model, sources):
    tokenizer = byte_tokenizer()

    def drawn(used=(), **how):
        wanted = FitTexts(sources, length=LENGTH, **how)
        return RepairTexts.draw(model, tokenizer, wanted, used=used)

    used = drawn(sequences=1000, seed=1).fitted
    seen = rows_in(one.rows for one in used)
    for used_before, shares in (([], True), (used, False)):
        texts = drawn(sequences=10, used=used_before)
        other = rows_in(row for rows in texts.other.values() for row in rows)
        assert bool(other & seen) == shares


def test_each_text_is_tokenised_once(model, sources):
    tokenizer, asked = byte_tokenizer(), []
    count(tokenizer, asked)
    for seed in (0, 1):
        RepairTexts.draw(model, tokenizer, FitTexts(sources, length=LENGTH, seed=seed))
    RepairTexts.draw(
        model, tokenizer, FitTexts(sources[:1], sources[1:], length=LENGTH)
    )
    assert sorted(len(text) > 1000 for text in asked if len(text) > 10) == [True, True]


def count(tokenizer, asked):
    """Note what a tokenizer is asked for."""

    class Counting(type(tokenizer)):
        def __call__(self, text, **options):
            asked.append(text)
            return super().__call__(text, **options)

    tokenizer.__class__ = Counting


def test_held_out_texts_take_the_place_of_other_windows(model, sources):
    wanted = FitTexts(sources[:1], sources[1:], sequences=4, length=LENGTH)
    texts = RepairTexts.draw(model, byte_tokenizer(), wanted)
    assert list(texts.other) == ["two.txt"]
    assert len(rows_in(texts.other["two.txt"])) == 16
    assert texts.described["texts"][0]["text"] == "one.txt"


def test_windows_longer_than_the_model_are_refused(model, sources):
    with pytest.raises(
        UsageError,
        match="windows of 65 tokens exceed the model's 64 positions: lower --length",
    ):
        RepairTexts.draw(model, byte_tokenizer(), FitTexts(sources, length=65))
