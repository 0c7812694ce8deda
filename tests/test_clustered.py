"""Errors over documents, of windows' differences."""

import pytest

from api import mean_and_error
from programs import program

pytestmark = pytest.mark.any_transformers  # it is about numbers

clustered = program("benchmarks/clustered")


def test_of_a_window_each_it_is_the_error_over_windows():
    values = [0.3, 0.1, 0.7, -0.2, 0.4]
    assert clustered.clustered_error(values, range(5)) == pytest.approx(mean_and_error(values)[1])


def test_documents_that_are_alike_within_count_once():
    """Three windows each of two documents, 1 and 3: as if there were two values."""
    assert clustered.clustered_error([1, 1, 1, 3, 3, 3], [4, 4, 4, 9, 9, 9]) == pytest.approx(mean_and_error([1, 3])[1])


def test_windows_are_of_the_document_that_their_middle_is_in():
    def words(text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text.strip()]}

    windows, of = clustered.windows_of(words, ["a" * 700, "b" * 900, "c" * 600], True)
    assert windows.shape == (4, 512)
    for row, place in zip(windows.tolist(), of):
        assert row[256] == ord("abc"[place])
