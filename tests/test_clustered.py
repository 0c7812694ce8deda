"""Windows of documents, whose errors `mean_and_error` has."""

import pytest

from programs import program

pytestmark = pytest.mark.any_transformers  # it is about numbers

clustered = program("benchmarks/clustered")


def test_windows_are_of_the_document_that_their_middle_is_in():
    def words(text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text.strip()]}

    windows, of = clustered.windows_of(words, ["a" * 700, "b" * 900, "c" * 600], True)
    assert windows.shape == (4, 512)
    for row, place in zip(windows.tolist(), of):
        assert row[256] == ord("abc"[place])
